import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.config import Mesh
from matrix_jax.nn.conv3d import Downsample2d, conv3d
from matrix_jax.parallel import sharding, spatial


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(params, cache, x):
    """A convolution, a norm, half the rows."""
    y = conv3d(x, params['first'])
    mean = spatial.local_mean(y)[:, None, None, None]
    mean, variance = spatial.pooled_statistics(
        mean, spatial.local_mean(jnp.square(y - mean))[:, None, None, None]
    )
    y = (y - mean) * jax.lax.rsqrt(variance + 1e-6)
    return x + cache, Downsample2d(4).apply({'params': params['second']}, y)


@pytest.mark.parametrize('mesh', [Mesh(seq=2), Mesh(data=2, seq=4), Mesh(seq=8)], ids=str)
def test_values_and_gradients_of_split_rows_are_those_of_the_whole(mesh):
    """Over 4 devices the last holds half as many rows, over 8 there are two without any."""
    total, unit = (6, 2) if mesh.seq > 2 else (4, 2)
    x, wanted_y = normal(2, 2, total * unit, 4, 3), normal(2, 2, total, 2, 4, seed=1)
    params = {
        'first': normal(1, 3, 3, 3, 4, seed=2),
        'second': {'kernel': normal(3, 3, 4, 4, seed=3), 'bias': normal(4, seed=4)},
    }

    def loss(run, params, x):
        cache, y = run(network, params, jnp.zeros_like(x), x)
        return jnp.square(y - wanted_y).sum() + jnp.square(cache).sum(), y

    def whole(function, *given):
        return function(*given)

    def split(function, params, cache, x):
        ways = jax.sharding.get_abstract_mesh().shape['seq']
        below = -total % ways * unit
        cache = jnp.pad(cache, ((0, 0), (0, 0), (0, below), (0, 0), (0, 0)))
        cache, y = spatial.split_rows(function, params, cache, x, unit=unit)
        assert cache.shape[2] == x.shape[2] + below
        return cache, y

    def gradients(run):
        return jax.jit(jax.grad(functools.partial(loss, run), (0, 1), has_aux=True))(params, x)

    expected = gradients(whole)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        found = gradients(split)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


def test_what_does_not_split_stays_whole():
    x = normal(1, 1, 7, 4, 3)

    def seen(params, cache, x):
        assert spatial.with_halo(x, 1, 1)[1] == (1, 1)
        return cache, x

    with jax.set_mesh(sharding.make_mesh(Mesh(seq=2))):
        assert spatial.split_rows(seen, {}, None, x, unit=2)[1] is x
    assert spatial.split_rows(seen, {}, None, x)[1] is x
