import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn.attention import MultiHead, attention


def literal(q, k, v, bias, scale):
    """Attention of one head and one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros(q.shape[:3] + v.shape[-1:])
    for b, n, head in np.ndindex(q.shape[:3]):
        logits = scale * k[b, :, head] @ q[b, n, head] + bias[b, head, n]
        weights = np.exp(logits - logits.max())
        y[b, n, head] = weights / weights.sum() @ v[b, :, head]
    return y


def tokens(key, length):
    return jax.random.normal(jax.random.key(key), (2, length, 3, 8))


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('scale', [None, 0.7])
def test_equals_the_literal_form(biased, scale):
    q, k, v = tokens(0, 5), tokens(1, 7), tokens(2, 7)
    bias = np.zeros((2, 3, 5, 7))
    if biased:
        bias = np.random.default_rng(0).normal(size=bias.shape)
        bias[..., 4:] = -np.inf
    y = attention(q, k, v, jnp.asarray(bias, jnp.float32) if biased else None, scale)
    want = literal(q, k, v, bias, 8 ** -0.5 if scale is None else scale)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_hidden_keys_leave_finite_gradients():
    q, k, v = tokens(0, 5), tokens(1, 7), tokens(2, 7)
    bias = jnp.where(jnp.arange(7) < 4, 0.0, -jnp.inf)
    grads = jax.grad(lambda *a: jnp.sum(attention(*a, bias) ** 2), (0, 1, 2))(q, k, v)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
    assert not np.any(grads[1][:, 4:]) and not np.any(grads[2][:, 4:])
    assert np.any(grads[1][:, :4])


def test_softmax_is_float32_in_half_precision():
    # Many nearly equal weights: a bfloat16 sum of 1024 of them would be off by percents.
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1024, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 1024, 1, 8), jnp.bfloat16)
    y = attention(q, k, v)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, atol=4e-3)


def test_multi_head_normalises_queries_and_keys_per_head():
    x, context = jnp.ones((1, 2, 16)), jax.random.normal(jax.random.key(0), (1, 4, 16))
    net = MultiHead(heads=2)
    params = jax.jit(net.init)(jax.random.key(1), x, context)
    # Scaling the query kernel leaves a normalised query, and so the output, unchanged.
    scaled = jax.tree.map(lambda leaf: leaf, params)
    scaled['params']['query']['kernel'] = 50 * params['params']['query']['kernel']
    np.testing.assert_allclose(net.apply(scaled, x, context), net.apply(params, x, context),
                               atol=1e-4)
    scaled['params']['value']['kernel'] = 50 * params['params']['value']['kernel']
    assert not np.allclose(net.apply(scaled, x, context), net.apply(params, x, context), atol=1e-2)
