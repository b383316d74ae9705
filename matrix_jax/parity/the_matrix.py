"""Replays of The Matrix: one function per kind of recording."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from matrix_jax.controls import driving
from matrix_jax.diffusion import sampling, schedules
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5
from matrix_jax.nn import rope
from matrix_jax.parity.record import (
    Fields,
    Record,
    fast_jit,
    frame_levels,
    from_bcthw,
    from_btchw,
    to_bcthw,
    to_btchw,
)
from matrix_jax.parity.schedulers import schedulers
from matrix_jax.stream import swin
from matrix_jax.train import denoise as training
from matrix_jax.vae import cogvideox as vae
from matrix_jax.vae.tiling import Tiles
from matrix_jax.weights import conversion


def transformer(record: Record) -> dict:
    """One call of the DiT."""
    cfg, params = _dit(record)
    inputs = record.inputs
    latents, levels = from_btchw(inputs['hidden_states']), frame_levels(inputs['timestep'])
    guidance = inputs.get('timestep_cond')
    if guidance is not None:  # one row per sample and frame, or one for all
        guidance = guidance.reshape(
            -1, levels.shape[1] if len(guidance) > 1 else 1, guidance.shape[-1]
        )
    v = fast_jit(_denoise(cfg))(
        params,
        latents,
        levels,
        inputs['encoder_hidden_states'],
        inputs.get('control_emb'),
        guidance,
    )
    return {'sample': to_btchw(v)}


def video_autoencoder(record: Record) -> dict:
    """Whole-clip encoding, posterior sample and decoding; tiled if the config says so."""
    cfg, params = _vae(record)
    encode, decode = vae.encode, vae.decode
    if record.config.get('tiling'):
        config = record.config
        sizes = (
            tuple(config[f'tile_{space}_min_{side}'] for side in ('height', 'width'))
            for space in ('sample', 'latent')
        )
        tiles = Tiles(*sizes, tuple(config['overlap']))
        encode = functools.partial(vae.encode_tiled, tiles=tiles)
        decode = functools.partial(vae.decode_tiled, tiles=tiles)
    inputs = record.inputs
    mean, logvar = fast_jit(functools.partial(encode, cfg))(params, from_bcthw(inputs['x']))
    sample = vae.sample(mean, logvar, from_bcthw(inputs['posterior_noise']))
    frames = fast_jit(functools.partial(decode, cfg))(params, from_bcthw(inputs['z']))
    return {
        'moments': to_bcthw(jnp.concatenate([mean, logvar], axis=-1)),
        'sample': to_bcthw(sample),
        'decoded': to_bcthw(frames),
    }


def vae_stream(record: Record) -> dict:
    """Decoding in chunks with a carried cache, and whole."""
    cfg, params = _vae(record)
    latents = from_bcthw(record.inputs['z'])
    decode = fast_jit(functools.partial(vae.decode, cfg))
    outputs = {
        'full': to_bcthw(decode(params, latents)),
        'single_latent': to_bcthw(decode(params, latents[:, :1])),
    }
    steps = fast_jit(functools.partial(vae.step, cfg))
    cache, start = None, 0
    for index, size in enumerate(record.config['chunks']):
        run = steps if index else fast_jit(functools.partial(vae.prefill, cfg))
        state = (cache,) if index else ()
        cache, frames = run(params, *state, latents[:, start : start + size])
        outputs[f'chunk{index}'] = to_bcthw(frames)
        start += size
    for name, leaf in conversion.flatten(cache).items():
        theirs = re.sub(r'^up_', 'up_block_', re.sub(r'^mid/', 'mid_block/', name))
        outputs['final_cache.' + theirs.replace('/', '.')] = to_bcthw(leaf)
    return outputs


def vae_sliced_decode(record: Record) -> dict:
    """Decoding of a long clip in overlapping windows; the recording has some of the frames."""
    cfg, params = _vae(record)
    decode = functools.partial(
        vae.decode_sliced,
        cfg,
        window=record.config['decode_window'],
        overlap=record.config['overlap_latents'],
    )
    frames = fast_jit(decode)(params, from_btchw(record.inputs['latents']) / cfg.scaling_factor)
    outputs = {'frame_mean': reduce(frames, 'b f h w c -> b f', 'mean')}
    for name in record.outputs:
        if part := re.fullmatch(r'frames_(\d+)_(\d+)', name):
            start, stop = map(int, part.groups())
            outputs[name] = to_bcthw(frames[:, start:stop])
    return outputs


def swin_stream(record: Record) -> dict:
    """The Swin-DPM loop on recorded noise."""
    cfg, params = _dit(record)
    config, inputs = record.config, record.inputs
    scheduler = schedules.SchedulerConfig.from_released(config['sched'])
    few_steps = config.get('original_inference_steps')
    stream = swin.Config(
        groups=config['num_noise_groups'],
        group_frames=config['window_size'],
        steps=config['num_inference_steps'],
        guidance=config.get('guidance_scale') or 1.0,
        solver=config.get('sampler', 'lcm' if few_steps else 'dpm'),
        original_steps=few_steps or 40,
        lcm_multiplier=config.get('lcm_multiplier') or 1,
    )
    shifts = config['num_sample_groups']
    symbols = _symbols(config)[None, : swin.needed_controls(stream, shifts)]
    first, rest = swin.split_controls(stream, symbols, shifts)
    guided = stream.guidance > 1
    latents = from_btchw(inputs['latents'])
    cond = swin.Cond(
        latents=latents,
        text=inputs['prompt_embeds'],
        controls=first,
        control_table=inputs['control_embeddings'],
        null_text=inputs['negative_prompt_embeds'] if guided else None,
    )
    table, schedule = swin.shift_table(stream, scheduler), schedules.make(scheduler)
    carry = swin.initial_carry(
        stream,
        table,
        schedule,
        cond,
        jax.random.split(jax.random.key(0), 1),
        from_btchw(inputs['noise_init']),
    )
    noise = [
        from_btchw(inputs[name]) if name in inputs else None
        for name in ('noise_step', 'noise_append')
    ]
    denoise = _denoise(cfg)

    @fast_jit
    def run_shifts(params, carry, now):
        def advance(carry, now):
            after, popped = swin.shift(stream, table, schedule, denoise, params, carry, *now)
            return after, (carry.window, popped)

        return jax.lax.scan(advance, carry, now)[1]

    windows, popped = run_shifts(params, carry, (rest, *noise))
    text = jnp.concatenate([cond.null_text, cond.text]) if guided else cond.text
    control = carry.control_table[swin.bind(stream, carry.controls, rest[0])]
    v = fast_jit(denoise)(
        params,
        *(jnp.repeat(part, len(text), axis=0) for part in (carry.window, table.levels[:1])),
        text,
        jnp.repeat(control, len(text), axis=0),
    )
    return {
        'first_noisy_window': to_btchw(carry.window),
        'first_model_out': to_btchw(v),
        'timesteps_used': table.levels,
        'window_before_shift': to_btchw(windows),
        'dequeued': rearrange(popped, 's b t h w c -> b (s t) c h w'),
    }


def text_to_video(record: Record) -> dict:
    """The clip sampler of stages 1 and 2."""
    cfg, params = _dit(record)
    config, inputs = record.config, record.inputs
    scheduler = schedules.SchedulerConfig.from_released(config['sched'])
    run = sampling.Config(
        steps=config['num_inference_steps'],
        guidance=config['guidance_scale'],
        dynamic_guidance=config['use_dynamic_cfg'],
        solver=config['sampler'],
    )
    control = inputs['control_embeddings'][_symbols(config)][None] if cfg.control else None
    noise = from_btchw(inputs['noise_step']) if 'noise_step' in inputs else None
    latents = fast_jit(
        lambda params: sampling.sample(
            run,
            scheduler,
            _denoise(cfg),
            params,
            from_btchw(inputs['noise_init']),
            lambda index: jnp.asarray(noise)[index],
            inputs['prompt_embeds'],
            inputs.get('negative_prompt_embeds'),
            control,
        )
    )(params)
    levels = schedules.timesteps(scheduler, run.steps)
    return {
        'latents': to_btchw(latents),
        'guidance_per_step': sampling.guidance_scales(run, levels),
    }


def train_loss(record: Record) -> dict:
    """The denoising loss and its gradients."""
    cfg, params = _dit(record)
    config, inputs = record.config, record.inputs
    schedule = schedules.make(schedules.SchedulerConfig.from_released(config['sched']))
    clean, noise = from_btchw(inputs['x0']), from_btchw(inputs['noise'])
    per_sample = inputs['timesteps'].ndim == 1
    levels = np.broadcast_to(frame_levels(inputs['timesteps']), clean.shape[:2])
    loss_mask = np.ones(clean.shape[1], np.float32)
    if config['stage'] >= 3:
        loss_mask[0] = 0  # the condition frame

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        def denoise(noisy, levels):
            return _denoise(cfg)(
                params, noisy, levels, inputs['prompt_embeds'], inputs.get('control_emb')
            )

        return training.denoise_loss(schedule, denoise, clean, noise, levels, loss_mask)

    (value, aux), gradients = fast_jit(loss)(params)
    gradients = conversion.to_torch(dit.weights(cfg), gradients)
    # Stage 2 trains the control modules only.
    trained = [
        gradient
        for name, gradient in gradients.items()
        if config['stage'] != 2 or 'control' in name
    ]
    weights = aux['weights'][:, :1] if per_sample else aux['weights']
    return {
        'model_output': to_btchw(aux['v']),
        'noisy': to_btchw(aux['noisy']),
        'x0_pred': to_btchw(aux['x0']),
        'table_weights': weights.reshape(-1),
        'table_loss': value.reshape(1),
        'table_per_sample_loss': aux['per_sample'],
        'grad_norm': np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in trained)),
        **{f'table_grad.{name}': gradient for name, gradient in gradients.items()},
    }


def embeddings(record: Record) -> dict:
    """Position, noise level and guidance codes; the output names hold the sizes."""
    outputs = {}
    for name in record.outputs:
        if part := re.fullmatch(r'(timestep|guidance)_emb_dim(\d+)', name):
            code, values = {
                'timestep': (rope.timestep_code, 't'),
                'guidance': (rope.guidance_code, 'w'),
            }[part[1]]
            outputs[name] = code(record.inputs[values], int(part[2]))
        elif part := re.fullmatch(r'pos3d_D(\d+)_W(\d+)_H(\d+)_T(\d+)_s([\d.]+)_t([\d.]+)', name):
            width, columns, rows, frames = map(int, part.groups()[:4])
            space, time = map(float, part.groups()[4:])
            outputs[name] = rope.sincos_3d(
                *(
                    rope.scaled_positions(*axis)
                    for axis in ((frames, time), (rows, space), (columns, space))
                ),
                width,
            )
    return outputs


def t5_encoder(record: Record) -> dict:
    """Text features."""
    cfg = t5.Config.from_released(record.config['cfg'])
    tied = [
        record.weights[name]
        for name in ('shared.weight', 'encoder.embed_tokens.weight')
        if name in record.weights
    ]
    if len(tied) == 2 and not np.array_equal(*tied):
        raise conversion.ConversionError(
            'encoder.embed_tokens.weight differs from shared.weight, to which it is tied'
        )
    params = conversion.to_jax(t5.weights(cfg), record.weights, t5.shapes(cfg))
    features = fast_jit(t5.T5Encoder(cfg).apply)({'params': params}, _ids(record))
    return {'last_hidden_state': features}


def clip_text(record: Record) -> dict:
    """Control prompt features."""
    cfg = clip.Config.from_released(record.config['cfg'])
    params = conversion.to_jax(clip.weights(cfg), record.weights, clip.shapes(cfg))
    features = fast_jit(clip.TextTower(cfg).apply)({'params': params}, _ids(record))
    return {'text_features': features}


SIGNAL_ARGUMENTS = ('length', 'seed', 'repeat_lens', 'signal_choices', 'change_prob_increment')


def control_signals(record: Record) -> dict:
    """Random control strings, and the padding of the published call."""
    random = [
        driving.generate_random_control_signal(*(case[name] for name in SIGNAL_ARGUMENTS))
        for case in record.config['generate_random_control_signal']
    ]
    frames, base, streaming = [], [], []
    for case in record.config['generate_padding']:
        length, seed = case['length'], case['control_seed']
        signal = driving.base_signal(length, case['control_signal'], seed)
        frames.append(driving.base_frames(length))
        needed = (frames[-1] - 1) // driving.FRAMES_PER_CONTROL + 1
        base.append(','.join(signal.split(',')[:needed]))
        # Short clips are made whole by the base stage, and not streamed.
        streaming.append(
            None
            if length <= driving.BASE_SECONDS
            else driving.streaming_signal(signal, frames[-1], 4, case['num_sample_groups'], seed)
        )
    return {
        'random': random,
        'base_frames': frames,
        'base_signal': base,
        'streaming_signal': streaming,
    }


def _ids(record: Record):
    return record.inputs['input_ids'].astype(np.int32)


def _symbols(config: Fields) -> np.ndarray:
    """Rows of the recorded control table for the recorded signal."""
    keys = config['control_keys']
    return np.array(
        [keys.index(symbol) for symbol in config['control_signal'].split(',')], np.int32
    )


def _dit(record: Record):
    cfg = dit.Config.from_released(record.config['cfg'])
    return cfg, conversion.to_jax(dit.weights(cfg), record.weights, dit.shapes(cfg))


def _denoise(cfg: dit.Config):
    def denoise(params, x, level, text, control, guidance=None):
        return dit.CogVideoXTransformer(cfg).apply(
            {'params': params}, x, text, level, control, guidance
        )

    return denoise


def _vae(record: Record):
    """Config and parameters of the VAE; without the encoder if the recording has none."""
    cfg = vae.Config.from_released(record.config['cfg'])
    # PARITY: a single latent frame decodes to one frame in stages 1 and 2, to four in 3 and 4.
    frames = 1 if record.config['stage'] <= 2 else cfg.temporal_compression
    cfg = dataclasses.replace(cfg, single_latent_frames=frames)
    table, shapes = vae.weights(cfg), vae.shapes(cfg)
    if record.kind != 'vae' and not any(name.startswith('encoder.') for name in record.weights):
        table = [row for row in table if row.torch.startswith('decoder.')]
        shapes = {'decoder': shapes['decoder']}
    return cfg, conversion.to_jax(table, record.weights, shapes)


REPLAYS = {
    'transformer': transformer,
    'vae': video_autoencoder,
    'vae_stream': vae_stream,
    'vae_sliced_decode': vae_sliced_decode,
    'schedulers': schedulers,
    'swin': swin_stream,
    'text_to_video': text_to_video,
    'train_loss': train_loss,
    'embeddings': embeddings,
    't5_encoder': t5_encoder,
    'clip_text': clip_text,
    'control_signals': control_signals,
}
