"""The explorer in a world of plain numbers: open ground, a wall ahead, a wall that holds it."""

import collections

import numpy as np
import pytest

from matrix_jax.data.explorer import PITCH_LIMIT, TURN_RADIANS, Explorer, Sight

BEARING = np.linspace(0.75, -0.75, 40)


def explore(count, seed=0, ahead=lambda bearing: np.full(40, 900.0), moves=True):
    """Choices of `count` latent frames in a world where keys move and the mouse turns."""
    explorer, pose, made = Explorer(np.random.default_rng(seed)), np.zeros(6), []
    explorer.start()
    for _ in range(count):
        keys, mouse = explorer.choose(Sight(ahead(BEARING), BEARING))
        made.append((''.join(key for key, held in zip('WSAD', keys) if held), *mouse))
        pose = pose + [
            60 * bool(moves and keys.any()),
            0,
            0,
            -mouse[1] * TURN_RADIANS,
            mouse[0] * TURN_RADIANS,
            0,
        ]
        explorer.moved(np.tile(pose, (4, 1)))
    return made, pose


def test_every_combination_occurs_and_sides_are_even():
    made, _ = explore(6000)
    count = collections.Counter((keys, np.sign(yaw) * (abs(yaw) > 1e-6)) for keys, _, yaw in made)
    for keys in ('', 'W', 'S', 'A', 'D', 'WA', 'WD', 'SA', 'SD'):
        for turn in (-1, 0, 1):
            assert count[keys, turn] > 12, (keys, turn)
    assert not any(set('WS') <= set(keys) or set('AD') <= set(keys) for keys, _ in count)
    left, right = (sum(n for (_, turn), n in count.items() if turn == side) for side in (-1, 1))
    assert 0.8 < left / right < 1.25
    assert 0.15 < sum(n for (keys, _), n in count.items() if keys == 'W') / 6000 < 0.6
    pitch = np.array([pitch for _, pitch, _ in made])
    assert 0.03 < np.mean(pitch > 0) and 0.03 < np.mean(pitch < 0)


def test_the_view_stays_near_the_horizon():
    explorer, pitch = Explorer(np.random.default_rng(1)), 0.0
    for _ in range(400):
        _, mouse = explorer.choose(Sight(np.full(40, 900.0), BEARING))
        pitch += mouse[0] * TURN_RADIANS
        explorer.moved(np.tile([0, 0, 0, 0, pitch, 0], (4, 1)))
        assert abs(pitch) <= PITCH_LIMIT + 1e-6


def test_it_turns_to_the_open_side_before_a_wall():
    made, _ = explore(300, ahead=lambda bearing: np.where(bearing > 0.3, 800.0, 40.0))
    yaws = np.array([yaw for _, _, yaw in made])
    assert np.mean(yaws < 0) > 0.5 > np.mean(yaws > 0)
    assert np.mean(['W' in keys for keys, _, _ in made]) < 0.35


def test_it_lets_go_where_keys_move_nothing():
    made, _ = explore(600, moves=False)
    holds, run = [], 1
    for before, after in zip(made, made[1:]):
        if before[0] and before[0] == after[0]:
            run += 1
        else:
            holds.append(run)
            run = 1
    moving, _ = explore(600)
    assert np.mean([bool(keys) for keys, _, _ in made]) < np.mean(
        [bool(keys) for keys, _, _ in moving]
    )


@pytest.mark.parametrize('seed', [0, 5])
def test_choices_follow_from_the_seed(seed):
    assert explore(50, seed)[0] == explore(50, seed)[0] != explore(50, seed + 1)[0]
