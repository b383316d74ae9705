import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.parity.record import read
from matrix_jax.vae import cogvideox as vae
from matrix_jax.vae import cogvideox_layers as layers
from matrix_jax.vae import resampling
from matrix_jax.vae.tiling import Tiles, tiled, windowed
from matrix_jax.weights import conversion
from tests.vae import drawn
from tests.vae.drawn import compiled, normal

GOLDENS = Path(__file__).parents[1] / 'goldens' / 'the_matrix'
# Compiling is what takes time here: two levels are the same code as four. The recordings of
# test_parity have all four.
SMALL = vae.Config(
    latent_channels=4,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_groups=2,
    temporal_compression=2,
    single_latent_frames=2,
    sample_height=16,
    sample_width=24,
)
params_of = functools.partial(drawn.params_of, vae)


TINY = vae.PRESETS['tiny']


def golden(case):
    """Released config and weights of a recording (test_parity compares its outputs)."""
    record = read(GOLDENS / f'{case}.safetensors')
    return record.config['cfg'], record.weights


def test_prefill_and_scanned_steps_equal_the_whole_clip():
    params, latents, traces = params_of(SMALL), normal(1, 7, 2, 3, 4), []

    def stream(params, latents):
        def body(cache, part):
            traces.append(part.shape)
            return vae.step(SMALL, params, cache, part)

        cache, head = vae.prefill(SMALL, params, latents[:, :3])
        rest = jnp.stack([latents[:, 3:5], latents[:, 5:7]])
        _, tail = jax.lax.scan(body, cache, rest)  # so the cache keeps structure and shapes
        return jnp.concatenate([head, *tail], axis=1)

    whole = compiled(vae.decode, SMALL)(params, latents)
    assert whole.shape == (1, 2 * 7 - 1, 4, 6, 3)
    np.testing.assert_allclose(jax.jit(stream)(params, latents), whole, atol=2e-5)
    assert len(set(traces)) == 1
    assert np.std(whole) > 0.05


def test_step_compiles_once_and_is_causal():
    count = []

    @jax.jit
    def step(params, cache, latents):
        count.append(1)
        return vae.step(SMALL, params, cache, latents)

    params, latents = params_of(SMALL), normal(1, 4, 2, 3, 4)
    cache, first = compiled(vae.prefill, SMALL)(params, latents[:, :1])
    frames = [first]
    for index in range(1, 4):
        cache, made = step(params, cache, latents[:, index : index + 1])
        frames.append(made)
    assert len(count) == 1
    assert [one.shape[1] for one in frames] == [2, 2, 2, 2]
    # The cache matters: the same latent frame after another past makes other frames.
    _, alone = compiled(vae.prefill, SMALL)(params, latents[:, 3:])
    assert not np.allclose(frames[-1], alone, atol=1e-3)


def test_encoder_continues_where_it_stopped():
    params, frames = params_of(SMALL), normal(1, 17, 4, 4, 3)
    want = compiled(vae.encode, SMALL)(params, frames)[0]
    step = compiled(vae.encode_step, SMALL)
    cache, head, _ = step(params, None, frames[:, :9])
    _, tail, _ = step(params, cache, frames[:, 9:])
    assert want.shape == (1, 9, 2, 2, 4)
    np.testing.assert_allclose(np.concatenate([head, tail], axis=1), want, atol=2e-5)
    # The cache matters.
    assert not np.allclose(step(params, None, frames[:, 9:])[1], tail, atol=1e-3)


@pytest.mark.parametrize(('frames', 'latents'), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (13, 4)])
def test_lengths_of_encoded_clips(frames, latents):
    made = jax.eval_shape(
        functools.partial(vae.encode, TINY), vae.shapes(TINY), jnp.zeros((1, frames, 16, 8, 3))
    )
    assert [one.shape for one in made] == [(1, latents, 2, 1, 4)] * 2


@pytest.mark.parametrize(
    ('single', 'latents', 'frames'), [(4, 1, 4), (1, 1, 1), (1, 2, 8), (4, 3, 9), (4, 6, 24)]
)
def test_lengths_of_decoded_clips(single, latents, frames):
    cfg = dataclasses.replace(TINY, single_latent_frames=single)
    made = jax.eval_shape(
        functools.partial(vae.decode, cfg), vae.shapes(cfg), jnp.zeros((1, latents, 2, 1, 4))
    )
    assert made.shape == (1, frames, 16, 8, 3)


def test_patched_frames_are_stacked_pixels():
    patched = dataclasses.replace(SMALL, patch_size=2, out_channels=2)
    plain = dataclasses.replace(SMALL, in_channels=12, out_channels=8)
    assert patched.spatial_compression == 2 * plain.spatial_compression
    params, frames = params_of(plain), normal(1, 4, 8, 12, 3)
    stacked = np.stack([frames[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-2)
    mean, _ = compiled(vae.encode, patched)(params, frames)
    same, _ = compiled(vae.encode, plain)(params, stacked.reshape(1, 4, 4, 6, 12))
    np.testing.assert_array_equal(mean, same)
    made = compiled(vae.decode, patched)(params, mean)
    stacked = compiled(vae.decode, plain)(params, mean)
    for i, j in np.ndindex(2, 2):
        np.testing.assert_array_equal(
            made[..., i::2, j::2, :], stacked[..., 2 * (2 * i + j) : 2 * (2 * i + j + 1)]
        )
    assert vae.Config.from_released(patched.to_released()) == patched


def test_scaled_subtracts_the_means():
    cfg = dataclasses.replace(SMALL, latent_means=(1, 2, 3, 4), scaling_factor=0.5)
    latents = normal(1, 2, 2, 2, 4)
    np.testing.assert_allclose(vae.scaled(cfg, latents), (latents - [1, 2, 3, 4]) / 2, rtol=1e-5)
    np.testing.assert_allclose(vae.unscaled(cfg, vae.scaled(cfg, latents)), latents, rtol=1e-5)
    np.testing.assert_array_equal(vae.scaled(SMALL, latents), latents * SMALL.scaling_factor)
    assert vae.Config.from_released(cfg.to_released()) == cfg
    with pytest.raises(ValueError, match='latent_means: got 1 numbers'):
        dataclasses.replace(SMALL, latent_means=(1.0,))


def test_standardised_latents_decode_to_the_same_frames():
    params, frames, std = params_of(SMALL), normal(1, 4, 4, 6, 3), np.array([0.5, 1, 2, 8], 'f4')
    cfg, made = vae.standardised(SMALL, params, 2 * std, std)
    assert (cfg.scaling_factor, cfg.latent_means) == (1, (2, 2, 2, 2))
    encode, decode = compiled(vae.encode, SMALL), compiled(vae.decode, SMALL)
    (mean, logvar), (small, small_logvar) = encode(params, frames), encode(made, frames)
    np.testing.assert_allclose(small * std, mean, atol=1e-5)
    np.testing.assert_allclose(small_logvar + 2 * np.log(std), logvar, atol=1e-5)
    np.testing.assert_allclose(decode(made, small), decode(params, mean), atol=1e-4)


def test_clips_of_a_batch_are_independent():
    params = params_of(SMALL)
    for function, clips in (
        (vae.encode, normal(2, 5, 4, 4, 3)),
        (vae.decode, normal(2, 3, 2, 2, 4)),
    ):
        both = np.asarray(compiled(function, SMALL)(params, clips))
        clips[1] += 1
        changed = np.asarray(compiled(function, SMALL)(params, clips))
        first = (0, 0) if function is vae.encode else 0
        np.testing.assert_array_equal(changed[first], both[first])
        assert np.abs(changed - both).max() > 1e-2


@pytest.mark.parametrize('tiles', [None, Tiles((8, 12), (4, 6))])
def test_one_tile_equals_the_plain_autoencoder(tiles):
    def program(function, *args):
        return str(jax.make_jaxpr(functools.partial(function, SMALL))(vae.shapes(SMALL), *args))

    latents, frames = np.zeros((1, 2, 4, 6, 4)), np.zeros((1, 3, 8, 12, 3))
    tiled_decode = functools.partial(vae.decode_tiled, tiles=tiles)
    tiled_encode = functools.partial(vae.encode_tiled, tiles=tiles)
    assert program(tiled_decode, latents) == program(vae.decode, latents)
    assert program(tiled_encode, frames) == program(vae.encode, frames)
    assert program(tiled_decode, np.zeros((1, 2, 5, 6, 4))) != program(
        vae.decode, np.zeros((1, 2, 5, 6, 4))
    )


def test_blended_tiles_of_the_identity_are_the_identity():
    x = normal(1, 2, 14, 17, 3)
    got = tiled(lambda tile: tile, x, (6, 5), (6, 5), (1 / 3, 1 / 5))
    np.testing.assert_allclose(got, x, atol=1e-6)


def test_tiles_fade_into_each_other():
    made = iter(range(3))
    got = tiled(
        lambda tile: jnp.full(tile.shape, next(made), jnp.float32),
        np.zeros((1, 1, 2, 10, 1)),
        (2, 8),
        (2, 8),
        (0, 0.5),
    )
    np.testing.assert_allclose(got[0, 0, 0, :, 0], [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1.5])


def test_tiles_with_parts_of_latent_pixels_are_refused():
    tiles = Tiles((4, 4), (2, 2), (0.25, 0.25))  # a stride of 3 pixels is 1.5 latent pixels
    with pytest.raises(ValueError, match='strides of whole latent pixels'):
        jax.eval_shape(
            lambda p, x: vae.encode_tiled(SMALL, p, x, tiles),
            vae.shapes(SMALL),
            jnp.zeros((1, 1, 8, 8, 3)),
        )


@pytest.mark.parametrize(
    ('total', 'sizes'), [(3, [3]), (8, [8]), (9, [8, 3]), (16, [8, 8, 4]), (14, [8, 8])]
)
def test_windows_of_a_long_video(total, sizes):
    seen = []

    def run(part):
        seen.append(part.shape[1])
        return jnp.repeat(part, 4, axis=1)

    latents = np.arange(total, dtype=np.float32).reshape(1, -1, 1, 1, 1)
    got = windowed(run, latents, window=8, overlap=2, drop=8)
    assert seen == sizes
    np.testing.assert_array_equal(got.ravel(), np.repeat(latents, 4))


def test_all_initial_weights_get_gradients():
    params = vae.init(SMALL, 0)
    frames = np.tanh(normal(1, 3, 4, 4, 3))

    def loss(params):
        mean, logvar = vae.encode(SMALL, params, frames)
        made = vae.decode(SMALL, params, vae.sample(mean, logvar, normal(*mean.shape)))
        return jnp.square(made[:, :3] - frames).mean() + 1e-3 * jnp.square(logvar).mean()

    grads = conversion.flatten(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(leaf).all() for leaf in grads.values())
    idle = [path for path, leaf in grads.items() if path.endswith('kernel') and not leaf.any()]
    assert not idle


def test_half_precision_stays_close():
    half = dataclasses.replace(SMALL, dtype='bfloat16')
    params, latents = params_of(SMALL), normal(2, 3, 2, 2, 4)
    cache, frames = jax.jit(functools.partial(vae.prefill, half))(params, latents)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}
    want = compiled(vae.decode, SMALL)(params, latents)
    assert frames.dtype == jnp.float32
    assert np.abs(frames - want).mean() < 0.1 * np.std(want)


@pytest.mark.parametrize('case', ['c_vae_17f', 'c_vae_5f_1latent'])
def test_weights_and_config_survive_the_round_trip(case):
    released, weights = golden(case)
    cfg = vae.Config.from_released(released)
    table = vae.weights(cfg)
    back = conversion.to_torch(table, conversion.to_jax(table, weights, vae.shapes(cfg)))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in back)
    written = cfg.to_released()
    assert vae.Config.from_released(written) == cfg
    assert released.items() <= written.items()


def test_missing_and_unknown_weights_are_named():
    released, weights = golden('c_vae_17f')
    cfg = vae.Config.from_released(released)
    weights['decoder.up_blocks.1.resnets.0.conv9.conv.bias'] = weights.pop(
        'decoder.up_blocks.1.resnets.0.conv1.conv.bias'
    )
    with pytest.raises(conversion.ConversionError) as error:
        conversion.to_jax(vae.weights(cfg), weights, vae.shapes(cfg))
    assert 'missing key decoder.up_blocks.1.resnets.0.conv1.conv.bias' in str(error.value)
    assert 'unknown key decoder.up_blocks.1.resnets.0.conv9.conv.bias' in str(error.value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'use_quant_conv': True}, r'use_quant_conv = True \(expected False\)'),
        ({'act_fn': 'gelu'}, "act_fn = 'gelu'"),
        ({'new_maths': 2}, r'new_maths = 2 \(unknown key\)'),
        ({'norm_num_groups': 3}, 'multiples of norm_groups = 3'),
        ({'temporal_compression_ratio': 3}, 'power of two'),
        ({'single_latent_frames': 4}, 'expected 1 or temporal_compression = 2'),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vae.Config.from_released(SMALL.to_released() | change)


# Three levels, of which the second resamples time only, cover every branch of the options.
OPTIONS = {
    'shortcut': vae.Config(
        latent_channels=4,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_groups=2,
        spatial_levels=1,
        resampling='shortcut',
        sample_height=16,
        sample_width=24,
    ),
    'fold': vae.Config(
        latent_channels=4,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_groups=2,
        patch_size=2,
        spatial_levels=1,
        time_taps=(1, 3, 3),
        resampling='fold',
        norm_frames='one',
        modulated=False,
        sample_height=16,
        sample_width=24,
    ),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_options_survive_the_round_trip(name):
    cfg = OPTIONS[name]
    written = json.loads(json.dumps(cfg.to_released()))
    assert vae.Config.from_released(written) == cfg
    assert not set(vae.OPTIONS) & set(vae.PRESETS['released'].to_released())
    params, table = params_of(cfg), vae.weights(cfg)
    back = conversion.flatten(
        conversion.to_jax(table, conversion.to_torch(table, params), vae.shapes(cfg))
    )
    given = conversion.flatten(params)
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[path], given[path]) for path in back)


@pytest.mark.parametrize('name', OPTIONS)
def test_options_keep_lengths_and_causality(name):
    cfg = OPTIONS[name]
    size = 2 * cfg.spatial_compression
    frames = normal(1, 9, size, size, 3)
    params, encode = params_of(cfg), compiled(vae.encode, cfg)
    mean, logvar = encode(params, frames)
    assert mean.shape == logvar.shape == (1, 3, 2, 2, 4)
    if cfg.norm_frames == 'one':  # norms of a chunk read later frames of it
        changed, _ = encode(params, np.concatenate([frames[:, :5], frames[:, 5:] + 1], axis=1))
        np.testing.assert_allclose(changed[:, :2], mean[:, :2], atol=1e-5)
        assert np.abs(changed[:, 2] - mean[:, 2]).max() > 1e-3
    assert compiled(vae.decode, cfg)(params, mean).shape == (1, 9, size, size, 3)
    assert compiled(vae.decode_streamed, cfg)(params, mean).shape == (1, 8, size, size, 3)


def test_norms_of_one_frame_are_independent_of_chunks():
    cfg = OPTIONS['fold']
    params, latents = params_of(cfg), normal(1, 4, 2, 2, 4)
    step = compiled(vae.step, cfg)
    cache, parts = None, []
    for index in range(1, 4):  # as a stream does it
        cache, made = step(params, cache, latents[:, index : index + 1])
        parts.append(made)
    np.testing.assert_allclose(
        compiled(vae.decode_streamed, cfg)(params, latents),
        np.concatenate(parts, axis=1),
        atol=2e-5,
    )


def test_unfold_inverts_fold():
    x = normal(1, 4, 4, 6, 3)
    folded = resampling.fold(x, 2, 2)
    assert folded.shape == (1, 2, 2, 3, 24)
    assert np.array_equal(resampling.unfold(folded, 2, 2), x)


def test_the_first_of_an_odd_number_of_frames_counts_twice():
    x = normal(1, 3, 4, 6, 3)
    np.testing.assert_array_equal(layers.even_frames(x, 2)[:, :2], np.repeat(x[:, :1], 2, axis=1))
    np.testing.assert_array_equal(layers.even_frames(x, 1), x)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'time_taps': (3, 3)}, 'expected none, or 1 or 3 for each of the 3 levels'),
        ({'time_taps': (2, 3, 3)}, 'expected none, or 1 or 3'),
        ({'spatial_levels': 3}, 'expected at most 2'),
        ({'resampling': 'other'}, 'expected one of average, shortcut, fold'),
        ({'norm_frames': 'two'}, 'expected one of chunk, one'),
        ({'block_out_channels': (4, 8, 14)}, 'whose shortcuts divide'),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPTIONS['shortcut'], **change)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r'frames \(1, 5, 6, 8, 3\), expected .* multiples of 8'):
        vae.encode(TINY, None, np.zeros((1, 5, 6, 8, 3)))
    with pytest.raises(ValueError, match=r'latents \(1, 2, 2, 8\), expected \[B T h w 4\]'):
        vae.decode(SMALL, None, np.zeros((1, 2, 2, 8)))


def test_released_sizes():
    released = vae.PRESETS['released']
    assert vae.Config.from_released({'_class_name': 'AutoencoderKLCogVideoX'}) == released
    tiles = Tiles.of(released)
    assert (tiles.sample, tiles.latent) == ((240, 360), (30, 45))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(vae.shapes(released)))
    assert 215e6 < count < 216e6


@pytest.mark.parametrize('groups', [2, 8])
def test_statistics_of_one_reading_are_those_of_two(groups):
    x = 0.5 * normal(2, 3, 4, 5, 8) + 100 * normal(8)  # squares would lose half of the digits
    for one, two in zip(layers.one_reading(x, groups), layers.two_readings(x, groups)):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_accelerators_read_the_frames_of_a_norm_once(monkeypatch):
    norm = layers.GroupNorm(SMALL)
    x = normal(1, 3, 4, 5, 8)
    params = norm.init(jax.random.key(0), x)
    want = norm.apply(params, x)
    monkeypatch.setattr(layers, 'two_readings', None)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    np.testing.assert_allclose(norm.apply(params, x), want, rtol=1e-5, atol=1e-5)
