import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.vae import chunks


@pytest.mark.parametrize('unrolled', [0, 4])
@pytest.mark.parametrize(('length', 'sizes'), [(1, [1]), (3, [3]), (4, [2, 2]), (7, [3, 2, 2])])
def test_chunks_have_the_remainder_first(monkeypatch, unrolled, length, sizes):
    monkeypatch.setattr(chunks, 'UNROLLED', unrolled)
    x = np.arange(length, dtype=np.float32).reshape(1, length, 1, 1, 1) + 1

    def run(total, chunk):  # tells chunks apart by their running sum, in every frame
        total = total + chunk.sum()
        return total, jnp.full_like(chunk, total)

    total, y = chunks.chunked(run, jnp.zeros(()), x, 2)
    ends = np.cumsum(sizes)
    np.testing.assert_array_equal(y.ravel(), np.repeat(ends * (ends + 1) / 2, sizes))
    assert total == x.sum()
