import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn import linear
from matrix_jax.nn.linear import Int8, Linear
from matrix_jax.parallel import compilation


@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_have_the_dtype_of_the_layer(stored, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    net = Linear(4, dtype=jnp.dtype(dtype))
    params = jax.jit(net.init)(jax.random.key(1), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    params = jax.tree.map(lambda leaf: (leaf + 0.5).astype(stored), params)
    y = net.apply(params, x)
    kernel, bias = (np.asarray(params['params'][name], np.float64) for name in ('kernel', 'bias'))
    assert y.dtype == dtype and y.shape == (2, 5, 4)
    tolerance = 1e-5 if dtype == 'float32' else 0.1
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(x, np.float64) @ kernel + bias, atol=tolerance
    )


def test_without_bias_has_no_bias():
    params = Linear(4, use_bias=False).init(jax.random.key(0), jnp.ones((1, 3)))['params']
    assert set(params) == {'kernel'}


# --- 8 bits ----------------------------------------------------------------------------------


def kernel_of(*shape):
    """A kernel whose channels differ in size by orders of magnitude."""
    draw = np.random.default_rng(3)
    return (draw.normal(size=shape) * 10.0 ** draw.integers(-3, 3, shape[-1])).astype('float32')


def test_8_bit_kernels_are_exact_to_half_a_step():
    kernel = kernel_of(2, 64, 6)
    kernel[..., 2] = 0
    made = linear.to_int8(kernel)
    assert made.values.dtype == jnp.int8 and made.scale.shape == (2, 6)
    step = np.abs(kernel).max(1, keepdims=True) / 127
    assert (np.abs(made.kernel() - kernel) <= 0.501 * step).all()
    assert (np.abs(made.values).max(1)[:, [0, 1, 3, 4, 5]] == 127).all()
    again = linear.to_int8(made.kernel())
    np.testing.assert_array_equal(again.values, made.values)


def test_the_error_of_a_layer_stays_within_its_bound():
    x, kernel = kernel_of(3, 7, 64), kernel_of(64, 5)
    x[0, 0] = 0
    made = linear.to_int8(kernel)
    params = {'kernel': made, 'bias': np.arange(5, dtype='float32')}
    y = np.asarray(Linear(5).apply({'params': params}, x), np.float64)
    wide = x.astype(np.float64)
    size = np.abs(wide)
    # Activations and weights are rounded by half a step at most.
    bound = (
        size.max(-1, keepdims=True) / 127 * np.abs(np.asarray(made.kernel(), float)).sum(0)
        + size.sum(-1, keepdims=True) * np.asarray(made.scale) / 2
    )
    error = np.abs(y - (wide @ kernel + params['bias']))
    assert (error <= bound + 1e-4 * np.abs(y)).all()
    assert error.max() > 0 and (y[0, 0] == params['bias']).all()


@pytest.mark.parametrize(
    'truncate, want',
    [(False, [[127, 2, -2], [127, 43, -127]]), (True, [[127, 1, -1], [127, 42, -127]])],
)
def test_activations_are_rounded_or_truncated_by_the_scale_of_their_token(truncate, want):
    x = jnp.array([[127.0, 1.99, -1.99], [0.5, 0.1675, -0.5]])
    values, scale = linear.rows_to_int8(x, truncate)
    np.testing.assert_array_equal(values, want)
    np.testing.assert_allclose(scale, [[1], [0.5 / 127]], rtol=1e-6)


def test_rounded_activations_have_smaller_errors_than_truncated_ones():
    x, kernel = (
        np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for seed, shape in ((0, (64, 32)), (1, (32, 16)))
    )
    errors = [
        np.abs(linear.multiply(x, linear.to_int8(kernel, truncate)) - x @ kernel).mean()
        for truncate in (False, True)
    ]
    assert errors[0] < 0.75 * errors[1], errors
    tree = {'a': {'kernel': kernel}}
    assert linear.quantize(tree, ['*'], truncate=True)['a']['kernel'].truncate


def test_quantize_changes_the_named_layers_only():
    params = {
        'a': {
            'attention': {'query': {'kernel': kernel_of(2, 4, 3), 'bias': np.ones(3)}},
            'mlp': {'up': {'kernel': kernel_of(2, 4, 3)}},
        }
    }
    made = linear.quantize(params, ['*/attention/*'])
    assert isinstance(made['a']['attention']['query']['kernel'], Int8)
    assert made['a']['attention']['query']['bias'] is params['a']['attention']['query']['bias']
    assert made['a']['mlp'] == params['a']['mlp']
    assert isinstance(params['a']['attention']['query']['kernel'], np.ndarray)
    again = linear.quantize(made, ['*/attention/*'])
    assert again['a']['attention']['query']['kernel'] is made['a']['attention']['query']['kernel']
    with pytest.raises(ValueError, match=r"int8: got '\*/ff/\*', which fits no linear layer"):
        linear.quantize(params, ['*/ff/*'])


def test_a_float32_product_keeps_a_bfloat16_kernel_on_gpus():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    kernel = jnp.asarray(rng.normal(size=(64, 32)), jnp.bfloat16)
    net, params = Linear(32, use_bias=False), {'params': {'kernel': kernel}}
    want = x.astype(np.float64) @ np.asarray(kernel, np.float64)
    with compilation.compile_for('gpu'):
        traced = jax.jit(net.apply).trace(params, x)
        got = jax.jit(net.apply)(params, x)
    assert 'f32[64,32]' not in str(traced.jaxpr)  # no copy of the kernel in float32
    np.testing.assert_allclose(got, want, atol=2e-4)
