"""Every recipe: built, counted, named on the command line."""

import pytest

from matrix_jax import recipes, worlds
from matrix_jax.train.light_decoder import LIGHT, LightDecoder
from tests.cli.command import run


@pytest.mark.parametrize('recipe', recipes.list_recipes())
def test_every_recipe_builds(recipe):
    found = recipes.load(recipe)
    world = worlds.build(found.world)
    if world.endless:
        world.stream()
    assert set(world.shapes()) == set(world.tables)
    if found.stage is not None:
        made = {LIGHT} if isinstance(found.stage, LightDecoder) else set()  # by the stage itself
        assert set(found.stage.components) <= set(world.tables) | made


@pytest.mark.parametrize('recipe', ['the_matrix:STAGE2', 'the_matrix:STAGE3', 'the_matrix:STAGE4'])
def test_a_summary_counts_without_weights_or_devices(recipe, capsys):
    def summary(*mesh):
        assert run('generate', recipe, '--summary', *mesh) == 0
        lines = capsys.readouterr().out.splitlines()
        return {
            line.split()[0]: (
                int(line.split()[1].replace(',', '')),
                float(line.split()[3].replace(',', '')),
            )
            for line in lines
        }

    one, many = summary(), summary('--mesh.fsdp', '8', '--mesh.tensor', '2')
    assert one['transformer'][0] == 2_009_546_304
    assert one['vae'][0] == 215_583_907
    assert one['total'][0] == many['total'][0] == 7_111_091_171
    assert one['total'][1] == pytest.approx(7_111_091_171 * 2 / 2**20, abs=0.1)
    assert many['transformer'][1] < one['transformer'][1] / 4


def test_recipes_name_their_weights(tmp_path):
    runs = recipes.load_several(['the_matrix:TINY=a/b=c', 'carracing'], [])
    assert [(run.name, run.weights) for run in runs] == [
        ('the_matrix:TINY', 'a/b=c'),
        ('carracing:PLAY', 'carracing'),
    ]
    assert recipes.load_several([], []) == [recipes.load()]
    assert recipes.load_several(['the_matrix:TINY'], ['--weights', 'a', '--train.seed=3']) == [
        recipes.load('the_matrix:TINY', ['--weights=a', '--train.seed=3'])
    ]
