import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn.linear import Linear


@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_computes_in_its_dtype_whatever_the_weights_are_stored_in(stored, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    net = Linear(4, dtype=jnp.dtype(dtype))
    params = jax.jit(net.init)(jax.random.key(1), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    params = jax.tree.map(lambda leaf: (leaf + 0.5).astype(stored), params)
    y = net.apply(params, x)
    kernel, bias = (np.asarray(params['params'][name], np.float64) for name in ('kernel', 'bias'))
    assert y.dtype == dtype and y.shape == (2, 5, 4)
    tolerance = 1e-5 if dtype == 'float32' else 0.1
    np.testing.assert_allclose(np.asarray(y, np.float64), np.asarray(x, np.float64) @ kernel + bias,
                               atol=tolerance)


def test_without_bias_has_no_bias():
    params = Linear(4, use_bias=False).init(jax.random.key(0), jnp.ones((1, 3)))['params']
    assert set(params) == {'kernel'}
