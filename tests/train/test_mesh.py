"""A stage on a mesh: the curve of one device, state that is split and moves between meshes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from matrix_jax import config, recipes, worlds
from matrix_jax.config import Mesh
from matrix_jax.dit.cogvideox import ControlConfig
from matrix_jax.nn import attention
from matrix_jax.parallel import sharding
from matrix_jax.train import program
from matrix_jax.train import state as states
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.swin_dpm import SwinDPM
from matrix_jax.weights import training_state

STEPS, BATCH = 20, 8
ONE = Mesh()


class Kernels(SwinDPM):
    """Trains few leaves, which compiles faster; `benchmark.scripts.meshes` trains all of them."""

    def trainable(self, path):
        return super().trainable(path) and path.endswith('kernel')


def recipe(mesh=ONE):
    run = recipes.load('the_matrix:TINY_SWIN')
    net = dataclasses.replace(
        run.world.dit, layers=2, control=ControlConfig(dim=16, start=0, end=2)
    )
    return dataclasses.replace(
        run,
        mesh=mesh,
        stage=Kernels(Optimizer(learning_rate=3e-3)),
        world=dataclasses.replace(run.world, dit=net),
        train=config.Train(batch=BATCH, steps=STEPS),
    )


@pytest.fixture(scope='module')
def world():
    return worlds.build(recipe().world).with_tokenizers(None)


@pytest.fixture(scope='module')
def params(world):
    drawn = world.init(0, zero_init=False)
    return {name: drawn[name] for name in SwinDPM.components}


@pytest.fixture(scope='module')
def batches(world):
    """As many batches as steps, of windows that a network can learn."""
    cfg, random = world.cfg, np.random.default_rng(0)
    rows = cfg.height // cfg.vae.spatial_compression
    columns = cfg.width // cfg.vae.spatial_compression
    shape = (STEPS, BATCH, cfg.stream.frames, rows, columns, cfg.dit.channels)
    latents = random.normal(size=(*shape[:3], 1, 1, shape[-1])) + 0.1 * random.normal(size=shape)
    keys = random.integers(0, 9, shape[:3])
    ids = np.repeat(world.tokenize(['A car on a road.']), BATCH, axis=0)
    return [
        {'latents': one.astype(np.float16), 'controls': key.astype(np.int32), 'ids': ids}
        for one, key in zip(latents, keys)
    ]


def curve(run, world, params, batches):
    """(losses of the steps, final state)."""
    made = program.build(run, world, params)
    state, losses = made.init(params), []
    for batch in batches:
        state, metrics = made.step(state, made.put(batch))
        losses.append(metrics['loss'])
    return np.asarray(jax.device_get(losses)), state


@pytest.fixture(scope='module')
def alone(world, params, batches):
    return curve(recipe(), world, params, batches)


@pytest.mark.parametrize('mesh', [Mesh(data=8), Mesh(fsdp=8), Mesh(data=2, fsdp=2, seq=2)], ids=str)
def test_the_curve_of_a_mesh_is_that_of_one_device(mesh, alone, world, params, batches):
    losses, _ = curve(recipe(mesh), world, params, batches)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert losses[-1] < 0.8 * losses[0]


def test_every_role_lies_alike_and_state_moves_between_meshes(alone, world, params, tmp_path):
    """Saved on one device, restored split over eight: the same bits."""
    made = program.build(recipe(Mesh(fsdp=4, tensor=2)), world, params)
    state = made.init(params)
    path = 'transformer/steered/block/mlp/up/kernel'
    nodes = jax.tree.leaves(state.opt, is_leaf=lambda node: isinstance(node, dict))
    moments = [node for node in nodes if isinstance(node, dict)]
    assert len(moments) == 2
    for role in (state.student, state.ema, *moments):
        assert tuple(role[path].sharding.spec) == (None, 'fsdp', 'tensor')
    assert tuple(state.frozen['text_encoder/layers/wi_0/kernel'].sharding.spec)[1] == 'fsdp'
    saver = training_state.Checkpoints(tmp_path / 'state')
    saver.save(STEPS, alone[1])
    _, moved, _ = saver.restore(state)
    saver.close()
    assert jax.tree.map(lambda leaf: leaf.sharding, moved) == made.places
    for old, new in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_teacher_lies_like_its_student():
    run = recipes.load('the_matrix:TINY_CONSISTENCY', ['--mesh.fsdp', '2'])
    world = worlds.build(run.world)
    made = program.build(run, world, run.stage.start(world, world.shapes(), 0))
    path = 'steered/block/mlp/up/kernel'
    assert tuple(made.places.student[f'transformer/{path}'].spec)[1] == 'fsdp'
    assert made.places.frozen[f'teacher/{path}'] == made.places.student[f'transformer/{path}']


def test_what_trains_is_float32_whatever_the_network_computes_in():
    run = recipes.load('the_matrix:TINY_SWIN', ['--world.dit.dtype', 'bfloat16'])
    world = worlds.build(run.world)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, 'bfloat16'), world.shapes())
    state = jax.eval_shape(program.build(run, world, half).start, half)
    for role, dtype in (('student', 'float32'), ('ema', 'float32'), ('frozen', 'bfloat16')):
        assert {str(leaf.dtype) for leaf in getattr(state, role).values()} == {dtype}


def test_a_batch_that_does_not_split_is_refused(world, params):
    with pytest.raises(
        ValueError,
        match='train.batch: got 8, expected a multiple of mesh.data x mesh.fsdp = 3 x 2 = 6',
    ):
        program.build(recipe(Mesh(data=3, fsdp=2)), world, params)


# --- accumulation --------------------------------------------------------------------------------


def square(params, batch, key):
    """A loss without noise."""
    y = batch['x'] @ params['line']['kernel']
    return jnp.square(y - 1).mean(), {'mean': y.mean()}


def noisy(params, batch, key):
    return square(params, {'x': batch['x'] + jax.random.normal(key, batch['x'].shape)}, key)


@pytest.mark.parametrize('loss', [square, noisy])
def test_accumulated_batches_are_one_batch(loss):
    """Equal for a loss without noise; with noise each part draws its own."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    tx = optax.sgd(0.1)
    state = states.init({'line': {'kernel': np.ones((3, 2))}}, lambda path: True, tx, 0)
    found, metrics = jax.jit(states.make_step(loss, tx, 0.9, accumulate=2))(state, {'x': x})

    def whole(params, batch, key):
        if loss is square:
            return square(params, batch, key)
        parts = [
            noisy(params, {'x': batch['x'][part::2]}, one)
            for part, one in enumerate(jax.random.split(key))
        ]
        return jax.tree.map(lambda *leaves: sum(leaves) / 2, *parts)

    wanted, expected = jax.jit(states.make_step(whole, tx, 0.9))(state, {'x': x})
    np.testing.assert_allclose(
        found.student['line/kernel'], wanted.student['line/kernel'], rtol=1e-6
    )
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


# --- within the network --------------------------------------------------------------------------


@pytest.mark.parametrize('tokens', [30, 31])
def test_attention_in_blocks_and_on_a_mesh_is_attention(tokens, monkeypatch):
    """Tokens that do not split over seq stay whole."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, tokens, 4, 8))

    def value(q, k, v):
        return jnp.square(attention.attention(q, k, v)).sum()

    wanted = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)
    monkeypatch.setattr(attention, 'LOGITS', 700)
    for mesh in (ONE, Mesh(data=2, tensor=2, seq=2)):
        with jax.set_mesh(sharding.make_mesh(mesh)):
            found = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.zeros((2, 3, 4))
    assert sharding.constrain(x, 'batch', 'tokens', None) is x
    assert sharding.per_device(jnp.sin, (('batch', None, None),), 0)(x).shape == x.shape


@pytest.mark.parametrize('shard_frozen', [True, False])
def test_frozen_parameters_may_be_whole_on_every_device(shard_frozen):
    run = recipes.load(
        'the_matrix:TINY_SWIN', ['--mesh.fsdp=2', f'--train.shard_frozen={shard_frozen}']
    )
    world = worlds.build(run.world).with_tokenizers(None)
    params = run.stage.start(world, world.shapes(), 0)
    places = program.build(run, world, params).places
    whole = [place.is_fully_replicated for place in jax.tree.leaves(places.frozen)]
    assert all(whole) != shard_frozen
    assert not all(place.is_fully_replicated for place in jax.tree.leaves(places.student))
