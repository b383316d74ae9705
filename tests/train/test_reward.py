"""Rewards: what recorders know, the rules that follow, and a training that reads it from frames."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import UsageError
from matrix_jax.data import doom_maps, gallery, records
from matrix_jax.rewards import model, tasks
from matrix_jax.train import reward as training
from matrix_jax.train.loop import fit
from matrix_jax.weights.diffusers_layout import CheckpointError

ROAD, LANDMARK = tasks.TASKS['on_road'], tasks.TASKS['landmark']


def clip(seed: int, frames: int = 17) -> records.Clip:
    """A light picture on the road, a dark one off it; every eighth frame changes sides."""
    on_road = (np.arange(frames) // 8 + seed) % 2
    pictures = np.full((frames, 32, 48, 3), 40, np.uint8) + (120 * on_road)[:, None, None, None]
    telemetry = np.zeros((frames, len(records.TELEMETRY)), np.float32)
    telemetry[:, 0], telemetry[:, 2] = on_road, 16.0
    return records.Clip(
        pictures.astype(np.uint8),
        np.zeros(frames, np.int8),
        'A road.',
        'meadow',
        seed,
        16,
        telemetry,
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    for split, seeds in (('train', range(6)), ('heldout', range(6, 8))):
        records.write_shard(folder / f'{split}-0{records.SUFFIX}', map(clip, seeds))
    return folder


def test_the_reward_of_driving():
    state, step = ROAD.init(jnp.zeros(2)), jax.jit(ROAD.step)
    seen = []
    for on_road, speed in ((1, 0.5), (0.1, 1), (1, 1), (0, 1), (0.2, 1), (0, 0)):
        state, reward, ended = step(state, jnp.array([on_road, speed]))
        seen.append((round(float(reward), 3), bool(ended)))
    # It ends at the second step in a row off the road.
    assert seen == [(0.5, False), (0.1, False), (1, False), (0, False), (0.2, True), (0, True)]
    telemetry = np.array([0.75, 9, 16, 0, 0, 0], np.float32)
    np.testing.assert_allclose(ROAD.truth(0, telemetry, None), [0.75, 0.5])
    with pytest.raises(UsageError, match='without telemetry'):
        ROAD.truth(0, telemetry * np.nan, None)


def test_the_reward_of_walking():
    state = LANDMARK.init(jnp.array([0.2]))
    state, reward, ended = LANDMARK.step(state, jnp.array([0.5]))
    assert np.isclose(reward, 0.3) and not ended
    _, reward, ended = LANDMARK.step(state, jnp.array([0.8]))
    assert np.isclose(reward, 1.3) and ended

    layout = gallery.layout(3)
    number = next(at for at, room in enumerate(layout.rooms) if not room.pillar)
    picture, away = layout.picture(number)

    def nearness(distance, turn):
        x, y = picture + distance * away
        yaw = np.arctan2(*-away[::-1]) + turn
        pose = np.array([x, y, 41, yaw, 0, 0], np.float32)
        return float(LANDMARK.truth(3, np.zeros(6), pose)[0])

    assert nearness(150, 0) > 0.999 and nearness(150, np.pi) == nearness(150, 0.8) == 0
    assert 1 > nearness(300, 0) > nearness(300, 0.3) > nearness(400, 0.3) > 0
    assert LANDMARK.truth(3, np.zeros(6), np.array([9e4, 0, 0, 0, 0, 0]))[0] == 0  # no room there
    with pytest.raises(UsageError, match='without poses'):
        LANDMARK.truth(3, np.zeros(6), None)
    assert recipes.load('gallery:REWARD').stage.task == 'landmark' and doom_maps.GALLERY


def test_training_writes_a_reward_and_its_scores(data, tmp_path):
    run = recipes.load('the_matrix:TINY_REWARD', ['--steps', '60', '--batch', '16'])
    run = dataclasses.replace(
        run,
        data=str(data),
        out=str(tmp_path),
        stage=dataclasses.replace(
            run.stage,
            ema=0.5,
            optimizer=dataclasses.replace(run.stage.optimizer, learning_rate=0.01),
        ),
    )
    fit(run, *worlds.start(run))
    scores = json.loads((tmp_path / 'weights' / training.SCORES).read_text())
    assert scores['steps'] == 8 and scores['off_road_accuracy'] == 1 and scores['speed_error'] < 4
    reward = model.load(tmp_path / 'weights')
    frames = clip(0).frames
    values = reward.values(np.stack([frames[1:5], frames[9:13]]))
    assert values[0, 0] < tasks.OFF_ROAD and values[1, 0] > 0.75
    state = reward.init(frames[1:5])
    for ended in (False, True):
        state, paid, over = jax.jit(reward.step)(state, frames[1:5])
        assert paid < 0.25 and bool(over) == ended

    reward.check(32, 48, 4)
    for size in ((64, 48, 4), (32, 48, 3)):
        with pytest.raises(UsageError, match='reward: got one for 4 frames of 32x48'):
            reward.check(*size)
    with pytest.raises(CheckpointError, match='no component reward'):
        model.load('carracing')
    path = tmp_path / 'weights/reward/config.json'
    for field, value in (('hidden', 7), ('task', 'fly'), ('widths', [0]), ('more', 1)):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {field: value}))
        with pytest.raises(CheckpointError, match='reward'):
            model.load(tmp_path / 'weights')
        path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    'field, value', [('frames', 5), ('noise', -1), ('brightness', 1), ('task', 'fly')]
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f'(stage|reward).{field}: got'):
        training.Reward(**{field: value})
