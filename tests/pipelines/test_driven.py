"""Videos without controls: who drives which world, and which key a frame shows."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import UsageError
from matrix_jax.controls import driving
from matrix_jax.data.carracing import THEMES
from matrix_jax.pipelines import driven, generate
from matrix_jax.stream import swin


def world(recipe):
    return worlds.build(recipes.load(recipe).world)


def test_without_controls_the_driver_drives_where_it_can():
    car, other = world('carracing'), world('matrix_game_2:TINY')
    assert driven.choose_control(car, None) == 'driver' == driven.choose_control(car, 'driver')
    assert driven.choose_control(car, 'random') is None
    assert driven.choose_control(car, 'D,DL') == 'D,DL'
    assert driven.choose_control(other, None) is None
    for one in (other, world('the_matrix:TINY')):
        with pytest.raises(UsageError, match='--control: got driver, expected controls or random'):
            driven.choose_control(one, 'driver')
    controls, notes = generate.plan(car, None, 'driver', 42, None)
    assert len(controls) == len(generate.plan(car, None, None, 42, None)[0]) and not notes


def road(theme, left):
    """A picture of a straight road `left` pixels to the side of the car."""
    frame = np.full((64, 96, 3), THEMES[theme].ground, np.uint8)
    frame[:, 38 - left : 58 - left] = THEMES[theme].road
    return frame


@pytest.mark.parametrize('theme', THEMES)
def test_the_theme_is_read_from_the_picture(theme):
    assert driven.theme(road(theme, 0)) == theme


@pytest.mark.parametrize('group', [0, 2])
def test_a_frame_is_drawn_with_the_key_that_it_was_bound_to(group):
    cfg = swin.Config(groups=4, group_frames=1, context=3, head_group=group)
    taken = []

    def step(carry, control):
        taken.append(control)
        return carry, np.stack([road('snow', 12)] * 4)[None]

    stub = SimpleNamespace(cfg=SimpleNamespace(stream=cfg), vocabulary=driving.DrivingVocabulary())
    runner = SimpleNamespace(world=stub, step=step)
    controls = ['N'] * 6
    start = np.stack([road('snow', 12)] * 25)
    steps = driven.drive(runner, None, start, ['D'] * 6, controls)
    assert next(steps).shape == (4, 64, 96, 3) and controls[1:] == ['N'] * 5
    assert len(list(steps)) == 5
    pressed = [one for (one,) in taken]
    assert controls == (['D'] * group + pressed)[:6]
    assert pressed[0][1:] == 'L'  # the road is to the left


def test_a_world_without_early_binding_is_not_driven():
    car = world('carracing')
    wide = car.replace(stream=dataclasses.replace(car.cfg.stream, group_frames=2, context=2))
    assert driven.can_drive(car) and not driven.can_drive(wide)
