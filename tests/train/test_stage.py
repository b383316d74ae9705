"""Stages say which worlds they train and refuse the others."""

import dataclasses

import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import UsageError
from matrix_jax.train import loop
from matrix_jax.train.dmd import SelfForcing
from matrix_jax.train.flow_matching import Foundation
from matrix_jax.train.swin_dpm import SwinDPM
from matrix_jax.train.vae import Autoencode


@pytest.mark.parametrize('recipe', recipes.list_recipes())
def test_every_recipe_has_a_stage_for_its_world(recipe):
    run = recipes.load(recipe)
    if run.stage is not None:
        run.stage.check_world(worlds.build(run.world))


@pytest.mark.parametrize(
    'recipe, stage, predictions',
    [
        ('matrix_game_2:TINY', SwinDPM(), 'v_prediction.*MatrixGame2 of flow_prediction'),
        ('the_matrix:TINY', Foundation(), 'flow_prediction.*TheMatrix of v_prediction'),
        ('the_matrix:TINY', SelfForcing(), 'flow_prediction.*TheMatrix of v_prediction'),
    ],
)
def test_a_stage_refuses_other_worlds_and_writes_nothing(recipe, stage, predictions, tmp_path):
    out = tmp_path / 'run'
    run = dataclasses.replace(recipes.load(recipe), stage=stage, out=str(out))
    with pytest.raises(UsageError, match=f'^stage: {type(stage).__name__} trains .*{predictions}'):
        loop.fit(run, worlds.build(run.world), {})
    assert not out.exists()


@pytest.mark.parametrize('recipe', ['matrix_game_2:TINY', 'the_matrix:TINY'])
def test_an_autoencoder_trains_for_any_world(recipe):
    Autoencode().check_world(worlds.build(recipes.load(recipe).world))


@pytest.mark.parametrize('crop', [(7, 8), (8, 12), (640, 96), (64, 104)])
def test_parts_that_do_not_fit_the_world_are_refused(crop):
    world = worlds.build(recipes.load('autoencoders:LEAN').world)
    Autoencode(crop=(32, 48)).check_world(world)
    with pytest.raises(UsageError, match='stage.crop: got .* multiples of 8 within'):
        Autoencode(crop=crop).check_world(world)
