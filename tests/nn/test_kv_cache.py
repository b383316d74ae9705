"""The ring of cached frames equals the rolling cache of the reference; attention patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.nn.attention import attention
from matrix_jax.nn.kv_cache import Blocks, KVCache, Ring, attend_per_site

SIZES = [(6, 0, 3), (4, 0, 3), (7, 1, 3), (5, 2, 3), (3, 0, 3), (6, 0, 1)]


class Rolling:
    """The cache of the reference, which moves its entries when new ones arrive."""

    def __init__(self, size, sink):
        self.entries, self.sink = [None] * size, sink
        self.seen = self.filled = 0

    def write(self, frames):
        end, new = frames[-1] + 1, len(frames)
        filled = self.filled + end - self.seen
        if end > self.seen and self.filled + new > len(self.entries):
            gone = self.filled + new - len(self.entries)
            kept = self.entries[self.sink + gone : self.filled]
            self.entries[self.sink : self.sink + len(kept)] = kept
            filled -= gone
        self.entries[filled - new : filled] = list(frames)
        self.seen, self.filled = end, filled
        return self.entries[:filled]


@pytest.mark.parametrize('size, sink, count', SIZES)
def test_a_ring_holds_what_the_rolling_cache_holds(size, sink, count):
    rolling = Rolling(size, sink)
    cache = jnp.full((1, size, 1, 1, 1), -1, jnp.int32)
    cache = KVCache(cache, cache)
    for block in range(5):
        frames = np.arange(block * count, (block + 1) * count)
        want = rolling.write(frames)
        assert rolling.write(frames) == want  # a second call on the same block
        ring = Ring(jnp.int32(frames[0]), count, size, sink)
        new = frames.reshape(1, count, 1, 1, 1)
        cache = ring.keys_and_values(cache, KVCache(new, -new))
        filled = np.asarray(ring.visible())[0]
        assert sorted(cache.k.ravel()[filled].tolist()) == want
        assert filled.sum() == len(want) and np.all(np.diff(filled.astype(int)) <= 0)
        np.testing.assert_array_equal(ring.slot_frames()[filled], cache.k.ravel()[filled])
        np.testing.assert_array_equal(
            cache.k[0, :, 0, 0, 0][filled], -cache.v[0, :, 0, 0, 0][filled]
        )


@pytest.mark.parametrize('start', [0, 3, 99_999, 2_000_000_001])
@pytest.mark.parametrize('size, sink, count', SIZES[1:4])
def test_positions_are_relative_and_small(start, size, sink, count):
    ring = Ring(jnp.int32(start), count, size, sink)
    queries, keys = (np.asarray(places, np.int64) for places in ring.positions())
    held, filled = np.asarray(ring.slot_frames(), np.int64), np.asarray(ring.visible())[0]
    own = start + np.arange(count)
    np.testing.assert_array_equal(
        (queries[:, None] - keys)[:, filled], (own[:, None] - held)[:, filled]
    )
    assert np.all(queries >= 0) and np.all(queries < size)
    assert np.all(keys[sink:] < size) and np.all(keys[sink:][filled[sink:]] >= 0)


def test_empty_slots_are_not_seen():
    rng = np.random.default_rng(0)
    q, new = jnp.float32(rng.normal(size=(2, 1, 2, 3, 2, 4)))
    past, rest = jnp.float32(rng.normal(size=(2, 1, 4, 3, 2, 4)))
    for start in (0, 2, 4):  # empty, half full, full
        ring = Ring(jnp.int32(start), 2, 4)
        known = np.asarray(ring.visible())[0][:, None, None, None]
        made = []
        for filling in (past, jnp.where(known, past, 1e3 * rest)):
            held = ring.keys_and_values(KVCache(filling, filling), KVCache(new, new))
            made.append(ring.attend(q, held.k, held.v))
        np.testing.assert_array_equal(*made)
        seen = held.k[:, : start + 2].reshape(1, -1, 2, 4)
        want = attention(q.reshape(1, 6, 2, 4), seen, seen).reshape(q.shape)
        np.testing.assert_allclose(made[0], want, atol=1e-6)


@pytest.mark.parametrize('frames, block, local', [(6, 3, None), (9, 3, 4)])
def test_blocks_see_themselves_and_a_window_before_their_end(frames, block, local):
    pattern = Blocks(frames, block, local)
    query, key = np.mgrid[:frames, :frames]
    end = (query // block + 1) * block
    np.testing.assert_array_equal(pattern.visible(), (key < end) & (key >= end - (local or frames)))
    q, k, v = np.random.default_rng(1).normal(size=(3, 1, frames, 2, 1, 4)).astype('f4')
    bias = np.where(np.kron(pattern.visible(), np.ones((2, 2))), 0, -np.inf)
    want = attention(*(x.reshape(1, -1, 1, 4) for x in (q, k, v)), bias)
    np.testing.assert_allclose(pattern.attend(q, k, v), want.reshape(q.shape), atol=1e-6)


def test_a_site_attends_to_itself_only():
    q, k, v = np.random.default_rng(2).normal(size=(3, 2, 4, 3, 2, 8)).astype('f4')
    visible = Blocks(4, 2, 2).visible()
    bias = np.where(visible, 0, -np.inf)
    for shared in (False, True):
        if shared:
            k, v = k[:, :, :1], v[:, :, :1]
        got = attend_per_site(q, k, v, visible)
        for site in range(3):
            own = 0 if shared else site
            want = attention(q[:, :, site], k[:, :, own], v[:, :, own], bias)
            np.testing.assert_allclose(got[:, :, site], want, atol=1e-6)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: Blocks(7, 3), 'block: got 3 frames, expected a divisor of the 7'),
        (
            lambda: Blocks(6, 3, 2),
            'local: got a window of 2 latent frames, expected at least the 3',
        ),
        (lambda: Ring(0, 4, 4, 1), 'local: got 4 cached latent frames with 1 of them kept'),
    ],
)
def test_refuses_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_pass_through_a_ring():
    q, new, past = np.random.default_rng(3).normal(size=(3, 1, 2, 1, 1, 4)).astype('f4')
    ring = Ring(jnp.int32(2), 2, 4)
    empty = jnp.concatenate([past, past], axis=1)

    def loss(new):
        held = ring.keys_and_values(KVCache(empty, empty), KVCache(new, new))
        return jnp.sum(ring.attend(q, held.k, held.v) ** 2)

    grads = jax.grad(loss)(new)
    assert bool(jnp.isfinite(grads).all()) and np.any(grads)
