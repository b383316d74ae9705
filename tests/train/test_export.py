"""What a stage exports is the diffusers layout: another start reads the same bits from it."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.train import state as states
from matrix_jax.weights.conversion import flatten

RECIPES = [
    name
    for world in ('the_matrix', 'matrix_game_2', 'matrix_game_3')
    for name in recipes.list_recipes(world)
    if ':TINY' in name and recipes.load(name).stage
]


class Frames:
    """Batches of random frames, for a stage that measures its latents at the end."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __next__(self):
        return {'frames': self.rng.integers(0, 256, (1, 9, 32, 48, 3), np.uint8)}


def trained(run):
    """(world, parameters to export) of a stage whose trained leaves moved at random."""
    world, params = worlds.start(run)
    state = states.init(run.stage.start(world, params, 0), run.stage.trainable, optax.sgd(1.0), 0)
    keys = iter(jax.random.split(jax.random.key(1), len(state.ema)))
    ema = {
        path: leaf + 1e-3 * jax.random.normal(next(keys), leaf.shape)
        for path, leaf in state.ema.items()
    }
    final = jax.device_get(states.merged(state.replace(ema=ema), 'ema'))
    return run.stage.finish(world, final, Frames())


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }


# A reward is no network of a world; `test_reward` reads what its training writes.
@pytest.mark.parametrize(
    'recipe', [name for name in RECIPES if recipes.load(name).stage.components]
)
def test_a_stage_exports_and_reads_back_every_bit(recipe, tmp_path):
    run = recipes.load(recipe)
    world, final = trained(run)
    world.save(tmp_path / 'one', final, dtype='float32')
    if world.tables.keys() != worlds.build(run.world).tables.keys():  # the stage adds a network
        run = dataclasses.replace(run, world=world.cfg)
    again, read = worlds.start(dataclasses.replace(run, weights=str(tmp_path / 'one')))
    parts = [part.folder for part in world.components if part.folder in final]
    assert set(parts) <= set(run.stage.components) and parts
    for part in parts:
        wanted, found = flatten(final[part]), flatten(read[part])
        assert set(found) == set(wanted)
        for name, leaf in wanted.items():
            assert found[name].dtype == np.float32
            assert np.asarray(leaf, np.float32).tobytes() == found[name].tobytes(), (part, name)
    for part in world.components:
        if part.folder in parts:
            assert getattr(again.cfg, part.field) == getattr(world.cfg, part.field)
    again.save(tmp_path / 'two', {part: read[part] for part in parts}, dtype='float32')
    assert files(tmp_path / 'two') == files(tmp_path / 'one')


def test_every_stage_has_a_recipe_here():
    kinds = {type(recipes.load(name).stage).__name__ for name in recipes.list_recipes()}
    assert kinds - {'NoneType'} == {type(recipes.load(name).stage).__name__ for name in RECIPES}
