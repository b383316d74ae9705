"""Networks of a world: drawn, written, read, placed and counted, on The Matrix at test size."""

import dataclasses
import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest

from matrix_jax import config, recipes, worlds
from matrix_jax.nn import initializers
from matrix_jax.parallel import sharding
from matrix_jax.weights import conversion
from matrix_jax.weights.diffusers_layout import CheckpointError

RUN = recipes.load('the_matrix:TINY')


@pytest.fixture(scope='module')
def world():
    return worlds.build(RUN.world)


def test_initial_parameters_follow_the_seed_and_the_rules(world):
    params, again, other = world.init(0), world.init(0), world.init(1)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, world.shapes())
    jax.tree.map(np.testing.assert_array_equal, params, again)
    flat, second = conversion.flatten(params), conversion.flatten(other)
    kernel = 'transformer/steered/block/mlp/up/kernel'
    assert (flat[kernel] != second[kernel]).all() and (flat[kernel][0] != flat[kernel][1]).all()
    std = (2 / sum(flat[kernel].shape[1:])) ** 0.5
    np.testing.assert_allclose(flat[kernel].std(), std, rtol=0.1)
    embedding = flat['text_encoder/embedding']
    assert abs(embedding.mean()) < 0.1 and abs(embedding.std() - 1) < 0.1
    assert not any(
        flat[f'transformer/{path}'].any()
        for path in (
            'out/kernel',
            'steered/control/norm1/linear/kernel',
            'before/norm2/linear/kernel',
        )
    )
    assert (flat['vae/decoder/norm_out/conv_y/bias'] == 1).all()
    assert all((leaf == 1).all() for path, leaf in flat.items() if path.endswith('/scale'))


def test_random_parameters_have_no_zero_kernel(world):
    flat = conversion.flatten(world.init(0, zero_init=False, only=('transformer',)))
    assert all(leaf.any() for path, leaf in flat.items() if path.endswith('kernel'))
    assert {path.split('/')[0] for path in flat} == {'transformer'}


def test_a_leaf_without_a_rule_raises():
    with pytest.raises(ValueError, match='net/table: no rule'):
        initializers.draw((), 'net/table', (2, 2), (0,))


def test_a_folder_gives_back_what_was_written(world, tiny, tmp_path):
    params = world.init(0, zero_init=False)
    found = world.load(tiny)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(ml_dtypes.bfloat16)), found, params
    )
    world.save(tmp_path, {'vae': found['vae']})
    world.save(tmp_path / 'more', {'control_encoder': found['control_encoder']}, start=tmp_path)
    names = {path.name for path in (tmp_path / 'more').iterdir()}
    assert names == {
        'vae',
        'control_encoder',
        'tokenizer',
        'control_tokenizer',
        'scheduler',
        'model_index.json',
        'README.md',
    }
    np.testing.assert_array_equal(
        world.load(tmp_path / 'more', only=('vae',))['vae']['decoder']['conv_in']['kernel'],
        found['vae']['decoder']['conv_in']['kernel'],
    )
    with pytest.raises(CheckpointError, match='no component transformer'):
        world.load(tmp_path / 'more')


def test_a_folder_of_one_component_says_what_a_video_needs(world, tmp_path):
    (tmp_path / 'vae').mkdir()
    (tmp_path / 'vae' / 'config.json').write_text('{}')
    with pytest.raises(CheckpointError, match='no component transformer, text_encoder; it has onl'):
        worlds.describe(world.cfg, tmp_path, whole=True)
    with pytest.raises(CheckpointError, match='vae: is a single component, expected a folder with'):
        worlds.describe(world.cfg, tmp_path / 'vae', whole=True)


def test_parameters_are_sharded_by_their_letters(world):
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, tensor=2))
    params = world.device_put(world.init(0, only=('transformer',)), mesh)
    kernel = params['transformer']['steered']['block']['mlp']['up']['kernel']
    assert tuple(kernel.sharding.spec) == (None, 'fsdp', 'tensor')
    assert kernel.addressable_shards[0].data.shape == (2, 16, 64)


def test_the_summary_counts_bytes_per_device(world):
    def total(shape):
        last = world.summary(sharding.abstract_mesh(shape)).splitlines()[-1].split()
        return int(last[1].replace(',', '')), float(last[3].replace(',', ''))

    count = sum(leaf.size for leaf in jax.tree.leaves(world.init(0)))
    assert total(config.Mesh())[0] == total(config.Mesh(fsdp=64))[0] == count
    assert total(config.Mesh())[1] == pytest.approx(count * 2 / 2**20, abs=0.05)
    assert total(config.Mesh(fsdp=8))[1] < total(config.Mesh())[1]


def test_training_reads_what_the_folder_has(tiny):
    run = dataclasses.replace(RUN, weights=str(tiny))
    world, params = worlds.start(run)
    assert world.tokenizer is not None and set(params) == set(world.tables)
    with pytest.raises(config.UsageError, match='needs --weights'):
        worlds.open_run(RUN)


@pytest.mark.parametrize(
    'recipe, first', [('the_matrix:STAGE4', '5cbd09c10c384828'), ('doom', 'db6e1106a3413e95')]
)
def test_renamed_fields_leave_saved_sessions_readable(recipe, first):
    text = worlds.build(recipes.load(recipe).world).fingerprint_text()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == first
