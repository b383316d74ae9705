import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.dit.actions import ControlBlock, ControlEmbedding, log_counts, visibility
from matrix_jax.nn.attention import MultiHead


def causal(tokens):
    """Additive mask [N N] that hides later tokens."""
    return jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), 0.0, -jnp.inf)


@pytest.mark.parametrize(('frames', 'per_frame'), [(1, 4), (3, 6), (5, 1)])
def test_collapsed_attention_equals_repeated_keys_with_a_causal_mask(frames, per_frame):
    tokens = frames * per_frame
    video = jax.random.normal(jax.random.key(0), (2, tokens, 16))
    control = jax.random.normal(jax.random.key(1), (2, frames, 16))
    net = MultiHead(heads=2)
    params = jax.jit(net.init)(jax.random.key(2), video, control)
    params = jax.tree.map(lambda leaf: 2 * leaf + 0.1, params)
    collapsed = net.apply(params, video, control, log_counts(tokens, frames))
    literal = net.apply(params, video, jnp.repeat(control, per_frame, axis=1), causal(tokens))
    np.testing.assert_allclose(collapsed, literal, atol=1e-5)
    assert float(jnp.std(literal)) > 0.05


def test_log_counts_are_the_visible_repeats():
    counts = np.exp(log_counts(6, 3))
    np.testing.assert_allclose(
        counts, [[1, 0, 0], [2, 0, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1], [2, 2, 2]], atol=1e-6
    )


def test_recency_prefers_the_newest_control_in_all_tokens_of_a_frame():
    bias = visibility(6, 3, recency=2.0)
    np.testing.assert_array_equal(bias[:2], [[0, -np.inf, -np.inf]] * 2)
    np.testing.assert_array_equal(bias[4:], [[-4, -2, 0]] * 2)
    np.testing.assert_array_equal(visibility(6, 3), log_counts(6, 3))


def test_refuses_control_that_does_not_fit_the_frames():
    with pytest.raises(ValueError, match='got 4 frames of control for 6 video tokens'):
        log_counts(6, 4)


def block(batch=2):
    video = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
    control = jax.random.normal(jax.random.key(1), (batch, 3, 16))
    time = jax.random.normal(jax.random.key(2), (2, 3, 6))
    net = ControlBlock(heads=2)
    params = jax.jit(net.init)(jax.random.key(3), video, control, time, log_counts(12, 3))
    return jax.jit(net.apply), params, video, control, time


def test_a_frame_sees_its_own_and_earlier_controls():
    apply, params, video, control, time = block()
    counts = log_counts(12, 3)
    base = apply(params, video, control, time, counts)
    for frame in range(3):
        changed = apply(params, video, control.at[:, frame].multiply(-1.0), time, counts)
        moved = [not np.allclose(base[:, t], changed[:, t], atol=1e-7) for t in range(3)]
        assert moved == [t >= frame for t in range(3)]


def test_control_of_batch_one_is_broadcast():
    apply, params, video, control, time = block(batch=1)
    counts = log_counts(12, 3)
    one = apply(params, video, control, time, counts)
    every = apply(params, video, jnp.repeat(control, 2, axis=0), time, counts)
    np.testing.assert_allclose(one, every, atol=1e-6)


def test_frames_are_embedded_separately():
    control = jax.random.normal(jax.random.key(0), (2, 3, 10))
    net = ControlEmbedding(16)
    params = jax.jit(net.init)(jax.random.key(1), control)
    y = net.apply(params, control)
    assert y.shape == (2, 3, 16)
    np.testing.assert_allclose(net.apply(params, control[:, 1:2]), y[:, 1:2], atol=1e-6)
