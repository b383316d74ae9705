"""Replays recorded PyTorch tensors through the shipped loaders and networks, and compares.

A recording is a safetensors file with `weights/*`, `inputs/*` and `outputs/*`; its metadata says what
to run (`system`, `kind`), with which sizes and options (`config`), and how close the outputs must be
(`atol`, `rtol`). One function per kind returns what this library makes of the inputs. Everything runs
in float32 with full-precision multiplies.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from matrix_jax import controls, convert
from matrix_jax.diffusion import sampling, schedules, solvers
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5
from matrix_jax.nn import rope
from matrix_jax.stream import swin
from matrix_jax.train import denoise as training
from matrix_jax.vae import cogvideox as vae

SYSTEM = 'the_matrix'
PREFIXES = ('weights/', 'inputs/', 'outputs/')
INFORMATIONAL = 'inter_'          # activations inside the reference, to bisect with
EXPECTED = ('grad_norm', 'guidance_per_step')       # results that a file keeps in its config
HEADER = f'{"file":<34} {"output":<44} {"max abs":>9} {"max rel":>9} {"tolerance":>12}  ok'


class BadInput(ValueError):
    """A file that is no recording we can replay."""


class Fields(dict):
    """Named parts of a recording; a missing one is the file's fault."""

    def __init__(self, where: str, content: Mapping):
        super().__init__(content)
        self.where = where

    def __missing__(self, key):
        raise BadInput(f'{self.where}: no {key!r}')


@dataclasses.dataclass(frozen=True)
class Record:
    """One recording."""
    path: Path
    system: str
    kind: str
    config: Fields
    weights: Fields
    inputs: Fields
    outputs: Fields
    atol: float = 0.0
    rtol: float = 0.0


@dataclasses.dataclass(frozen=True)
class Line:
    """One output compared: largest difference, also relative to the largest recorded value."""
    output: str
    max_abs: float
    max_rel: float
    tolerance: str
    ok: bool
    note: str = ''


# --- reading and comparing -----------------------------------------------------------------------


def read(path: str | Path) -> Record:
    """Reads a recording: safetensors, or the JSON of control signals.

    Raises:
      BadInput: not a file, damaged, or without the metadata of a recording.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f'{path}: not a file')
    if path.suffix == '.json':
        return _read_signals(path)
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'np') as file:
            metadata = Fields(f'{path}: metadata', file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f'{path}: not a readable safetensors file ({error})') from None
    parts = [Fields(f'{path}: {prefix[:-1]}', {name.removeprefix(prefix): tensor
                                              for name, tensor in tensors.items()
                                              if name.startswith(prefix)}) for prefix in PREFIXES]
    strange = [name for name in tensors if not name.startswith(PREFIXES)]
    if strange:
        raise BadInput(f'{path}: tensor {strange[0]!r}, expected names in {", ".join(PREFIXES)}')
    try:
        config = Fields(f'{path}: config', json.loads(metadata['config']))
        atol, rtol = float(metadata['atol']), float(metadata['rtol'])
    except (ValueError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f'{path}: metadata is not readable ({error})') from None
    for name in EXPECTED:
        if config.get(name) is not None:
            parts[2][name] = np.asarray(config[name])
    return Record(path, metadata['system'], metadata['kind'], config, *parts, atol, rtol)


def _read_signals(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise BadInput(f'{path}: not readable JSON ({error})') from None
    known = ('generate_random_control_signal', 'generate_padding')
    if not isinstance(content, dict) or not set(known) & set(content):
        raise BadInput(f'{path}: expected a JSON object with {" or ".join(known)}')
    cases = {name: [Fields(f'{path}: {name}', case) for case in content.get(name, ())]
             for name in known}
    outputs = {'random': [case['out'] for case in cases[known[0]]]}
    for name in ('base_frames', 'base_signal', 'streaming_signal'):
        outputs[name] = [case[name] for case in cases[known[1]]]
    empty = Fields(str(path), {})
    return Record(path, SYSTEM, 'control_signals', Fields(str(path), cases), empty, empty,
                  Fields(f'{path}: outputs', outputs))


def tolerance(record: Record, name: str, want: np.ndarray) -> tuple[float, float, str]:
    """(atol, rtol, how to say it) of one output: the file's, or a stricter one of its kind."""
    if want.dtype.kind not in 'fc':
        return 0.0, 0.0, 'exact'
    for kind, pattern, value in ABSOLUTE:
        if record.kind == kind and re.match(pattern, name):
            return value, 0.0, f'abs {value:.0e}'
    for kind, pattern, value in RELATIVE:
        if record.kind == kind and re.match(pattern, name):
            return value * float(np.abs(want).max(initial=0)), 0.0, f'rel {value:.0e}'
    return record.atol, record.rtol, f'{record.atol:.0e}'


ABSOLUTE = (('schedulers', 'table_alphas_cumprod', 2e-6), ('embeddings', 'pos3d_', 1e-6),
            ('embeddings', 'timestep_', 1e-4), ('embeddings', 'guidance_', 2e-3))
# Losses and gradients have no scale of their own.
RELATIVE = (('train_loss', 'table_(loss|per_sample_loss)', 1e-4),
            ('train_loss', 'table_weights|table_grad|grad_norm', 1e-3))


def compare(record: Record, got: Mapping[str, np.ndarray]) -> list[Line]:
    """A line for every recorded output but the informational ones."""
    lines = []
    for name, want in sorted(record.outputs.items()):
        if name.startswith(INFORMATIONAL):
            continue
        if name not in got:
            lines.append(Line(name, np.nan, np.nan, '-', False, 'this library does not make it'))
            continue
        want, ours = np.asarray(want), np.asarray(got[name])
        if want.dtype.kind not in 'fciu':       # texts; None stands for no text
            wrong = sum(map(lambda pair: pair[0] != pair[1], zip(want, ours, strict=True)))
            lines.append(Line(name, wrong, wrong / len(want), 'exact', not wrong,
                              f'{wrong} of {len(want)} differ' if wrong else ''))
            continue
        atol, rtol, said = tolerance(record, name, want)
        if ours.shape != want.shape:
            lines.append(Line(name, np.nan, np.nan, said, False,
                              f'shape {ours.shape}, recorded {want.shape}'))
            continue
        want = want.astype(np.float64)
        error = np.abs(ours.astype(np.float64) - want)
        # A NaN compares as false, so it never holds.
        ok = bool(np.all(error <= atol + rtol * np.abs(want)))
        largest = error.max(initial=0)
        scale = np.abs(want).max(initial=0)
        lines.append(Line(name, largest, largest / scale if scale else largest, said, ok))
    return lines


def replay(record: Record) -> list[Line]:
    """Runs a recording through its replay function and compares.

    Raises:
      BadInput: no replay function, or the file lacks what it needs.
      ValueError: weights or configuration do not fit our networks.
    """
    function = REPLAYS.get((record.system, record.kind))
    if function is None:
        known = ', '.join('/'.join(pair) for pair in sorted(REPLAYS))
        raise BadInput(f'{record.path}: cannot replay {record.system}/{record.kind}; known: {known}')
    with jax.default_matmul_precision('highest'):
        return compare(record, function(record))


def run(paths: Sequence[str | Path], out=None, err=None) -> int:
    """Replays files and prints the table; 0 all outputs hold, 1 some do not, 2 a file is bad."""
    out, err = out or sys.stdout, err or sys.stderr
    code, total, failed = 0, 0, []
    print(HEADER, file=out)
    for path in paths:
        name = Path(path).name.removesuffix('.safetensors')
        try:
            record = read(path)
            lines = replay(record)
        except BadInput as error:
            print(f'error: {_one_line(error)}', file=err)
            code = 2
            continue
        except ValueError as error:
            print(f'{name:<34} FAILED: {_one_line(error)}', file=out)
            failed.append(name)
            continue
        for line in lines:
            print(f'{name:<34} {line.output:<44} {line.max_abs:>9.1e} {line.max_rel:>9.1e} '
                  f'{line.tolerance:>12}  {"ok" if line.ok else "FAILED"} {line.note}'.rstrip(),
                  file=out, flush=True)
            failed += [] if line.ok else [f'{name}: {line.output}']
        total += len(lines)
    print(f'{total} outputs of {len(paths)} files: '
          + (f'{len(failed)} FAILED ({"; ".join(failed)})' if failed else
             'not all could be read' if code else 'all hold'), file=out)
    return code or (1 if failed else 0)


def _one_line(error) -> str:
    return ' '.join(str(error).split())


# --- The Matrix ----------------------------------------------------------------------------------


def transformer(record: Record) -> dict:
    """One call of the DiT."""
    cfg, params = _dit(record)
    given = record.inputs
    latents, levels = _video(given['hidden_states']), _levels(given['timestep'])
    guidance = given.get('timestep_cond')
    if guidance is not None:        # one row per sample and frame, or one for all
        guidance = guidance.reshape(-1, levels.shape[1] if len(guidance) > 1 else 1,
                                    guidance.shape[-1])
    v = _denoise(cfg)(params, latents, levels, given['encoder_hidden_states'],
                      given.get('control_emb'), guidance)
    return {'sample': _torch_video(v)}


def video_autoencoder(record: Record) -> dict:
    """Whole-clip encode, posterior sample and decode; tiled if the config says so."""
    cfg, params = _vae(record)
    encode, decode = vae.encode, vae.decode
    if record.config.get('tiling'):
        tiles = _tiles(record.config)
        encode = functools.partial(vae.encode_tiled, tiles=tiles)
        decode = functools.partial(vae.decode_tiled, tiles=tiles)
    given = record.inputs
    mean, logvar = jax.jit(functools.partial(encode, cfg))(params, _clip(given['x']))
    sample = vae.sample(mean, logvar, _clip(given['posterior_noise']))
    frames = jax.jit(functools.partial(decode, cfg))(params, _clip(given['z']))
    return {'moments': _torch_clip(jnp.concatenate([mean, logvar], axis=-1)),
            'sample': _torch_clip(sample), 'decoded': _torch_clip(frames)}


def vae_stream(record: Record) -> dict:
    """Decoding in chunks with a carried cache, and in one go."""
    cfg, params = _vae(record)
    latents = _clip(record.inputs['z'])
    decode = jax.jit(functools.partial(vae.decode, cfg))
    got = {'full': _torch_clip(decode(params, latents)),
           'single_latent': _torch_clip(decode(params, latents[:, :1]))}
    steps = jax.jit(functools.partial(vae.step, cfg))
    cache, start = None, 0
    for index, size in enumerate(record.config['chunks']):
        run = steps if index else jax.jit(functools.partial(vae.prefill, cfg))
        given = (cache,) if index else ()
        cache, frames = run(params, *given, latents[:, start:start + size])
        got[f'chunk{index}'] = _torch_clip(frames)
        start += size
    for name, leaf in convert.flatten(cache).items():
        theirs = re.sub(r'^up_', 'up_block_', re.sub(r'^mid/', 'mid_block/', name))
        got['final_cache.' + theirs.replace('/', '.')] = _torch_clip(leaf)
    return got


def vae_sliced_decode(record: Record) -> dict:
    """Decoding of a long clip in overlapping windows; the file keeps parts of the frames."""
    cfg, params = _vae(record)
    decode = functools.partial(vae.decode_sliced, cfg, window=record.config['decode_window'],
                               overlap=record.config['overlap_latents'])
    frames = jax.jit(decode)(params, _video(record.inputs['latents']) / cfg.scaling_factor)
    got = {'frame_mean': reduce(frames, 'b f h w c -> b f', 'mean')}
    for name in record.outputs:
        if part := re.fullmatch(r'frames_(\d+)_(\d+)', name):
            start, stop = map(int, part.groups())
            got[name] = _torch_clip(frames[:, start:stop])
    return got


def swin_stream(record: Record) -> dict:
    """The streaming loop with all its noise given."""
    cfg, params = _dit(record)
    told, given = record.config, record.inputs
    scheduler = schedules.SchedulerConfig.from_released(told['sched'])
    few_steps = told.get('original_inference_steps')
    stream = swin.Config(
        groups=told['num_noise_groups'], group_frames=told['window_size'],
        steps=told['num_inference_steps'], solver=told.get('sampler', 'lcm' if few_steps else 'dpm'),
        guidance=told.get('guidance_scale') or 1.0, original_steps=few_steps or 40,
        lcm_multiplier=told.get('lcm_multiplier') or 1)
    shifts = told['num_sample_groups']
    symbols = _symbols(told)[None, :swin.needed_controls(stream, shifts)]
    first, rest = swin.split_controls(stream, symbols, shifts)
    guided = stream.guidance > 1
    latents = _video(given['latents'])
    cond = swin.Cond(latents=latents, text=given['prompt_embeds'], controls=first,
                     control_table=given['control_embeddings'],
                     null_text=given['negative_prompt_embeds'] if guided else None)
    table, schedule = swin.tables(stream, scheduler), schedules.make(scheduler)
    carry = swin.start(stream, table, schedule, cond, jax.random.split(jax.random.key(0), 1),
                       _video(given['noise_init']))
    noise = [_video(given[name]) if name in given else None for name in ('noise_step', 'noise_append')]
    denoise = _denoise(cfg)

    @jax.jit
    def roll(params, carry, now):
        def advance(carry, now):
            after, popped = swin.shift(stream, table, schedule, denoise, params, carry, *now)
            return after, (carry.window, popped)
        return jax.lax.scan(advance, carry, now)[1]

    windows, popped = roll(params, carry, (rest, *noise))
    text = jnp.concatenate([cond.null_text, cond.text]) if guided else cond.text
    control = carry.control_table[swin.bind(stream, carry.controls, rest[0])]
    v = denoise(params, *(jnp.repeat(part, len(text), axis=0) for part in (
        carry.window, table.levels[:1])), text, jnp.repeat(control, len(text), axis=0))
    return {'first_noisy_window': _torch_video(carry.window), 'first_model_out': _torch_video(v),
            'timesteps_used': table.levels, 'window_before_shift': _torch_video(windows),
            'dequeued': rearrange(popped, 's b t h w c -> b (s t) c h w')}


def text_to_video(record: Record) -> dict:
    """The clip sampler of stages 1 and 2."""
    cfg, params = _dit(record)
    told, given = record.config, record.inputs
    scheduler = schedules.SchedulerConfig.from_released(told['sched'])
    run = sampling.Config(steps=told['num_inference_steps'], guidance=told['guidance_scale'],
                          dynamic_guidance=told['use_dynamic_cfg'], solver=told['sampler'])
    control = given['control_embeddings'][_symbols(told)][None] if cfg.control else None
    noise = _video(given['noise_step']) if 'noise_step' in given else None
    latents = jax.jit(lambda params: sampling.sample(
        run, scheduler, _denoise(cfg), params, _video(given['noise_init']),
        lambda index: jnp.asarray(noise)[index], given['prompt_embeds'],
        given.get('negative_prompt_embeds'), control))(params)
    levels = schedules.timesteps(scheduler, run.steps)
    return {'latents': _torch_video(latents),
            'guidance_per_step': sampling.guidance_scales(run, levels)}


def train_loss(record: Record) -> dict:
    """The denoising loss and its gradients."""
    cfg, params = _dit(record)
    told, given = record.config, record.inputs
    schedule = schedules.make(schedules.SchedulerConfig.from_released(told['sched']))
    clean = _video(given['x0'])
    per_sample = given['timesteps'].ndim == 1
    levels = np.broadcast_to(_levels(given['timesteps']), clean.shape[:2])
    counted = np.ones(clean.shape[1], np.float32)
    if told['stage'] >= 3:
        counted[0] = 0          # the condition frame

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        def denoise(noisy, levels):
            return _denoise(cfg)(params, noisy, levels, given['prompt_embeds'],
                                 given.get('control_emb'))
        return training.denoise_loss(schedule, denoise, clean, _video(given['noise']), levels, counted)

    (value, aux), gradients = jax.jit(loss)(params)
    gradients = convert.to_torch(dit.weights(cfg), gradients)
    # Stage 2 trains its control modules only.
    trained = [gradient for name, gradient in gradients.items()
               if told['stage'] != 2 or 'control' in name]
    weights = aux['weights'][:, :1] if per_sample else aux['weights']
    return {'model_output': _torch_video(aux['v']), 'noisy': _torch_video(aux['noisy']),
            'x0_pred': _torch_video(aux['x0']), 'table_weights': weights.reshape(-1),
            'table_loss': value.reshape(1), 'table_per_sample_loss': aux['per_sample'],
            'grad_norm': np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in trained)),
            **{f'table_grad.{name}': gradient for name, gradient in gradients.items()}}


def embeddings(record: Record) -> dict:
    """Position, noise level and guidance codes; the names say the sizes."""
    got = {}
    for name in record.outputs:
        if part := re.fullmatch(r'(timestep|guidance)_emb_dim(\d+)', name):
            code, values = {'timestep': (rope.timestep_code, 't'),
                            'guidance': (rope.guidance_code, 'w')}[part[1]]
            got[name] = code(record.inputs[values], int(part[2]))
        elif part := re.fullmatch(r'pos3d_D(\d+)_W(\d+)_H(\d+)_T(\d+)_s([\d.]+)_t([\d.]+)', name):
            width, columns, rows, frames = map(int, part.groups()[:4])
            space, time = map(float, part.groups()[4:])
            got[name] = rope.sincos_3d(
                *(rope.scaled_positions(*axis)
                  for axis in ((frames, time), (rows, space), (columns, space))), width)
    return got


def t5_encoder(record: Record) -> dict:
    """Text features."""
    cfg = t5.Config.from_released(record.config['cfg'])
    tied = [record.weights[name] for name in ('shared.weight', 'encoder.embed_tokens.weight')
            if name in record.weights]
    if len(tied) == 2 and not np.array_equal(*tied):
        raise convert.ConversionError('encoder.embed_tokens.weight differs from shared.weight, '
                                      'to which it is tied')
    params = convert.to_jax(t5.weights(cfg), record.weights, t5.shapes(cfg))
    features = jax.jit(t5.T5Encoder(cfg).apply)({'params': params}, _ids(record))
    return {'last_hidden_state': features}


def clip_text(record: Record) -> dict:
    """Control prompt features."""
    cfg = clip.Config.from_released(record.config['cfg'])
    params = convert.to_jax(clip.weights(cfg), record.weights, clip.shapes(cfg))
    features = jax.jit(clip.TextTower(cfg).apply)({'params': params}, _ids(record))
    return {'text_features': features}


def control_signals(record: Record) -> dict:
    """Random control strings, and the padding of the published call."""
    random = [controls.generate_random_control_signal(
        **{name: value for name, value in case.items() if name != 'out'})
        for case in record.config['generate_random_control_signal']]
    frames, base, streaming = [], [], []
    for case in record.config['generate_padding']:
        length, seed = case['length'], case['control_seed']
        signal = controls.base_signal(length, case['control_signal'], seed)
        frames.append(controls.base_frames(length))
        needed = (frames[-1] - 1) // controls.FRAMES_PER_CONTROL + 1
        base.append(','.join(signal.split(',')[:needed]))
        # A clip that the base stage makes whole is not streamed.
        streaming.append(None if length <= controls.BASE_SECONDS else controls.streaming_signal(
            signal, frames[-1], 4, case['num_sample_groups'], seed))
    return {'random': random, 'base_frames': frames, 'base_signal': base,
            'streaming_signal': streaming}


def schedulers(record: Record) -> dict:
    """Tables and single solver steps; the names say the sizes."""
    bench = Bench(record)
    got = {}
    for name in record.outputs:
        for pattern, make in STEPS:
            if part := re.fullmatch(pattern, name):
                got[name] = make(bench, *part.groups())
                break
    return got


class Bench:
    """Solver steps on the inputs of a recording; every method makes one output."""

    def __init__(self, record: Record):
        self.cfg = schedules.SchedulerConfig.from_released(record.config['sched'])
        self.abar = schedules.alphas_cumprod(self.cfg)
        self.given = record.inputs

    def video(self, name):
        return _video(self.given[name])

    def table(self, spacing, steps):
        cfg = dataclasses.replace(self.cfg, spacing=spacing)
        return schedules.timesteps(cfg, int(steps))

    def lcm_table(self, steps, original):
        return schedules.lcm_timesteps(int(steps), int(original), self.cfg.train_steps)

    def grouped(self, steps, frames, groups):
        size = (int(frames) - 1) // int(groups)
        return schedules.grouped(self.table('trailing', steps), int(groups), size)

    def boundaries(self, phases):
        levels = np.arange(self.cfg.train_steps)
        return schedules.phase_boundary(levels, int(phases), self.cfg.train_steps)

    def lcm_coefficient(self, steps, original, phases, what):
        levels = self.given[f'lcm_{steps}_{original}_{phases}_t']
        boundary = self.boundaries(phases)[levels]
        skip, out = solvers.jump(self.abar, levels, boundary)
        return {'boundary': boundary, 'cskip': skip, 'cout': out}[what]

    def lcm_step(self, steps, original, phases, what):
        levels = self.given[f'lcm_{steps}_{original}_{phases}_t']
        x, v, noise = (self.video(name)[:1] for name in ('x', 'model_output', 'noise'))
        plan = solvers.lcm(self.cfg, levels[None], self.lcm_table(steps, original), int(phases))
        row = solvers.Plan(*(column[0] for column in plan))
        if what == 'denoised':
            skip, out = (self.lcm_coefficient(steps, original, phases, name)
                         for name in ('cskip', 'cout'))
            row = row._replace(keep=np.float32(skip), clean=np.float32(out), fresh=0 * row.fresh)
        return _torch_video(solvers.step(row, solvers.init(x), x, v, noise)[1])

    def noised(self, family, what):
        uniform = family in ('ddim', 'dpm')
        levels = _levels(self.given['t_uniform' if uniform else 't_perframe'])
        function = {'add_noise': schedules.add_noise, 'velocity': schedules.velocity}[what]
        return _torch_video(function(schedules.make(self.cfg), self.video('x0'),
                                     self.video('noise'), levels))

    def uniform(self, solver, steps, index, order, what):
        levels, index = schedules.timesteps(self.cfg, int(steps))[:, None], int(index)
        back = levels[index - 1] if order == 'second' else None
        return self.step(solver, steps, levels[index], back, what)

    def window(self, solver, steps, which, order, what):
        name = f'swin_{steps}_{which}'
        back = self.given[f'{name}_tback'] if order == 'second' else None
        return self.step({'swin': 'dpm', 'swinddim': 'ddim'}[solver], steps,
                         self.given[f'{name}_t'], back, what)

    def window_row(self, steps, index, what):
        rows, index = self.given['swin2_grouped_t'], int(index)
        return self.step('dpm', steps, rows[index], rows[index - 1] if index else None, what)

    def step(self, solver, steps, level, back, what):
        following = level - self.cfg.train_steps // int(steps)
        history = self.video('old_pred') if back is not None else 0 * self.video('x')
        plan = (solvers.ddim(self.abar, level, following) if solver == 'ddim' else
                solvers.dpm(self.abar, level, following, back))
        x0, x = solvers.step(plan, history, self.video('x'), self.video('model_output'),
                             self.video('noise'))
        return _torch_video({'prev': x, 'x0': x0}[what])


STEPS = (
    (r'table_alphas_cumprod_\w+', lambda bench: bench.abar),
    (r'table_(trailing|leading|linspace)_timesteps_(\d+)', Bench.table),
    (r'table_lcm_timesteps_(\d+)_of_(\d+)', Bench.lcm_table),
    (r'table_grouped_(\d+)steps_(\d+)frames_(\d+)groups', Bench.grouped),
    (r'table_lcm_all_boundary_(\d+)', Bench.boundaries),
    (r'table_lcm_(\d+)_(\d+)_(\d+)_(boundary|cskip|cout)', Bench.lcm_coefficient),
    (r'lcm_(\d+)_(\d+)_(\d+)_(denoised|prev)', Bench.lcm_step),
    (r'(ddim|dpm|swin|swinddim|lcm)_(add_noise|velocity)', Bench.noised),
    (r'(ddim|dpm)_(\d+)_i(\d+)_(?:(first|second)_)?(prev|x0)', Bench.uniform),
    (r'(swin|swinddim)_(\d+)_([a-z]+)_(?:(first|second)_)?(prev|x0)', Bench.window),
    (r'swin2_(\d+)_row(\d+)_(prev|x0)', Bench.window_row),
)

REPLAYS: dict[tuple[str, str], Callable[[Record], dict]] = {
    (SYSTEM, 'transformer'): transformer,
    (SYSTEM, 'vae'): video_autoencoder,
    (SYSTEM, 'vae_stream'): vae_stream,
    (SYSTEM, 'vae_sliced_decode'): vae_sliced_decode,
    (SYSTEM, 'schedulers'): schedulers,
    (SYSTEM, 'swin'): swin_stream,
    (SYSTEM, 'text_to_video'): text_to_video,
    (SYSTEM, 'train_loss'): train_loss,
    (SYSTEM, 'embeddings'): embeddings,
    (SYSTEM, 't5_encoder'): t5_encoder,
    (SYSTEM, 'clip_text'): clip_text,
    (SYSTEM, 'control_signals'): control_signals,
}


# --- layouts and loading -------------------------------------------------------------------------


def _video(x):
    """Latents as the DiT of the reference has them: [... T C H W] -> [... T H W C]."""
    return np.moveaxis(np.asarray(x), -3, -1)


def _torch_video(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def _clip(x):
    """Frames or latents as its VAE has them: [B C T H W] -> [B T H W C]."""
    return rearrange(x, 'b c t h w -> b t h w c')


def _torch_clip(x):
    return rearrange(np.asarray(x), 'b t h w c -> b c t h w')


def _levels(levels):
    """Noise levels [B], [B T] or [B T 1 1 1] -> [B T]; T = 1 is one level for all frames."""
    return np.asarray(levels, np.int32).reshape(len(levels), -1)


def _ids(record: Record):
    return record.inputs['input_ids'].astype(np.int32)


def _symbols(told: Fields) -> np.ndarray:
    """Rows of the recorded control table that the recorded signal asks for."""
    keys = told['control_keys']
    return np.array([keys.index(symbol) for symbol in told['control_signal'].split(',')], np.int32)


def _dit(record: Record):
    cfg = dit.Config.from_released(record.config['cfg'])
    return cfg, convert.to_jax(dit.weights(cfg), record.weights, dit.shapes(cfg))


def _denoise(cfg: dit.Config):
    @jax.jit
    def denoise(params, x, level, text, control, guidance=None):
        return dit.DiT(cfg).apply({'params': params}, x, text, level, control, guidance)
    return denoise


def _vae(record: Record):
    """The VAE of a stage; a recording without encoder weights gets its decoder only."""
    cfg = vae.Config.from_released(record.config['cfg'])
    # PARITY: stages 1 and 2 decode one latent frame to one frame, stages 3 and 4 to four.
    frames = 1 if record.config['stage'] <= 2 else cfg.temporal_compression
    cfg = dataclasses.replace(cfg, single_latent_frames=frames)
    table, shapes = vae.weights(cfg), vae.shapes(cfg)
    if record.kind != 'vae' and not any(name.startswith('encoder.') for name in record.weights):
        table = [row for row in table if row.torch.startswith('decoder.')]
        shapes = {'decoder': shapes['decoder']}
    return cfg, convert.to_jax(table, record.weights, shapes)
