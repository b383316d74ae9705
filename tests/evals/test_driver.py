"""The judge and the driver on painted roads, and the driver in the real game."""

import dataclasses

import numpy as np
import pytest

from matrix_jax.data.carracing import HEIGHT, THEMES, WIDTH, CarRacingGame
from matrix_jax.evals import driver


def picture(column, slope=0.0, theme='meadow', width=20):
    """A road whose middle is at `column` beside the car and moves `slope` columns per row ahead."""
    colors = THEMES[theme]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    middle = column + slope * (driver.CAR[0] - rows)
    mask = np.abs(columns - middle) <= width / 2
    frame = np.where(mask[..., None], colors.road, colors.ground).astype(np.uint8)
    frame[48:55, 46:51] = driver.RED
    return frame, mask


@pytest.mark.parametrize('theme', THEMES)
def test_the_road_is_found_by_colour_and_under_the_car(theme):
    frame, mask = picture(48, 0.2, theme)
    np.testing.assert_array_equal(driver.road(frame, theme), mask)
    assert driver.on_road(frame, theme) and driver.car_seen(frame)
    assert driver.road_area(frame, theme) == pytest.approx(mask.mean())
    away = picture(80, 0, theme)[0]
    assert not driver.on_road(away, theme)
    assert driver.palette_match(away, theme) > 0.98 - 35 / (HEIGHT * WIDTH)
    away[48:55, 46:51] = THEMES[theme].ground
    assert not driver.car_seen(away)


@pytest.mark.parametrize('lag', [0, 2])
@pytest.mark.parametrize(
    'column, slope, expected',
    [(48, 0, ''), (48, -0.9, 'L'), (48, 0.9, 'R'), (33, 0, 'L'), (63, 0, 'R')],
)
def test_it_steers_toward_the_road(column, slope, expected, lag):
    one = driver.FrameDriver(driver.Config(lag=lag), 'snow', ['D'] * lag, speed=12.0)
    assert one.key(picture(column, slope, 'snow')[0])[1:] == expected


def test_it_counts_on_the_keys_that_are_on_their_way():
    frame = picture(48)[0]
    late = driver.Config(lag=2)
    assert driver.FrameDriver(late, 'meadow', ['D', 'D'], 16.0).key(frame)[1:] == ''
    assert driver.FrameDriver(late, 'meadow', ['DL', 'DL'], 16.0).key(frame)[1:] == 'R'
    with pytest.raises(ValueError, match='got 1 keys, expected lag = 2'):
        driver.FrameDriver(late, 'meadow', ['D'])


def test_speed_is_kept_near_the_cruise():
    one = driver.FrameDriver(driver.Config(cruise=20.0), 'meadow', [], speed=0.0)
    frame = picture(48)[0]
    keys = [one.key(frame)[0] for _ in range(12)]
    assert keys[0] == 'D' and 'N' in keys and 18 < one.speed < 30


def test_a_drive_is_judged_by_its_frames():
    on, off = picture(48)[0], picture(85)[0]
    frames = np.stack([on] * 32 + [off] * 64 + [on] * 16)
    assert driver.judge(frames, 'meadow') == {'seconds_on_road': 3.0, 'seconds_until_lost': 2.0}


def test_blur_is_a_mean_of_squares():
    mask = np.random.default_rng(0).random((6, 9)) < 0.5
    padded = np.pad(mask, 2, mode='edge')
    expected = [[padded[i : i + 5, j : j + 5].mean() for j in range(9)] for i in range(6)]
    np.testing.assert_allclose(driver.blur(mask, 2), expected, atol=1e-6)


def test_in_the_game_frames_are_enough_to_stay_on_the_road():
    game = CarRacingGame()
    (start,) = driver.starts(game, 1, 8)
    frames, telemetry, keys = driver.drive_game(game, start, driver.Config(cruise=18.0), 20)
    assert len(frames) == len(telemetry) == 80 and len(keys) == 20
    truth = telemetry[:, 0] >= 0.5
    assert truth.mean() > 0.95 and telemetry[-1, 2] > 10
    assert (driver.on_road(frames, start.theme) == truth).mean() > 0.95
    # A start is played again exactly; the last keys of a start are those on their way.
    again, keys, _ = driver.begin(game, start, 3)
    assert again.shape == (9, HEIGHT, WIDTH, 3) and keys == list(start.keys[-3:])
    np.testing.assert_array_equal(again, driver.begin(game, start, 3)[0])
    late = driver.drive_game(game, start, driver.Config(lag=2), 3, key='DL')[2]
    assert late == [*start.keys[-2:], 'DL']
    short = dataclasses.replace(start, keys=start.keys[:-2])
    np.testing.assert_array_equal(driver.begin(game, short, 1)[0], again[:1])
