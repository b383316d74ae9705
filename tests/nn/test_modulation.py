import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.nn.modulation import LayerNorm, PairedAdaLN, TimeEmbedding


def noisy(params, key=7):
    """Parameters without zeros and ones, so that all of them matter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            leaf + 0.3 * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )


def test_layer_norm_is_float32_inside_and_out():
    x = (100 + jax.random.normal(jax.random.key(0), (3, 64))).astype(jnp.bfloat16)
    net = LayerNorm(1e-5)
    params = noisy(jax.jit(net.init)(jax.random.key(1), x))
    y = net.apply(params, x)
    x64 = np.asarray(x, np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    want = want * np.asarray(params['params']['scale']) + np.asarray(params['params']['bias'])
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, atol=1e-4)


def setup():
    video = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    side = jax.random.normal(jax.random.key(1), (2, 5, 8))
    time = jax.random.normal(jax.random.key(2), (2, 3, 6))
    net = PairedAdaLN()
    return net, noisy(jax.jit(net.init)(jax.random.key(3), video, side, time)), video, side, time


def test_frames_have_their_own_levels_and_side_tokens_the_last():
    net, params, video, side, time = setup()
    base = net.apply(params, video, side, time)
    for frame in range(3):
        changed = net.apply(params, video, side, time.at[:, frame].add(1.0))
        moved = [not np.allclose(base[0][:, t], changed[0][:, t]) for t in range(3)]
        gates = [not np.allclose(base[2][:, t], changed[2][:, t]) for t in range(3)]
        assert moved == gates == [t == frame for t in range(3)]
        for part in (1, 3):
            assert np.allclose(base[part], changed[part]) == (frame != 2)


def test_one_level_is_broadcast_to_all_frames():
    net, params, video, side, time = setup()
    one = net.apply(params, video, side, time[:, :1])
    every = net.apply(params, video, side, jnp.repeat(time[:, :1], 3, axis=1))
    for a, b in zip(one, every, strict=True):
        np.testing.assert_allclose(jnp.broadcast_to(a, b.shape), b, atol=1e-6)


def test_shift_comes_before_scale_and_gate():
    net, params, video, side, time = setup()
    width = video.shape[-1]
    params = jax.tree.map(jnp.zeros_like, params)
    params['params']['norm']['scale'] = jnp.ones(width)
    params['params']['linear']['bias'] = jnp.repeat(jnp.arange(1.0, 7.0), width)
    video_out, side_out, gate, side_gate = net.apply(params, video, side, time)
    norm = LayerNorm()
    plain = {'params': {'scale': jnp.ones(width), 'bias': jnp.zeros(width)}}
    np.testing.assert_allclose(video_out, norm.apply(plain, video) * 3 + 1, atol=1e-5)
    np.testing.assert_allclose(side_out, norm.apply(plain, side) * 6 + 4, atol=1e-5)
    np.testing.assert_array_equal(gate, 3)
    np.testing.assert_array_equal(side_gate, 6)


def test_guidance_is_optional_and_its_layer_always_exists():
    level = jnp.array([[0.0, 250.0, 999.0]])
    net = TimeEmbedding(16, 6, guidance=4)
    params = noisy(jax.jit(net.init)(jax.random.key(0), level))
    without = net.apply(params, level)
    assert params['params']['guidance']['kernel'].shape == (4, 16)
    plain = {name: leaf for name, leaf in params['params'].items() if name != 'guidance'}
    np.testing.assert_array_equal(TimeEmbedding(16, 6).apply({'params': plain}, level), without)
    guided = net.apply(params, level, jnp.ones((1, 1, 4)))
    assert guided.shape == without.shape and not np.allclose(guided, without)
