"""Layout of tokens on a mesh: inverse functions, and positions of padding."""

import numpy as np
import pytest

from matrix_jax.nn import token_layout

FRAMES, PLACES, LENGTH = 2, 5, 7


@pytest.fixture(params=[1, 3, 5])
def parts(request, monkeypatch):
    """Pretends to be on a mesh of that many devices."""
    monkeypatch.setattr(token_layout, 'num_shards', lambda name: request.param)
    return request.param


def numbered(*shape, first=1):
    return np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(shape)


def test_split_inverts_join_and_padding_is_not_real(parts):
    video, text = numbered(1, FRAMES, PLACES, 1), numbered(1, LENGTH, 1, first=100)
    padded, padded_text = token_layout.pad(video, 2), token_layout.pad(text, 1)
    assert padded.shape[2] % parts == padded_text.shape[1] % parts == 0
    tokens = token_layout.join_text(padded, padded_text)
    again = token_layout.split_text(tokens, padded.shape)
    for one, other in zip(again, (padded, padded_text), strict=True):
        np.testing.assert_array_equal(one, other)
    real = token_layout.real_positions(FRAMES, PLACES, LENGTH)
    seen = np.asarray(tokens)[0, slice(None) if real is None else real, 0]
    assert sorted(seen) == sorted([*video.flat, *text.flat])
    assert (real is None) == (parts == 1)


def test_each_device_has_the_same_sites_of_every_frame(parts):
    video = token_layout.pad(numbered(1, FRAMES, PLACES, 1), 2)
    flat = token_layout.flatten_frames(video)
    np.testing.assert_array_equal(token_layout.unflatten_frames(flat, FRAMES), video)
    held = video.shape[2] // parts
    for device, mine in enumerate(np.split(np.asarray(flat), parts, axis=1)):
        np.testing.assert_array_equal(
            mine.reshape(FRAMES, held), video[0, :, device * held : (device + 1) * held, 0]
        )
    rows = numbered(FRAMES * PLACES, 1)
    np.testing.assert_array_equal(token_layout.flatten_rows(rows, FRAMES), flat[0])
