"""Frames of a world that a list or a function drives."""

import numpy as np
import pytest
from PIL import Image

import matrix_jax
from matrix_jax.config import UsageError
from matrix_jax.controls.vocabulary import ControlError
from tests.serve.conftest import opened, stream  # noqa: F401


def test_a_list_and_a_function_drive_alike(stream, tiny, start_image):  # noqa: F811
    def play(actions, **more):
        return np.stack(
            list(matrix_jax.live_frames(actions=actions, opened=(stream, tiny), **more))
        )

    listed = play(['D', 'DL', 'N'])
    assert listed.shape == (3, stream.frames_per_step, 32, 48, 3)
    assert listed.dtype == np.uint8
    seen = []

    def policy(frames):
        seen.append(frames)
        return ('D', 'DL', 'N', None)[len(seen) - 1]

    np.testing.assert_array_equal(play(policy), listed)
    np.testing.assert_array_equal(np.stack(seen[1:]), listed)
    assert seen[0].shape == listed.shape[1:]
    assert (play(['D', 'DL', 'N'], seed=1) != listed).any()
    picture = play(['D', 'DL', 'N'], image=start_image)
    assert (picture != listed).any()
    np.testing.assert_array_equal(
        play(['D', 'DL', 'N'], image=np.asarray(Image.open(start_image))), picture
    )
    for wrong, error, said in (
        ({'actions': ['X']}, ControlError, "unknown symbol 'X'"),
        ({'image': start_image, 'start': ''}, UsageError, 'got both'),
        ({'prompt': 3}, UsageError, 'prompt: expected text'),
        ({'seed': -1}, UsageError, 'seed: got -1'),
        ({'start': 'moon'}, UsageError, "start: got 'moon'"),
    ):
        with pytest.raises(error, match=said):
            play(**{'actions': ['D'], **wrong})
