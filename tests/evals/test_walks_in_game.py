"""The game under scripts, from the places where recordings begin."""

import contextlib

import numpy as np
import pytest

from matrix_jax.evals import first_person_report, walks_in_game

pytest.importorskip('vizdoom', reason="needs ViZDoom: pip install -e '.[data]'")

from matrix_jax.data import doom


@pytest.fixture(scope='module')
def clip():
    with contextlib.closing(doom.VizDoomGame()) as game:
        return doom.record(game, 7, 'gallery', 9, np.random.default_rng(7))


def test_the_game_begins_where_the_clip_begins(clip):
    assert walks_in_game.can_play([clip])
    idle, walk = np.zeros((2, 9, 6), np.float32)
    walk[:, 0] = 1
    still, moving = walks_in_game.play([clip, clip], np.stack([idle, walk]))
    assert still.shape == (9, 96, 160, 3)
    assert np.abs(still[0].astype(int) - clip.frames[0]).mean() < 1
    np.testing.assert_array_equal(still[0], moving[0])
    assert (still == still[0]).all()
    assert np.abs(moving[-1].astype(int) - moving[0]).mean() > 3


def test_the_report_names_the_blurriest_second():
    made = {'sharpness': [4.0, 1.0, 3.0], 'color': [0, 1, 2], 'change': [1, 1, 1]}
    game = {'sharpness': [4.0, 4.0, 4.0], 'color': [0, 0, 1], 'change': [2, 2, 2]}
    results = {'drift': {'idle': made}, 'game': {'idle': game}}
    assert '| idle | 0.25 (second 2) | 0.67 | 2.00 | 1.00 | 1.00 | 2.00 |' in '\n'.join(
        first_person_report._against_game(results)
    )
