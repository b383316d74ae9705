"""Whole clips of plain Wan 2.2, and weights in the layouts of Wan and of diffusers."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from matrix_jax import recipes, video, worlds
from matrix_jax.cli import main as command_line
from matrix_jax.config import UsageError
from matrix_jax.dit.wan_rows import diffusers_names
from matrix_jax.vae import wan as vae
from matrix_jax.weights import conversion, converter, diffusers_layout

RECIPE = 'matrix_game_3:TINY_WAN'


def config(name='TINY_WAN'):
    return recipes.load(f'matrix_game_3:{name}').world


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp('weights') / 'tiny'
    converter.write_random(config(), str(target), seed=0)
    return target


def generate(folder, out, *options):
    command_line.dispatch(
        ['generate', RECIPE, '--weights', str(folder), '--out', str(out), *options]
    )


@pytest.fixture(scope='module')
def clips(folder, start_image, tmp_path_factory):
    """Videos of the prompt alone, and of a picture; each compiles once."""
    out = tmp_path_factory.mktemp('clips')
    generate(folder, out / 'text.mp4', '--prompt', 'A castle', '--seed', '1')
    generate(folder, out / 'image.mp4', '--prompt', 'A castle', '--image', str(start_image))
    return {name: video.read_video(out / f'{name}.mp4', fps=17) for name in ('text', 'image')}


def test_a_clip_comes_from_a_prompt_with_or_without_a_picture(clips):
    """The longest clip has five latent frames; no keys are drawn on it."""
    assert {len(clip) for clip in clips.values()} == {17}
    assert clips['text'].std() > 5 and (clips['text'] != clips['image']).any()


def test_the_first_frame_is_the_picture_and_inputs_matter(folder):
    cfg = dataclasses.replace(config(), height=8, width=8)
    world = worlds.describe(cfg, folder, whole=True).with_tokenizers(folder)
    params = world.load(folder)
    picture = np.random.default_rng(0).integers(0, 255, (1, 20, 30, 3), np.uint8)
    make = jax.jit(world.sample_clip)

    def clip(prompt='A castle', seed=0, picture=picture):
        given, _ = world.inputs(prompt, world.fit(picture), ['idle'] * 9)
        return np.asarray(make(params, *given, jax.random.key(seed))).astype(int)

    made = clip()
    assert made.shape == (1, 9, 8, 8, 3)
    latents = jax.jit(world.encode_frames)(params, world.fit(picture)[None])
    decoded = jax.jit(functools.partial(vae.decode, world.cfg.vae))(
        params['vae'], vae.unscaled(world.cfg.vae, latents)
    )
    assert np.abs(made[:, :1] - np.asarray(world.to_uint8(decoded))).max() <= 1
    np.testing.assert_array_equal(made, clip())
    assert (made[:, :1] == clip(seed=1)[:, :1]).all() and (made != clip(seed=1)).any()
    assert (made != clip(prompt='A desert')).any() and (made != clip(picture=255 - picture)).any()


def in_diffusers(names):
    """Names of a state dict as diffusers has them."""
    found = {}
    for name in names:
        renames = (conversion.Rename(one.known, one.torch).name(name) for one in diffusers_names())
        found[name] = next(filter(None, renames), name)
    return found


def test_folders_of_wan_and_of_diffusers_are_read_strictly(folder, tmp_path):
    cfg = config()
    want = conversion.flatten(worlds.describe(cfg, folder, whole=True).load(folder))
    released, tensors = diffusers_layout.read_component(folder, 'transformer')
    names = in_diffusers(tensors)
    assert names['blocks.0.cross_attn.o.weight'] == 'blocks.0.attn2.to_out.0.weight'
    assert names['time_embedding.0.bias'] == 'condition_embedder.time_embedder.linear_1.bias'

    def beside(place):
        place.mkdir()
        for name in ('vae', 'text_encoder', 'tokenizer'):
            (place / name).symlink_to(folder / name)
        return place

    def equal(place):
        world = worlds.describe(cfg, place, whole=True)
        made = conversion.flatten(world.load(place))
        assert world.cfg == cfg and set(made) == set(want)
        assert all(np.array_equal(made[path], want[path]) for path in want)

    theirs = beside(tmp_path / 'wan')
    # Wan keeps the transformer beside the folders of the other parts.
    for file in (folder / 'transformer').iterdir():
        (theirs / file.name).symlink_to(file)
    equal(theirs)

    place = beside(tmp_path / 'diffusers')
    (place / 'vae').unlink()
    net, code = cfg.dit, cfg.vae
    diffusers_layout.write_component(
        place,
        'transformer',
        {
            '_class_name': 'WanTransformer3DModel',
            'added_kv_proj_dim': None,
            'attention_head_dim': net.head_dim,
            'cross_attn_norm': True,
            'eps': net.eps,
            'ffn_dim': net.mlp,
            'freq_dim': net.time_dim,
            'image_dim': None,
            'in_channels': net.channels,
            'num_attention_heads': net.heads,
            'num_layers': net.layers,
            'out_channels': net.channels,
            'patch_size': [1, 2, 2],
            'qk_norm': 'rms_norm_across_heads',
            'rope_max_seq_len': 1024,
            'text_dim': net.text_dim,
            'text_len': net.text_length,
        },
        {names[name]: tensors[name] for name in tensors},
        dtype=None,
    )
    diffusers_layout.write_component(
        place,
        'vae',
        {
            '_class_name': 'AutoencoderKLWan',
            'base_dim': code.dim,
            'decoder_base_dim': None,
            'z_dim': code.latent_channels,
            'dim_mult': list(code.multiples),
            'num_res_blocks': code.layers,
            'temperal_downsample': list(code.halves_time),
            'is_residual': True,
            'in_channels': 3,
            'out_channels': 3,
            'patch_size': None,
            'latents_mean': [],
            'latents_std': [],
            'scale_factor_spatial': 4,
        },
        diffusers_layout.read_component(folder, 'vae')[1],
        dtype=None,
    )
    equal(place)

    bad = place / 'transformer' / 'config.json'
    content = json.loads(bad.read_text())
    bad.write_text(json.dumps(content | {'image_dim': 1280}))
    with pytest.raises(diffusers_layout.CheckpointError, match='image_dim = 1280'):
        worlds.describe(cfg, place, whole=True)
    bad.write_text(json.dumps(content))
    kept = {names[name]: tensors[name] for name in tensors if 'norm3' not in name}
    diffusers_layout.write_component(place, 'transformer', content, kept, dtype=None)
    with pytest.raises(conversion.ConversionError, match=r'blocks\.0\.norm3'):
        worlds.describe(cfg, place, whole=True).load(place)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--actions', 'W*5'], "unknown action 'W' of no_actions; expected idle"),
        (['--length', '2'], '--length: got 2, expected at most 1: this model makes whole clips'),
        (['--iterations', '2'], '--iterations: this model makes whole clips'),
        (['--prompt', 'a', '--image', 'none.png'], 'none.png: no such file'),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        generate(folder, tmp_path / 'no.mp4', *options)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_clip_is_not_played(folder):
    from matrix_jax.serve.runtime.batched_stream import BatchedStream

    with pytest.raises(UsageError, match='this model makes whole clips'):
        BatchedStream(worlds.describe(config(), folder, whole=True), {}, 1)


def test_the_published_size():
    cfg = config('WAN')
    world = worlds.build(cfg)
    assert world.controls_for_seconds(5) == 121 and world.max_seconds == 5
    assert (cfg.fps, cfg.clip.solver.steps, cfg.clip.guidance) == (24, 50, 5.0)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'world.clip.guidance': 0.5}, 'clip.guidance: got 0.5'),
        ({'world.clip.longest': 0}, 'clip.longest: got 0'),
        ({'world.dit.memory': True}, 'got whole clips of a network with memory or actions'),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        recipes.change(recipes.load(RECIPE), fields)
