"""Measures of videos whose answer is known."""

import numpy as np
import pytest

from matrix_jax.data.carracing import THEMES
from matrix_jax.evals import drift, driver


def test_lab_knows_white_black_and_red():
    found = drift.lab([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
    np.testing.assert_allclose(found, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.02)


def test_sharpness_falls_with_blur():
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    blurred = (sharp.astype(int) + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2)) // 3
    flat = np.full((2, 16, 16, 3), 90, np.uint8)
    values = [drift.sharpness(one.astype(np.uint8)).mean() for one in (sharp, blurred, flat)]
    assert values[0] > 1.5 * values[1] > 0 and values[2] == 0


def test_seconds_see_when_the_colour_goes():
    theme = next(iter(THEMES))
    real = np.full((64, 64, 96, 3), THEMES[theme].road, np.uint8)
    made = real.copy()
    made[48:] += 40
    found = drift.seconds([made], [real], [driver.measures(theme)], fps=16)
    assert found['road'][:3] == [1, 1, 1] and found['color'][:3] == [0, 0, 0]
    assert found['color'][3] > 10 and found['palette'][3] < found['palette'][0]
    assert found['car'] == [0, 0, 0, 0] and found['sharpness'] == [0, 0, 0, 0]


def test_ground_motion_is_the_shift_downwards():
    rng = np.random.default_rng(0)
    # A texture of bandlimited noise, which can be moved by parts of a pixel.
    spectrum = np.fft.rfft2(rng.normal(size=(64, 96)))
    rows = np.fft.fftfreq(64)[:, None]
    spectrum *= np.exp(-80 * (rows**2 + np.fft.rfftfreq(96)[None] ** 2))
    frames = [
        np.fft.irfft2(spectrum * np.exp(-2j * np.pi * rows * down), s=(64, 96))
        for down in (0, 2.5, 5.0, 5.0, 4.0)
    ]
    frames = np.stack(frames)[..., None].repeat(3, axis=-1)
    frames = (128 + 40 * frames / frames.std()).clip(0, 255).astype(np.uint8)
    found = drift.ground_motion(frames, rows=44)
    np.testing.assert_allclose(found, [0, 2.5, 2.5, 0, -1], atol=0.3)
    assert drift.ground_motion(np.zeros((2, 8, 8, 3), np.uint8), rows=8).tolist() == [0, 0]


def test_a_picture_that_stands_still_does_not_change():
    frames = np.zeros((5, 2, 2, 3), np.uint8)
    frames[3:] = 7
    assert drift.change(frames).tolist() == [0, 0, 0, 7, 0]
    found = drift.seconds([frames], [frames], [{'change': drift.change}], fps=2)
    assert found['change'] == [0, 3.5] and list(found) == ['change', 'sharpness', 'color']


def test_a_seam_is_a_larger_step_between_shifts():
    smooth = np.arange(33, dtype=np.uint8)[None, :, None, None, None] * np.ones(
        (1, 1, 2, 2, 3), np.uint8
    )
    assert drift.seams(smooth, 4) == pytest.approx(1)
    jumping = smooth + 2 * (np.arange(33) // 4).astype(np.uint8)[None, :, None, None, None]
    assert drift.seams(jumping, 4) == pytest.approx(3)


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(4000, 3))
    assert drift.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert drift.frechet(one, one + [3, 0, 0]) == pytest.approx(9, rel=1e-6)
    assert drift.frechet(one, 2 * one) == pytest.approx(3, rel=0.05)  # (2 - 1)^2 per dimension
    with pytest.raises(ValueError, match='got 1 and 4000 samples'):
        drift.frechet(one[:1], one)
