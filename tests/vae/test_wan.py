import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.parity.record import read
from matrix_jax.vae import wan as vae
from matrix_jax.weights import conversion
from tests.vae import drawn
from tests.vae.drawn import compiled, normal

GOLDEN = Path(__file__).parents[1] / 'goldens' / 'matrix_game_2' / 'e_vae.safetensors'
# Two frame sizes are the same code as four; the recording of test_parity has all four.
TINY = vae.PRESETS['tiny']
params_of = functools.partial(drawn.params_of, vae)


@functools.cache
def whole():
    """Six latent frames, and their frames decoded at once."""
    latents = normal(1, 6, 2, 3, 4)
    frames = np.asarray(compiled(vae.decode, TINY)(params_of(TINY), latents))
    assert frames.shape == (1, 1 + 2 * 5, 4, 6, 3) and np.std(frames) > 0.05
    return latents, frames


def test_prefill_and_scanned_steps_equal_the_whole_clip():
    latents, want = whole()

    def stream(params, latents):
        cache, head = vae.prefill(TINY, params, latents[:, :2])
        rest = jnp.stack([latents[:, 2:4], latents[:, 4:6]])
        # A scan, so the cache keeps structure and shapes.
        _, tail = jax.lax.scan(lambda cache, part: vae.step(TINY, params, cache, part), cache, rest)
        return jnp.concatenate([head, *tail], axis=1)

    np.testing.assert_allclose(jax.jit(stream)(params_of(TINY), latents), want, atol=2e-5)


def test_step_compiles_once_and_the_cache_matters():
    (latents, want), params, count = whole(), params_of(TINY), []

    @jax.jit
    def step(params, cache, latents):
        count.append(1)
        return vae.step(TINY, params, cache, latents)

    cache, first = compiled(vae.prefill, TINY)(params, latents[:, :1])
    empty = jax.tree.map(jnp.zeros_like, cache)
    frames = [first]
    for index in range(1, 6):
        cache, made = step(params, cache, latents[:, index : index + 1])
        frames.append(made)
    np.testing.assert_allclose(np.concatenate(frames, axis=1), want, atol=2e-5)
    _, alone = step(params, empty, latents[:, 5:])
    assert len(count) == 1
    assert np.abs(alone - want[:, -2:]).max() > 1e-2


@pytest.mark.parametrize('chunk', [1, 2])
def test_the_chunk_length_does_not_change_the_result(chunk):
    latents, want = whole()
    cfg = dataclasses.replace(TINY, chunk=chunk)
    got = jax.jit(functools.partial(vae.decode, cfg))(params_of(TINY), latents)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_decoder_is_causal():
    latents, want = whole()
    changed = latents.copy()
    changed[:, 3] += 1
    got = np.asarray(compiled(vae.decode, TINY)(params_of(TINY), changed))
    np.testing.assert_array_equal(got[:, :5], want[:, :5])
    assert (np.abs(got - want)[:, 5:].max((0, 2, 3, 4)) > 1e-3).all()


def test_encoder_continues_where_it_stopped():
    params, frames = params_of(TINY), normal(2, 9, 4, 6, 3)
    want, logvar = compiled(vae.encode, TINY)(params, frames)
    step = compiled(vae.encode_step, TINY)
    cache, head, _ = step(params, None, frames[:, :5])
    _, tail, _ = step(params, cache, frames[:, 5:])
    assert want.shape == logvar.shape == (2, 5, 2, 3, 4)
    np.testing.assert_allclose(np.concatenate([head, tail], axis=1), want, atol=2e-5)
    # The first latent frame is the first frame; the clips of a batch do not meet.
    frames[:, 1:] += 1
    frames[1] += 1
    got = compiled(vae.encode, TINY)(params, frames)[0]
    np.testing.assert_array_equal(got[0, 0], want[0, 0])
    assert np.abs(got[0, 1] - want[0, 1]).max() > 1e-3


@pytest.mark.parametrize(('frames', 'latents'), [(1, 1), (5, 2), (13, 4)])
def test_lengths_of_clips(frames, latents):
    cfg = dataclasses.replace(TINY, multiples=(1, 1, 2, 2), halves_time=(False, True, True))
    shapes = vae.shapes(cfg)
    made = jax.eval_shape(
        functools.partial(vae.encode, cfg), shapes, jnp.zeros((1, frames, 16, 8, 3))
    )
    assert [one.shape for one in made] == [(1, latents, 2, 1, 4)] * 2
    cache, back = jax.eval_shape(functools.partial(vae.prefill, cfg), shapes, made[0])
    assert back.shape == (1, frames, 16, 8, 3)
    same, more = jax.eval_shape(functools.partial(vae.step, cfg), shapes, cache, made[0])
    assert more.shape == (1, 4 * latents, 16, 8, 3)
    assert same == cache


def test_patched_frames_are_stacked_pixels():
    frames = normal(1, 2, 4, 6, 3)
    # Channel by channel; of its four pixels those of a column first.
    want = np.stack([frames[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
    stacked = vae.patched(frames, 2)
    np.testing.assert_array_equal(stacked, want.reshape(1, 2, 2, 3, 12))
    np.testing.assert_array_equal(vae.unpatched(stacked, 2), frames)
    cfg = dataclasses.replace(TINY, patch_size=2)
    latents = jax.eval_shape(
        functools.partial(vae.encode, cfg), vae.shapes(cfg), jnp.zeros((1, 3, 8, 12, 3))
    )[0]
    assert latents.shape == (1, 2, 2, 3, 4)
    made = jax.eval_shape(functools.partial(vae.decode, cfg), vae.shapes(cfg), latents)
    assert made.shape == (1, 3, 8, 12, 3)


def test_scaled_latents_are_standard():
    cfg = dataclasses.replace(TINY, latent_means=(1, 2, 3, 4), latent_stds=(1, 2, 4, 8))
    latents = normal(1, 2, 2, 2, 4)
    np.testing.assert_allclose(
        vae.scaled(cfg, latents), (latents - [1, 2, 3, 4]) / [1, 2, 4, 8], atol=1e-6
    )
    np.testing.assert_allclose(vae.unscaled(cfg, vae.scaled(cfg, latents)), latents, atol=1e-6)
    np.testing.assert_array_equal(vae.scaled(TINY, latents), latents)


def test_half_precision_stays_close():
    half = dataclasses.replace(TINY, dtype='bfloat16')
    latents, want = whole()
    cache, frames = jax.jit(functools.partial(vae.prefill, half))(params_of(TINY), latents)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}
    assert frames.dtype == jnp.float32
    assert np.abs(frames - want).mean() < 0.1 * np.std(want)


def test_weights_and_config_survive_the_round_trip():
    record = read(GOLDEN)
    weights, cfg = record.weights, vae.Config(dim=record.config['dim'])
    table, shapes = vae.weights(cfg), vae.shapes(cfg)
    back = conversion.to_torch(table, conversion.to_jax(table, weights, shapes))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in back)
    assert vae.Config.from_released(json.loads(json.dumps(cfg.to_released()))) == cfg
    weights['decoder.upsamples.3.time.bias'] = weights.pop('decoder.upsamples.3.time_conv.bias')
    with pytest.raises(conversion.ConversionError) as error:
        conversion.to_jax(table, weights, shapes)
    assert 'missing key decoder.upsamples.3.time_conv.bias' in str(error.value)
    assert 'unknown key decoder.upsamples.3.time.bias' in str(error.value)


def test_released_sizes():
    cfg = vae.PRESETS['wan_2_1']
    rows = [row for row in vae.weights(cfg) if isinstance(row, conversion.Row)]
    assert len(rows) == 194
    assert sum(leaf.size for leaf in jax.tree.leaves(vae.shapes(cfg))) == 126_892_531
    assert (cfg.spatial_compression, cfg.temporal_compression, cfg.settled) == (8, 4, 29)


@pytest.mark.parametrize(
    ('preset', 'encoder', 'decoder'),
    [
        ('wan_2_2', 149_627_776, 555_049_228),
        ('light', 149_627_776, 139_128_972),
        ('light_v2', 149_627_776, 34_965_580),
    ],
)
def test_released_sizes_of_2_2(preset, encoder, decoder):
    cfg = vae.PRESETS[preset]
    shapes = vae.shapes(cfg)
    # The published counts leave out the two that only mix the channels of latents.
    counts = [
        sum(
            leaf.size
            for path, leaf in conversion.flatten(shapes[part]).items()
            if not path.startswith(('moments', 'latents'))
        )
        for part in ('encoder', 'decoder')
    ]
    assert counts == [encoder, decoder]
    assert (cfg.spatial_compression, cfg.temporal_compression) == (16, 4)
    assert vae.Config.from_released(json.loads(json.dumps(cfg.to_released()))) == cfg
    paths = {row.path for row in vae.weights(cfg) if isinstance(row, conversion.Row)}
    assert paths == set(conversion.flatten(shapes))


def test_the_bundled_autoencoder_is_small():
    cfg = vae.PRESETS['doom']
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(vae.shapes(cfg))) < 4e6
    assert (cfg.spatial_compression, cfg.temporal_compression, cfg.settled) == (8, 4, 20)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'dropout': 0.1}, r'dropout = 0.1 \(expected 0.0\)'),
        ({'new_maths': 2}, r'new_maths = 2 \(unknown key\)'),
        ({'temperal_downsample': [True, True]}, 'halves_time: got 2 values, expected 1'),
        (
            {'latents_mean': [1.0]},
            'latent_means: got 1 numbers, expected none, or one for each of the',
        ),
        (
            {'latents_std': [1.0, 0.0, 1.0, 1.0]},
            r'latent_stds: got \(1.0, 0.0, 1.0, 1.0\), expected more than 0',
        ),
        ({'dim': 5, 'dim_mult': [1, 1]}, 'a decoder level of 5 channels, expected an even'),
        ({'num_res_blocks': 0}, 'vae.layers: got 0, expected at least 1'),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vae.Config.from_released(TINY.to_released() | change)


def test_bad_inputs_are_refused():
    for frames in ((1, 4, 4, 4, 3), (1, 5, 6, 5, 3), (1, 0, 4, 4, 3), (1, 5, 4, 4, 1)):
        with pytest.raises(ValueError, match=r'expected \[B F H W 3\] with F = 1 \+ 2k and H, W'):
            vae.encode(TINY, None, np.zeros(frames))
    with pytest.raises(ValueError, match=r'F = 0 \+ 2k'):
        vae.encode_step(TINY, None, {}, np.zeros((1, 5, 4, 4, 3)))
    for latents in ((1, 2, 2, 8), (1, 2, 2, 2, 3), (1, 0, 2, 2, 4)):
        with pytest.raises(ValueError, match=r'expected \[B T h w 4\] with T > 0'):
            vae.decode(TINY, None, np.zeros(latents))


def test_files_of_light_decoders_have_other_names():
    """As published: diffusers-like names, and heads that only training used."""
    cfg = dataclasses.replace(
        vae.PRESETS['light_v2'],
        dim=4,
        decoder_dim=2,
        latent_channels=4,
        latent_means=(),
        latent_stds=(),
    )
    table, params = vae.weights(cfg), vae.init(cfg, 0)
    known = conversion.to_torch(table, params)
    assert known['decoder.upsamples.3.upsamples.0.shortcut.weight'].shape == (2, 4, 1, 1, 1)
    renames = [entry for entry in table if isinstance(entry, conversion.Rename)]
    back = [conversion.Rename(entry.known, entry.torch) for entry in renames]
    light = {}
    for key, part in known.items():
        found = {rename.name(key) for rename in back} - {None}
        # Names such as 'conv1' stand in the file for another tensor than in the table.
        theirs = [
            name
            for name in found
            if next(filter(None, (entry.name(name) for entry in renames))) == key
        ]
        assert len(theirs) == 1, (key, found)
        light[theirs[0]] = part
    assert {
        'quant_conv.weight',
        'post_quant_conv.bias',
        'decoder.conv_in.weight',
        'decoder.norm_out.gamma',
        'decoder.mid_block.attentions.0.to_qkv.weight',
        'decoder.up_blocks.0.upsampler.time_conv.weight',
        'encoder.conv_out.bias',
        'encoder.down_blocks.1.downsampler.resample.1.weight',
        'encoder.down_blocks.1.resnets.0.conv_shortcut.weight',
    } <= set(light)
    light['dynamic_feature_projection_heads.0.weight'] = np.zeros(3, np.float32)
    got = conversion.to_jax(table, light, vae.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, got, params)
