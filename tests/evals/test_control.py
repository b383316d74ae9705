"""The probe on pictures that shift: it must find the shift, and be exact about mirrors."""

import dataclasses

import jax
import numpy as np
import pytest

from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.evals import control

CFG = control.Config(widths=(8, 16), hidden=16, steps=100, batch=16, learning_rate=5e-3)
LEFT, NONE, RIGHT = (SYMBOLS.index(symbol) for symbol in ('DL', 'D', 'DR'))


def clip(side, seed, count=13):
    """Frames [F 16 24 3] of noise that moves `side` pixels a frame, and its truth."""
    noise = np.random.default_rng(seed).integers(0, 255, (16, 120), np.uint8)
    frames = np.stack([noise[:, 48 - 2 * side * i : 72 - 2 * side * i] for i in range(count)])
    telemetry = np.zeros((count, 6), np.float32)
    telemetry[:, 1], telemetry[:, 2] = 1.5 * side, 15.0
    keys = np.full(count, {1: LEFT, 0: NONE, -1: RIGHT}[side])
    return np.repeat(frames[..., None], 3, -1), keys, telemetry


@pytest.fixture(scope='module')
def data():
    return control.examples(CFG, [clip(side, seed) for seed in range(20) for side in (-1, 0, 1)])


def test_windows_end_with_the_latent_frame_of_their_control():
    frames, _, telemetry = clip(1, 0, 17)
    keys = np.array([0, 1, 2, 3, 4])
    data = control.examples(CFG, [(frames, keys, telemetry), (frames[:13], keys[:4], None)], skip=2)
    assert data.ends.tolist() == [8, 12, 16, 17 + 8, 17 + 12]
    assert data.controls.tolist() == [2, 3, 4, 2, 3]
    np.testing.assert_allclose(data.truth[:3], [[1.5, 15]] * 3)
    assert np.isnan(data.truth[3:]).all()
    grey = control.shrink(frames, 2)
    np.testing.assert_allclose(
        control.windows(CFG, data, [1])[0, ..., -1], grey[12] / 255, atol=1e-6
    )


def test_too_few_frames_are_an_error():
    with pytest.raises(ValueError, match='got 5 frames for 3 controls, expected 9'):
        control.examples(CFG, [(clip(0, 0)[0][:5], np.zeros(3, int), None)])


def test_it_learns_to_tell_left_from_right_on_new_pictures(data, tmp_path):
    params = control.train(CFG, data)
    new = control.examples(CFG, [clip(side, seed) for seed in (100, 101) for side in (-1, 0, 1)])
    seen = control.read(CFG, params, new, batch=4)
    limit = control.threshold(control.read(CFG, params, data)[:, 0], control.STEER[data.controls])
    score = control.score(seen[:, 0], control.STEER[new.controls], limit)
    assert score['balanced'] > 0.9 > 0.6 > score['shuffled']
    control.save(tmp_path / 'probe.msgpack', CFG, params, limit)
    again, same_limit = control.load(tmp_path / 'probe.msgpack', CFG)
    np.testing.assert_array_equal(control.read(CFG, again, new, batch=4), seen)
    assert same_limit == limit
    assert control.load(tmp_path / 'probe.msgpack', dataclasses.replace(CFG, seed=1)) is None
    assert control.load(tmp_path / 'none.msgpack', CFG) is None


def test_a_mirror_turns_the_turn_round_and_keeps_the_speed(data):
    net = control.Probe(CFG)
    x = control.windows(CFG, data, np.arange(4))
    both = np.concatenate([x, x[:, :, ::-1]])
    params = jax.jit(net.init)(jax.random.key(0), both)
    turn, speed = jax.jit(net.apply)(params, both).T
    (turn, mirrored_turn), (speed, mirrored_speed) = np.split(turn, 2), np.split(speed, 2)
    np.testing.assert_allclose(mirrored_turn, -turn, atol=1e-6)
    np.testing.assert_allclose(mirrored_speed, speed, atol=1e-6)
    assert np.abs(turn).max() > 1e-3


def test_scores():
    keys = control.STEER[[LEFT, LEFT, NONE, NONE, RIGHT, RIGHT]]
    turn = np.array([0.8, 0.1, 0.0, 0.2, -0.8, -0.4])
    score = control.score(turn, keys, limit=0.3)
    assert (score['left'], score['straight'], score['right']) == (0.5, 1, 1)
    assert score['balanced'] == pytest.approx(5 / 6) == score['accuracy']
    gain = control.gain(turn, np.array([1.0, 1, 0, 0, -1, -1]), keys)
    assert gain['gain'] == pytest.approx((0.8 + 0.1 + 0.8 + 0.4) / 4)
    assert gain['bias'] == pytest.approx(0.1)
