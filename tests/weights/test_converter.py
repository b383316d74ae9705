"""Single pickles become components; whole folders are in tests/cli/test_convert.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from matrix_jax import config, recipes, worlds
from matrix_jax.weights import conversion, converter


@pytest.fixture(scope='module')
def world():
    return worlds.build(recipes.load('the_matrix:TINY').world)


@pytest.fixture
def source(world, tmp_path):
    """A file of the tensors of the autoencoder, in the place of a pickle."""
    params = world.init(0, only=('vae',))['vae']
    save_file(conversion.to_torch(world.tables['vae'], params), tmp_path / 'VAE.pth')
    return tmp_path / 'VAE.pth'


@pytest.mark.parametrize(
    ('recipe', 'layers', 'span'),
    [
        ('doom:CAUSAL', 1, (0, 1)),
        ('doom:CAUSAL', 4, (0, 2)),
        ('the_matrix:STAGE4', 2, (1, 2)),
        ('the_matrix:STAGE4', 3, (1, 3)),
    ],
)
def test_a_shorter_network_keeps_the_share_of_its_blocks(recipe, layers, span):
    cfg = converter.shorten(recipes.load(recipe).world, layers)
    differ = getattr(cfg.dit, 'control', None) or cfg.dit.actions
    assert (cfg.dit.layers, differ.start, differ.end) == (layers, *span)
    worlds.build(cfg).shapes()


def test_a_pickle_becomes_the_part_that_it_is_called(world, source, tmp_path):
    line = converter.convert(world.cfg, source, tmp_path / 'new' / 'vae', shutil.copy)
    assert line == f'{tmp_path}/new/vae: vae of {source}'
    made = conversion.flatten(world.load(tmp_path / 'new', only=('vae',))['vae'])
    want = conversion.flatten(world.init(0, only=('vae',))['vae'])
    assert made.keys() == want.keys()
    assert all(np.array_equal(made[path], want[path]) for path in want)
    assert worlds.describe(world.cfg, tmp_path / 'new').cfg.vae == world.cfg.vae


@pytest.mark.parametrize(
    ('target', 'error', 'said'),
    [
        (
            'new',
            config.UsageError,
            'becomes a .safetensors file, or a part of the recipe (transformer',
        ),
        ('text_encoder', conversion.ConversionError, 'VAE.pth: '),
        (
            'vae',
            conversion.ConversionError,
            'VAE.pth: 1 weight fault(s): missing key decoder.conv_in',
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    world, source, tmp_path, target, error, said
):
    def unpickle(pickle: Path, tensors: Path):
        from safetensors.numpy import load_file

        save_file(
            {
                name: tensor
                for name, tensor in load_file(pickle).items()
                if name != 'decoder.conv_in.conv.bias'
            },
            tensors,
        )

    with pytest.raises(error) as caught:
        converter.convert(world.cfg, source, tmp_path / target, unpickle)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    'recipe, layers, text_layers, said',
    [
        ('the_matrix:STAGE4', 31, None, '--layers: got 31, expected 1 to 30'),
        ('the_matrix:STAGE4', 2, 25, '--text-layers: got 25, expected 1 to 24'),
        ('doom:CAUSAL', 10**6, None, '--layers: got 1000000, expected 1 to '),
        ('matrix_game_3:TINY', 99, None, '--layers: got 99, expected 1 to '),
        ('the_matrix:STAGE4', 0, None, '--layers: got 0, expected at least 1'),
    ],
)
def test_no_network_has_more_layers_than_its_recipe(recipe, layers, text_layers, said):
    with pytest.raises(config.UsageError, match=said):
        converter.shorten(recipes.load(recipe).world, layers, text_layers)
