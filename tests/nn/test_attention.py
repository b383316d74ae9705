import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn.attention import MultiHead, attention, route, self_attention
from matrix_jax.parallel import sharding
from matrix_jax.parallel.mesh import Mesh


def literal(q, k, v, bias, scale):
    """Reference: one head and one query at a time, in float64."""
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
def test_attention_equals_the_definition(biased, scale):
    q, k, v = tokens(0, 5), tokens(1, 7), tokens(2, 7)
    bias = np.zeros((2, 3, 5, 7))
    if biased:
        bias = np.random.default_rng(0).normal(size=bias.shape)
        bias[..., 4:] = -np.inf
    y = attention(q, k, v, jnp.asarray(bias, jnp.float32) if biased else None, scale)
    want = literal(q, k, v, bias, 8**-0.5 if scale is None else scale)
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


@pytest.mark.parametrize(
    'width, dtype, fused',
    [
        (64, 'bfloat16', True),
        (128, 'bfloat16', True),
        (64, 'float32', False),
        (44, 'bfloat16', False),
        (136, 'bfloat16', False),
    ],
)
def test_a_gpu_uses_the_cudnn_kernel_where_it_can(width, dtype, fused, monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(key), (1, 5, 2, width), dtype) for key in range(3))
    want, taken = attention(q, k, v), []
    plain = jax.nn.dot_product_attention

    def kernel(*given, implementation, **options):
        taken.append(implementation)
        return plain(*given, **options)

    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax.nn, 'dot_product_attention', kernel)
    got = attention(q, k, v)
    assert taken == ['cudnn'] * fused and got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), np.float32(want), atol=0.02)
    # A bias, or logits that are needed, have no kernel.
    attention(q, k, v, jnp.zeros((1, 1, 5, 5)))
    assert len(taken) == fused
    if fused:  # the first keys alone
        got = attention(q, k, v, filled=jnp.array([3]))
        np.testing.assert_allclose(
            np.float32(got), np.float32(attention(q, k[:, :3], v[:, :3])), atol=0.02
        )


def test_multi_head_normalises_queries_and_keys_per_head():
    x, context = jnp.ones((1, 2, 16)), jax.random.normal(jax.random.key(0), (1, 4, 16))
    net = MultiHead(heads=2)
    params = jax.jit(net.init)(jax.random.key(1), x, context)
    # Scaling the query kernel leaves a normalised query, and so the output, unchanged.
    scaled = jax.tree.map(lambda leaf: leaf, params)
    scaled['params']['query']['kernel'] = 50 * params['params']['query']['kernel']
    np.testing.assert_allclose(
        net.apply(scaled, x, context), net.apply(params, x, context), atol=1e-4
    )
    scaled['params']['value']['kernel'] = 50 * params['params']['value']['kernel']
    assert not np.allclose(net.apply(scaled, x, context), net.apply(params, x, context), atol=1e-2)


# --- on a mesh -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'heads, parts, tensor, exchange',
    [
        (30, 2, 1, 'heads'),
        (30, 6, 1, 'heads'),
        (30, 8, 1, 'keys'),
        (30, 4, 1, 'keys'),
        (12, 3, 2, 'heads'),
        (12, 4, 2, 'keys'),
        (2, 2, 3, 'heads'),
    ],
)
def test_heads_are_exchanged_where_they_divide(heads, parts, tensor, exchange):
    """Counts the heads that remain on a device after the split by tensor."""
    assert route(heads, parts, 'auto', tensor) == exchange
    assert route(heads, parts, 'keys', tensor) == 'keys'


@pytest.mark.parametrize(
    'exchange, message',
    [
        ('heads', "exchange: got 'heads', expected 'keys' or 'auto', as 30 heads do not divide"),
        ('ring', "exchange: got 'ring', expected 'auto', 'heads' or 'keys'"),
    ],
)
def test_impossible_exchanges_are_refused(exchange, message):
    with pytest.raises(ValueError, match=message):
        route(30, 8, exchange)


@pytest.mark.parametrize('mesh', [Mesh(data=2, tensor=2, seq=2), Mesh(seq=4)], ids=str)
@pytest.mark.parametrize('queries', [8, 4])
def test_values_and_gradients_of_split_tokens_equal_one_device(mesh, queries):
    """Four heads, split by seq and tensor; two of eight keys are padding; with a bias."""
    draw = np.random.default_rng(0).normal
    q, k, v = (jnp.float32(draw(size=(2, tokens, 4, 8))) for tokens in (queries, 8, 8))
    bias, real = draw(size=(4, queries, 8)).astype(np.float32), np.array([0, 1, 2, 4, 5, 6])

    def loss(function, *given):
        return jnp.square(function(*given)).sum()

    def split(q, k, v, bias):
        return self_attention(q, k, v, bias, real=real)

    def whole(q, k, v, bias):
        return attention(q, k[:, real], v[:, real], bias[..., real])

    def value(function):
        return jax.jit(jax.value_and_grad(lambda *given: loss(function, *given), (0, 1, 2, 3)))

    wanted = value(whole)(q, k, v, bias)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        found = value(split)(q, k, v, bias)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
