"""The probe of keys and mouse on pictures that shift, and the words for what it reads."""

import numpy as np
import pytest

from matrix_jax.data.records import Clip, unknown
from matrix_jax.evals import action_probe, control

CFG = action_probe.Config(widths=(8, 16), hidden=16, steps=150, batch=16, learning_rate=5e-3)


def shifting(yaw, pitch, seed, count=13):
    """(frames [F 16 24 3], axes [F 4]) of noise under a view that turns and tilts."""
    noise = np.random.default_rng(seed).integers(0, 255, (90, 130), np.uint8)
    frames = np.stack(
        [
            noise[36 - 2 * pitch * i : 52 - 2 * pitch * i, 50 + 2 * yaw * i :][:, :24]
            for i in range(count)
        ]
    )
    mouse = np.tile([0.1 * pitch, 0.1 * yaw], (count, 1))
    return np.repeat(frames[..., None], 3, -1), action_probe.axes(np.zeros((count, 4)), mouse)


def views(seeds):
    return action_probe.examples(
        CFG,
        [
            shifting(*way, seed)
            for seed in seeds
            for way in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
        ],
    )


def test_axes_are_odd_or_even_under_a_mirror():
    keys = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    mouse = np.array([[0.1, 0], [0, -0.1], [0.01, 0.05], [0, 0.0]])
    asked = action_probe.axes(keys, mouse)
    np.testing.assert_allclose(
        asked, [[0, 0.1, 1, 0], [-0.1, 0, -1, -1], [0.05, 0.01, 0, 1], [0, 0, 0, 0]], atol=1e-7
    )
    assert action_probe.sides(asked).tolist() == [
        [0, 1, 1, 0],
        [-1, 0, -1, -1],
        [1, 0, 0, 1],
        [0] * 4,
    ]
    turned = action_probe.axes(keys[:, [0, 1, 3, 2]], mouse * [1, -1])
    np.testing.assert_allclose(turned, asked * action_probe.Config.parity, atol=1e-7)


def test_clips_without_actions_are_left_aside():
    frames = np.zeros((5, 4, 4, 3), np.uint8)
    bare = Clip(frames=frames, caption='', theme='', seed=0, fps=16, **unknown(5))
    known = Clip(
        frames=frames,
        caption='',
        theme='',
        seed=0,
        fps=16,
        **unknown(5)
        | {'keyboard': np.ones((5, 4), np.int8), 'mouse': np.zeros((5, 2), np.float32)},
    )
    assert [asked.shape for _, asked in action_probe.recorded([bare, known])] == [(5, 4)]


def test_it_reads_turns_and_tilts_of_new_pictures(tmp_path):
    data = views(range(20))
    assert data.controls.shape == data.truth.shape == (len(data.ends), 4)
    probe = action_probe.train(CFG, data)
    found = action_probe.obedience(CFG, probe, views((100, 101, 102)))
    for axis, names in (('yaw', {'left', 'none', 'right'}), ('pitch', {'up', 'none', 'down'})):
        assert names < set(found[axis])
        assert found[axis]['balanced'] > 0.85 > 0.6 > found[axis]['shuffled'], axis
        assert found[axis]['slope'] == pytest.approx(1, abs=0.35)
    assert 'slope' not in found['ahead'] and found['ahead']['none'] > 0.8
    control.save(tmp_path / 'probe', CFG, *probe)
    params, limits = control.load(tmp_path / 'probe', CFG)
    assert limits == probe[1]
    assert action_probe.obedience(CFG, (params, limits), data)['yaw']['balanced'] > 0.9
    assert control.load(tmp_path / 'probe', control.Config()) is None
