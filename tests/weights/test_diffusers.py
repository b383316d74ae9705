"""Files of the installed diffusers, transformers and peft open here, and compute the same.

Tiny models are saved by these libraries, so a key or a name that a new release writes shows here.
"""

import dataclasses
import functools
import inspect
import json
import os

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.cli.convert import unpickle
from matrix_jax.config import UsageError
from matrix_jax.dit import cogvideox, wan_memory
from matrix_jax.encoders import clip, clip_image, t5
from matrix_jax.nn import lora
from matrix_jax.vae import cogvideox as cogvideox_vae
from matrix_jax.vae import wan as wan_vae
from matrix_jax.weights import conversion, diffusers_layout
from matrix_jax.worlds.weights_folders import read_config

torch = pytest.importorskip('torch', reason='made by torch: pip install matrix_jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='made by diffusers: pip install diffusers')
transformers = pytest.importorskip('transformers')

COG = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4)
COG |= dict(time_embed_dim=24, text_embed_dim=20, num_layers=2, max_text_seq_length=7)
COG |= dict(sample_width=12, sample_height=8, sample_frames=17)
COG_VAE = dict(block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1)
COG_VAE |= dict(norm_num_groups=2, sample_height=32, sample_width=48)
TEXT = dict(vocab_size=259, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32)
CLIP = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
CLIP_TEXT = CLIP | dict(vocab_size=514, num_hidden_layers=2, projection_dim=16, eos_token_id=513)
CLIP_TEXT |= dict(bos_token_id=512, pad_token_id=513)
CLIP_IMAGE = CLIP | dict(num_hidden_layers=3, image_size=28, patch_size=14, hidden_act='gelu')
WAN = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
WAN |= dict(text_dim=20, freq_dim=16, ffn_dim=32, num_layers=2)
WAN_VAE = dict(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
WAN_VAE |= dict(latents_mean=[0.1, 0, 0, -0.2], latents_std=[1.0, 2, 1, 1])
WAN_2_2 = dict(dim_mult=[1, 2, 2], temperal_downsample=[False, True], decoder_base_dim=4)
WAN_2_2 = WAN_VAE | WAN_2_2 | dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12)


def model(kind, **sizes):
    """A model with random weights, none of them zero."""
    torch.manual_seed(0)
    made = kind(**sizes) if sizes else kind
    for tensor in made.parameters():
        tensor.data += 0.1 * torch.randn_like(tensor)
    return made.eval()


def opened(kind, module, made, folder, **options):
    """(config, parameters) of a saved model, through the door of every world."""
    made.save_pretrained(folder / 'part', **options)
    cfg = read_config(kind, str(folder), 'part')
    tensors = diffusers_layout.Tensors(folder / 'part')
    return cfg, conversion.to_jax(module.weights(cfg), tensors, module.shapes(cfg))


def channels_last(tensor):
    return tensor.detach().float().numpy().transpose(0, 2, 3, 4, 1)


def channels_first(array):
    return torch.tensor(np.asarray(array)).permute(0, 4, 1, 2, 3)


def close(got, want):
    want = want.detach().numpy() if torch.is_tensor(want) else want
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got) / scale, want / scale, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision('highest'), torch.no_grad():
        yield


def jitted(function, cfg):
    return jax.jit(functools.partial(function, cfg))


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def cogvideox_model():
    return model(diffusers.CogVideoXTransformer3DModel, **COG)


def run_cogvideox(cfg, params):
    x, text = draw(1, 3, 4, 6, 4), draw(1, 7, 20)
    run = jax.jit(cogvideox.CogVideoXTransformer(cfg).apply, static_argnums=4)
    return run({'params': params}, x, text, np.full((1, 3), 300), None)


def test_cogvideox_transformer(tmp_path, cogvideox_model):
    cfg, params = opened(cogvideox.Config, cogvideox, cogvideox_model, tmp_path)
    x = torch.tensor(draw(1, 3, 4, 6, 4)).permute(0, 1, 4, 2, 3)
    want = cogvideox_model(x, torch.tensor(draw(1, 7, 20)), torch.tensor([300])).sample
    close(run_cogvideox(cfg, params), want.permute(0, 1, 3, 4, 2))


def test_cogvideox_autoencoder(tmp_path):
    made = model(diffusers.AutoencoderKLCogVideoX, **COG_VAE)
    cfg, params = opened(cogvideox_vae.Config, cogvideox_vae, made, tmp_path)
    video = np.clip(draw(1, 5, 16, 24, 3), -1, 1)
    latents = made.encode(channels_first(video)).latent_dist.mean
    close(jitted(cogvideox_vae.encode, cfg)(params, video)[0], channels_last(latents))
    want = channels_last(made.decode(latents).sample)
    close(jitted(cogvideox_vae.decode, cfg)(params, channels_last(latents)), want)


@pytest.mark.parametrize('version', [WAN_VAE, WAN_2_2], ids=['2.1', '2.2'])
def test_wan_autoencoder(tmp_path, version):
    made = model(diffusers.AutoencoderKLWan, **version)
    cfg, params = opened(wan_vae.Config, wan_vae, made, tmp_path)
    assert cfg.latent_stds == (1, 2, 1, 1)
    video = np.clip(draw(1, 5, 16, 16, 3), -1, 1)
    latents = made.encode(channels_first(video)).latent_dist.mean
    close(jitted(wan_vae.encode, cfg)(params, video)[0], channels_last(latents))
    got = np.clip(jitted(wan_vae.decode, cfg)(params, channels_last(latents)), -1, 1)
    close(got, channels_last(made.decode(latents).sample))


def test_wan_transformer(tmp_path):
    made = model(diffusers.WanTransformer3DModel, **WAN)
    cfg, params = opened(wan_memory.Config, wan_memory, made, tmp_path)
    x, text = draw(1, 3, 4, 6, 4), draw(1, 512, 20)
    want = made(channels_first(x), torch.tensor([300]), torch.tensor(text)).sample
    run = jax.jit(wan_memory.WanMemoryTransformer(cfg).apply)
    got = run({'params': params}, x, np.full((1, 3), 300.0), text, np.arange(3))
    close(got, channels_last(want))


@pytest.mark.parametrize('name', ['T5', 'UMT5'])
def test_t5(tmp_path, name):
    config = getattr(transformers, f'{name}Config')(**TEXT, feed_forward_proj='gated-gelu')
    made = model(getattr(transformers, f'{name}EncoderModel')(config))
    cfg, params = opened(t5.Config, t5, made, tmp_path)
    ids = np.arange(9)[None] * 7
    want = made(torch.tensor(ids)).last_hidden_state
    close(t5.T5Encoder(cfg).apply({'params': params}, ids), want)


def test_t5_with_only_the_embedding_of_its_encoder(tmp_path):
    config = transformers.T5Config(**TEXT, feed_forward_proj='gated-gelu')
    cfg, params = opened(t5.Config, t5, model(transformers.T5EncoderModel(config)), tmp_path)
    tensors = conversion.to_torch(t5.weights(cfg), params)
    tensors['encoder.embed_tokens.weight'] = tensors.pop('shared.weight')
    again = conversion.to_jax(t5.weights(cfg), tensors, t5.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize('name', ['CLIPTextModelWithProjection', 'CLIPTextModel'])
def test_clip_text(tmp_path, name):
    made = model(getattr(transformers, name)(transformers.CLIPTextConfig(**CLIP_TEXT)))
    cfg, params = opened(clip.Config, clip, made, tmp_path)
    ids = np.array([[512, 5, 7, 9, 513, 513]])
    want = made(torch.tensor(ids))
    want = want.text_embeds if name.endswith('Projection') else want.pooler_output
    close(clip.TextTower(cfg).apply({'params': params}, ids), want)


@pytest.mark.parametrize('name', ['CLIPVisionModel', 'CLIPVisionModelWithProjection'])
def test_clip_image(tmp_path, name):
    made = model(getattr(transformers, name)(transformers.CLIPVisionConfig(**CLIP_IMAGE)))
    cfg, params = opened(clip_image.Config, clip_image, made, tmp_path)
    image = draw(1, 28, 28, 3)
    shown = torch.tensor(image).permute(0, 3, 1, 2)
    want = made(shown, output_hidden_states=True).hidden_states[-2]
    close(clip_image.ImageTower(cfg).apply({'params': params}, image), want)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', ['10GB', '40KB'], ids=['plain', 'sharded'])
def test_variants(tmp_path, cogvideox_model, size):
    options = dict(variant='fp16', max_shard_size=size)
    cfg, params = opened(cogvideox.Config, cogvideox, cogvideox_model, tmp_path, **options)
    files = sorted(os.listdir(tmp_path / 'part'))
    assert any('fp16' in name for name in files) and (len(files) > 2) == (size == '40KB')
    found = conversion.to_torch(cogvideox.weights(cfg), params)
    for name, tensor in cogvideox_model.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize('scale', [None, (), (32,), (32, 1), (2, 2)])
def test_8_bit_floats(tmp_path, cogvideox_model, scale):
    from safetensors.torch import save_file

    cogvideox_model.save_pretrained(tmp_path / 'part')
    tensors, want = dict(cogvideox_model.state_dict()), {}
    for name, tensor in tensors.copy().items():
        if tensor.shape != (32, 32):
            continue
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        want[name] = tensors[name].float()
        if scale is not None:
            factor = 0.5 + torch.rand(scale)
            tensors[name.replace('.weight', '.weight_scale')] = factor
            wide = factor
            if scale == (2, 2):
                wide = factor.repeat_interleave(16, 0).repeat_interleave(16, 1)
            want[name] *= wide[:, None] if scale == (32,) else wide
    save_file(tensors, tmp_path / 'part' / 'diffusion_pytorch_model.safetensors')
    cfg = read_config(cogvideox.Config, str(tmp_path), 'part')
    stored = diffusers_layout.Tensors(tmp_path / 'part')
    found = conversion.to_jax(cogvideox.weights(cfg), stored, cogvideox.shapes(cfg))
    found = conversion.to_torch(cogvideox.weights(cfg), found)
    assert len(want) == 8
    for name, tensor in want.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), tensor.numpy())


@pytest.mark.parametrize('ending', ['.pt', '.ckpt'])
@pytest.mark.parametrize(
    'nested',
    [
        lambda state: state,
        lambda state: {'generator': {}, 'generator_ema': state, 'step': 1},
        lambda state: {'module': state, 'global_step': 1},
        lambda state: {**state, 'step': 1},
        lambda state: {f'module.{name}': tensor for name, tensor in state.items()},
        lambda state: {'model': {f'_orig_mod.{name}': one for name, one in state.items()}},
    ],
    ids=range(6),
)
def test_pickles_as_people_have_them(tmp_path, nested, ending):
    state = {'a.weight': torch.ones(2, 3), 'b': torch.zeros(4)}
    torch.save(nested(state), tmp_path / f'a{ending}')
    unpickle(tmp_path / f'a{ending}', tmp_path / 'a.safetensors')
    _, found = diffusers_layout.read_file(tmp_path / 'a.safetensors')
    assert found.keys() == state.keys() and found['a.weight'].tolist() == [[1.0] * 3] * 2


def test_pickles_without_weights_are_refused(tmp_path):
    torch.save({'step': 1, 'list': [torch.ones(2)]}, tmp_path / 'a.pt')
    with pytest.raises(UsageError, match='not a pickle of tensors alone .it holds step, list'):
        unpickle(tmp_path / 'a.pt', tmp_path / 'a.safetensors')


# --- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize('dynamic', [True, False])
def test_an_export_without_control_is_a_pipeline_that_makes_the_same_video(
    tmp_path, dynamic, caplog
):
    run = recipes.load('the_matrix:TINY_CLIP')
    dit = dataclasses.replace(run.world.dit, control=None, layers=2)
    sampler = dataclasses.replace(run.world.clip, dynamic_guidance=dynamic)
    cfg = dataclasses.replace(run.world, dit=dit, clip=sampler)
    made = worlds.build(cfg)
    parts = ('transformer', 'vae', 'text_encoder')
    made.save(str(tmp_path), made.init(0, zero_init=False, only=parts), dtype=None)
    run = dataclasses.replace(run, world=cfg, weights=str(tmp_path))
    world, params = worlds.open_run(run)
    ids, symbols, key = world.tokenize(['a road']), np.zeros((1, 3), np.int32), jax.random.key(0)
    ours = jax.jit(world.sample_clip).lower(params, ids, symbols, key)
    quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    ours = np.asarray(ours.compile(compiler_options=quick)(params, ids, symbols, key))[0]

    pipe = diffusers.CogVideoXPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    for name in ('vae', 'transformer', 'scheduler'):  # diffusers knows every key of the configs
        file = 'scheduler_config.json' if name == 'scheduler' else 'config.json'
        written = {key for key in json.loads((tmp_path / name / file).read_text()) if key[0] != '_'}
        assert written <= set(inspect.signature(type(getattr(pipe, name))).parameters)
    height, width = cfg.height // 8, cfg.width // 8
    noise = jax.random.normal(jax.random.fold_in(key, 0), (1, 3, height, width, 4))
    theirs = pipe(
        prompt='a road',
        height=cfg.height,
        width=cfg.width,
        num_frames=9,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        use_dynamic_cfg=dynamic,
        latents=torch.tensor(np.asarray(noise)).permute(0, 1, 4, 2, 3),
        max_sequence_length=cfg.dit.text_length,
        output_type='np',
    ).frames[0]
    assert ours.shape == theirs.shape and ours.std() > 20
    # Levels that lie between two whole numbers may be rounded differently.
    apart = np.abs(np.round(theirs * 255) - ours)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


# --- adapters ------------------------------------------------------------------------------------

Q = 'transformer_blocks.0.attn1.to_q'


@pytest.mark.parametrize(
    'settings',
    [
        dict(target_modules=['to_q', 'to_k']),
        dict(target_modules='all-linear'),
        dict(target_modules=['proj', 'proj_out', 'text_proj']),
        dict(target_modules=['to_q', 'to_k'], alpha_pattern={Q: 32}),
        dict(target_modules=['to_q'], alpha_pattern={r'transformer_blocks\.[01]\.attn1\.to_q': 32}),
        dict(target_modules=['to_q', 'to_v'], alpha_pattern={r'.*blocks\.0\..*': 32}),
        dict(target_modules=['to_q'], alpha_pattern={'attn1.to_q': 16, Q: 64}),
        dict(target_modules=['to_q', 'to_v'], rank_pattern={'.*to_v': 2}, use_rslora=True),
        dict(target_modules=['to_q'], init_lora_weights='gaussian'),
        dict(target_modules=['to_q'], init_lora_weights='orthogonal'),
        dict(target_modules=['to_q'], init_lora_weights='pissa'),
        dict(target_modules=['to_q'], init_lora_weights='olora'),
        dict(target_modules=['to_q'], use_dora=True),
        dict(target_modules=['to_q'], lora_bias=True),
    ],
    ids=range(14),
)
def test_adapters_merge_as_in_peft(tmp_path, settings):
    peft = pytest.importorskip('peft', reason='made by peft: pip install peft')
    base = model(diffusers.CogVideoXTransformer3DModel, **COG)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    for name, tensor in wrapped.named_parameters():
        if 'lora_B' in name and settings.get('init_lora_weights') not in ('pissa', 'olora'):
            tensor.data = torch.randn_like(tensor) * 0.1
    wrapped.save_pretrained(tmp_path)
    cfg = cogvideox.Config.from_released(dict(base.config))
    table, shapes = cogvideox.weights(cfg), cogvideox.shapes(cfg)
    start = settings.get('init_lora_weights')
    if settings.get('use_dora') or settings.get('lora_bias') or start in ('pissa', 'olora'):
        with pytest.raises(conversion.ConversionError, match='DoRA|lora_bias|init_lora_weights'):
            lora.read(tmp_path, table, shapes)
        return
    params = conversion.to_jax(table, {name: one.numpy() for name, one in before.items()}, shapes)
    merged = lora.merge(params, lora.read(tmp_path, table, shapes))
    got = conversion.to_torch(table, jax.tree.map(np.asarray, merged))
    want = wrapped.merge_and_unload().state_dict()
    assert any((want[name] != before[name]).any() for name in before)
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor.numpy(), rtol=0, atol=1e-5, err_msg=name)
    again = lora.write(tmp_path / 'again' / lora.FILE, lora.read(tmp_path, table, shapes), table)
    both = [lora.read(path, table, shapes) for path in (tmp_path, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *both)


def test_config_keys_of_the_next_release_are_refused(tmp_path, cogvideox_model):
    cogvideox_model.save_pretrained(tmp_path / 'part')
    path = tmp_path / 'part' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'new_option': 1}))
    with pytest.raises(diffusers_layout.CheckpointError, match='new_option = 1 .unknown key'):
        read_config(cogvideox.Config, str(tmp_path), 'part')
