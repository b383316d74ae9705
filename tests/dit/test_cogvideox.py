import dataclasses
import functools
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from matrix_jax.dit import cogvideox
from matrix_jax.dit.actions import ControlEmbedding, log_counts
from matrix_jax.nn import initializers
from matrix_jax.nn.linear import Linear, quantize
from matrix_jax.nn.modulation import LayerNorm, TimeEmbedding, modulate
from matrix_jax.parity.record import read
from matrix_jax.weights.conversion import ConversionError, to_jax, to_torch

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix'
TINY = cogvideox.PRESETS['tiny']


def golden(case):
    """(released config, weights) of a recording."""
    record = read(GOLDENS / f'{case}.safetensors')
    return record.config['cfg'], record.weights


def noisy(cfg):
    """Random parameters without zeros, so that all of them matter."""
    draw = np.random.default_rng(0).normal

    def leaf(path, shape):
        rows = shape.shape[-2] if path[-1].key == 'kernel' else 100
        return (draw(size=shape.shape) / rows**0.5 + (path[-1].key == 'scale')).astype('float32')

    return jax.tree_util.tree_map_with_path(leaf, cogvideox.shapes(cfg))


def inputs(cfg, batch=2, frames=3):
    """(latents, text, level [B T], control)."""
    rng = np.random.default_rng(5)
    latents, text, control = (
        rng.normal(size=(batch, *shape)).astype('float32')
        for shape in ((frames, 4, 6, cfg.channels), (cfg.text_length, cfg.text_dim), (frames, 10))
    )
    level = rng.integers(0, 1000, (batch, frames))
    return latents, text, level, control if cfg.control else None


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, *args):
    return cogvideox.CogVideoXTransformer(cfg).apply({'params': params}, *args)


@pytest.mark.parametrize('case', ['a_stage1_transformer', 'b_stage4_transformer'])
def test_weights_and_config_survive_the_round_trip(case):
    released, weights = golden(case)
    cfg = cogvideox.Config.from_released(released)
    table = cogvideox.weights(cfg)
    back = to_torch(table, to_jax(table, weights, cogvideox.shapes(cfg)))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in back)
    assert cogvideox.Config.from_released(cfg.to_released()) == cfg
    written = cfg.to_released()
    assert all(written[key] == value for key, value in released.items() if key in written) and set(
        released
    ) - set(written) <= {'temporal_compression_ratio'}


def test_weights_of_another_stage_are_refused():
    released, weights = golden('a_stage2_transformer')
    cfg = dataclasses.replace(cogvideox.Config.from_released(released), control=None)
    with pytest.raises(ConversionError, match='control_blocks'):
        to_jax(cogvideox.weights(cfg), weights, cogvideox.shapes(cfg))


@pytest.mark.parametrize(('span', 'unroll'), [((0, 4), 3), ((1, 3), 1), ((2, 4), 1), (None, 1)])
def test_segments_equal_the_layers_one_by_one(span, unroll):
    cfg = dataclasses.replace(
        TINY, control=span and cogvideox.ControlConfig(10, *span), scan_unroll=unroll
    )
    params = noisy(cfg)
    assert set(cfg.segments) == {'before', 'steered', 'after'} & set(params)
    given = inputs(cfg)
    want = one_by_one(cfg, params, *given)
    np.testing.assert_allclose(forward(cfg, params, *given), want, atol=5e-5)
    assert np.std(want) > 0.1


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer_of(kind, cfg, params, *args):
    return kind(cfg, args[0][0].shape[2]).apply({'params': params}, *args)[0]


def one_by_one(cfg, params, latents, text, level, control):
    """The network without scans: a loop over the layers in the order of the reference."""

    def use(module, name, *args):
        return module.apply({'params': params[name]}, *args)

    frames, rows, columns = latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2
    time = use(TimeEmbedding(cfg.width, cfg.time_dim), 'time_embedding', level)
    patches = rearrange(latents, 'b t (h p) (w q) c -> b t (h w) (p q c)', p=2, q=2)
    video = use(Linear(cfg.width), 'patch', patches)
    video = video + cogvideox.positions(cfg, frames, rows, columns)
    tokens = (video, use(Linear(cfg.width), 'text', text))
    if control is not None:
        control = use(ControlEmbedding(cfg.width), 'control_embedding', control)
        steer = (control, log_counts(frames * rows * columns, frames))
    for layer in range(cfg.layers):
        name, start = next(
            (name, start) for name, (start, stop) in cfg.segments.items() if start <= layer < stop
        )
        leaves = jax.tree.map(operator.itemgetter(layer - start), params[name])
        plain = dataclasses.replace(cfg, control=None, scan_unroll=1)  # one compilation for all
        if name == 'steered':
            tokens = layer_of(cogvideox.ControlledBlock, plain, leaves, tokens, time, *steer)
        else:
            tokens = layer_of(cogvideox.Block, plain, leaves, tokens, time)
    shift, scale = rearrange(
        use(Linear(2 * cfg.width), 'modulation_out', jax.nn.silu(time)),
        'b t (c d) -> c b t 1 d',
        c=2,
    )
    video = use(LayerNorm(), 'norm_out', use(LayerNorm(), 'norm_final', tokens[0]))
    patches = use(Linear(4 * cfg.channels), 'out', modulate(video, shift, scale))
    return rearrange(patches, 'b t (h w) (p q c) -> b t (h p) (w q) c', h=rows, p=2, q=2)


def test_one_level_per_sample_is_that_level_for_every_frame():
    params = noisy(TINY)
    latents, text, level, control = inputs(TINY)
    one = forward(TINY, params, latents, text, level[:, 0], control)
    every = forward(TINY, params, latents, text, np.repeat(level[:, :1], 3, axis=1), control)
    np.testing.assert_allclose(one, every, atol=2e-5)
    assert not np.allclose(one, forward(TINY, params, latents, text, level, control), atol=1e-3)


def test_level_and_control_of_batch_one_are_broadcast():
    params = noisy(TINY)
    latents, text, level, control = inputs(TINY)
    one = forward(TINY, params, latents, text, level[:1], control[:1])
    every = forward(
        TINY,
        params,
        latents,
        text,
        np.repeat(level[:1], 2, axis=0),
        np.repeat(control[:1], 2, axis=0),
    )
    np.testing.assert_allclose(one, every, atol=2e-5)


def test_8_bits_stay_near_float32():
    params, given = noisy(TINY), inputs(TINY)
    want = forward(TINY, params, *given)
    scale = float(jnp.abs(want).mean())
    errors = {}
    for kind in ('attention', 'blocks'):
        cfg = dataclasses.replace(TINY, int8=kind)
        made = quantize(params, cfg.int8_layers)
        assert len(jax.tree.leaves(made)) - len(jax.tree.leaves(params)) == 16 + 6 * (
            kind == 'blocks'
        )
        errors[kind] = float(jnp.abs(forward(cfg, made, *given) - want).mean()) / scale
    assert 0 < errors['attention'] < errors['blocks'] < 0.1
    assert TINY.int8 == 'none' and not TINY.int8_layers


def test_gradients_are_finite_and_reach_every_parameter():
    cfg = dataclasses.replace(TINY, remat='block')
    params, given = noisy(cfg), inputs(cfg)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(forward(cfg, p, *given) ** 2)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(grad).all()), path
        # A softmax does not see what all keys share.
        assert np.any(grad) or 'bias' in str(path), path


def test_half_precision_stays_near_float32():
    params, given = noisy(TINY), inputs(TINY)
    half = dataclasses.replace(TINY, dtype='bfloat16')
    want = forward(TINY, params, *given)
    got = forward(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), *given)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).mean()) < 0.05 * float(jnp.abs(want).mean())


def initial(cfg, *rules):
    return initializers.draw_tree(rules, cogvideox.shapes(cfg), 0)


def test_blocks_with_zero_modulation_are_the_identity():
    params = initial(TINY, ('*control/norm?/linear/*', initializers.zeros))
    latents, text, level, control = inputs(TINY)
    base = forward(TINY, params, latents, text, level, control)
    np.testing.assert_array_equal(base, forward(TINY, params, latents, text, level, control + 1))
    assert np.any(base)
    zeros = initial(TINY, *cogvideox.ZERO_INIT)
    assert not np.any(forward(TINY, zeros, latents, text, level, control))
    assert not np.any(zeros['before']['norm2']['linear']['kernel'])


def test_released_sizes():
    assert cogvideox.count(cogvideox.PRESETS['2b']) == 1_693_783_872
    assert cogvideox.count(cogvideox.PRESETS['2b_control']) == 2_009_546_304
    assert cogvideox.count(cogvideox.PRESETS['carracing']) < 5_000_000


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'use_rotary_positional_embeddings': True}, 'use_rotary_positional_embeddings = True'),
        ({'activation_fn': 'gelu'}, "expected 'gelu-approximate'"),
        ({'patch_size_t': 2}, 'patch_size_t = 2 .expected None'),
        ({'out_channels': 32}, 'out_channels = 32'),
    ],
)
def test_config_refuses_unsupported_operations(changes, message):
    released = TINY.to_released() | changes
    with pytest.raises(ValueError, match=message):
        cogvideox.Config.from_released(released)


def test_keys_of_ours_are_written_only_when_they_are_used():
    ours = dataclasses.replace(
        TINY, control=dataclasses.replace(TINY.control, recency=2.0, modulate=True)
    )
    assert cogvideox.Config.from_released(ours.to_released()) == ours
    assert not {'control_recency', 'control_modulate'} & set(TINY.to_released())


def test_a_modulating_control_acts_without_control_blocks():
    cfg = dataclasses.replace(TINY, control=dataclasses.replace(TINY.control, modulate=True))
    latents, text, level, control = inputs(cfg)
    params = initial(cfg, ('*control/norm?/linear/*', initializers.zeros))
    made = [
        cogvideox.CogVideoXTransformer(cfg).apply(
            {'params': params}, latents, text, level, factor * control
        )
        for factor in (1, 2)
    ]
    assert float(jnp.abs(made[0] - made[1]).max()) > 1e-4
    table = cogvideox.weights(cfg)
    again = to_jax(table, to_torch(table, params), cogvideox.shapes(cfg))
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_config_has_defaults_for_missing_keys():
    released = {
        '_class_name': 'x',
        '_diffusers_version': '0.31',
        'num_layers': 6,
        'in_channels': 16,
        'out_channels': 16,
        'patch_size_t': None,
    }
    assert cogvideox.Config.from_released(released) == cogvideox.Config(layers=6)
    assert cogvideox.Config.from_released(
        released | {'control_dim': 8}
    ).control == cogvideox.ControlConfig(8, 0, 6)


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        (dict(latents=(2, 3, 5, 6, 4)), r'latents: got \(2, 3, 5, 6, 4\)'),
        (dict(text=(2, 6, 20)), r'text: got \(2, 6, 20\), expected \(2, 7, 20\)'),
        (dict(level=(2, 4)), r'level: got \(2, 4\), expected \(2, 3\)'),
        (dict(control=(2, 3, 9)), r'control: got \(2, 3, 9\), expected \(2, 3, 10\)'),
        (dict(control=(2, 4, 10)), 'got 4 frames of control for 18 video tokens'),
        (dict(control=None), 'control: got None, but the network has its'),
    ],
)
def test_refuses_shapes_that_do_not_fit(fault, message):
    args = dict(zip(('latents', 'text', 'level', 'control'), inputs(TINY), strict=True))
    args |= {name: shape and jnp.zeros(shape) for name, shape in fault.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: cogvideox.CogVideoXTransformer(TINY).init(jax.random.key(0), **args))


def test_refuses_control_layers_outside_the_network():
    with pytest.raises(ValueError, match=r'control: got layers \[2, 5\)'):
        dataclasses.replace(TINY, control=cogvideox.ControlConfig(10, 2, 5))
