"""Layers as they are traced for GPUs, run on the CPU in float32: equal up to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn import conv3d, kv_cache, modulation, rope
from matrix_jax.nn.attention import MultiHead
from matrix_jax.parallel import compilation


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def both(function, *given):
    """Results (for the CPU, for GPUs) of a function of arrays."""
    want = jax.jit(lambda *given: function(*given))(*given)
    with compilation.compile_for('gpu'):
        return want, jax.jit(lambda *given: function(*given))(*given)


def applied(net, *given):
    params = jax.jit(net.init)(jax.random.key(0), *given)
    leaves, structure = jax.tree.flatten(params)
    drawn = [leaf + 0.3 * draw(*leaf.shape, seed=index) for index, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, drawn)
    return both(lambda *given: net.apply(params, *given), *given)


@pytest.mark.parametrize('pairs', [2, 4])
def test_rotation(pairs):
    tables = tuple(draw(5, pairs, seed=seed) for seed in (1, 2))
    want, got = both(lambda x: rope.rotate(x, tables), draw(2, 5, 3, 8))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    'net, shape',
    [
        (modulation.LayerNorm(apart=True), (2, 7, 16)),
        (modulation.RMSNorm(), (2, 7, 16)),
        (conv3d.Upsample2d(5), (1, 2, 6, 4, 3)),
        (conv3d.CausalConv3d(5), (1, 4, 6, 4, 3)),
    ],
)
def test_norms_and_convolutions(net, shape):
    want, got = applied(net, draw(*shape) + 2)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_attention_to_few_keys():
    bias = np.where(draw(12, 3, seed=3) > 1, -np.inf, 0).astype(np.float32)
    bias[:, 0] = 0.5
    want, got = applied(MultiHead(2), draw(1, 12, 16), draw(1, 3, 16, seed=1), bias)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_attention_of_few_frames():
    q, k, v = draw(2, 3, 5, 2, 8), draw(2, 6, 5, 2, 8, seed=1), draw(2, 6, 5, 2, 8, seed=2)
    visible = np.arange(6)[None] < 5
    want = kv_cache.attend_per_site(q, k, v, visible)
    got = kv_cache.attend_few(q, k, v, visible, jnp.full((2, 3, 5, 2), 8**-0.5))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not kv_cache.few_frames(3, 6)
    with compilation.compile_for('gpu'):
        assert kv_cache.few_frames(3, 6) and not kv_cache.few_frames(19, 19)
