"""Matrix-Game 3.0 with two experts: each makes its own steps, wherever its parameters lie."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import Mesh, UsageError
from matrix_jax.diffusion import unipc
from matrix_jax.parallel import sharding
from matrix_jax.recipes import change
from matrix_jax.stream import memory
from matrix_jax.weights import conversion, converter, diffusers_layout
from matrix_jax.worlds import matrix_game_3_networks as networks
from matrix_jax.worlds.matrix_game_3 import network

STEPS = 4  # levels 999, 937, 833 and 624: two for each expert


def build(**fields):
    fields = {'stream.solver': unipc.Config(STEPS)} | fields
    return worlds.build(change(recipes.load('matrix_game_3:TINY_MOE').world, fields)).shortened(1)


@functools.cache
def drawn():
    return build().init(0, zero_init=False)


@functools.cache
def given():
    """(carry, actions, noise) of a segment behind the first one."""
    cfg, chance = build().cfg, np.random.default_rng(0)
    stream = cfg.stream

    def some(*shape):
        return chance.normal(size=(1, *shape)).astype(np.float32)

    height, width = (size // cfg.vae.spatial_compression for size in (cfg.height, cfg.width))
    text = some(cfg.dit.text_length, cfg.dit.text_dim)
    cond = memory.Cond(some(1, height, width, cfg.dit.channels), text, 0.5 * text)
    keys = jax.random.split(jax.random.key(0), 1)
    carry = memory.initial_carry(stream, net(), cond, keys)
    carry = dataclasses.replace(carry, segment=carry.segment + 1)
    actions = chance.integers(0, 2, (1, stream.segment_actions, 8)).astype(np.float32)
    return carry, actions, some(stream.overlap + stream.new, height, width, cfg.dit.channels)


def net(cfg=None):
    cfg = cfg or build().cfg
    return network(cfg.dit, cfg.vae.spatial_compression, cfg.stream.experts)


def segment(cfg, params):
    """(new latents, latents before each step, inputs of the network) of the segment."""
    make = jax.jit(functools.partial(memory.next_segment, cfg.stream, net(cfg)))
    _, x, trace = make(params, *given())
    return x, trace.latents, trace.segment


@functools.cache
def mixture():
    return segment(build().cfg, drawn())


def test_each_step_is_that_of_one_expert_alone():
    """The mixture against single calls of both networks, as a world without experts makes them."""
    cfg, params = build().cfg, drawn()
    x, before, inputs = mixture()
    table, count = unipc.step_table(cfg.stream.solver), cfg.stream.overlap
    alone = worlds.build(change(cfg, {'stream.experts': None}))
    denoise = jax.jit(network(alone.cfg.dit, cfg.vae.spatial_compression).denoise)
    noisy = np.arange(before.shape[2]) >= count
    history, latents = unipc.init(before[0]), before[0]
    for index, name in enumerate(2 * ['transformer'] + 2 * ['transformer_2']):
        np.testing.assert_allclose(latents, before[index], atol=1e-5)
        row = jax.tree.map(lambda column, index=index: column[index], table)
        levels = np.where(noisy, row.level, 0)[None]
        v = denoise({'transformer': params[name]}, latents, levels, inputs)
        history, latents = unipc.step(row, history, latents, v)
        latents = np.concatenate([before[0][:, :count], latents[:, count:]], axis=1)
    np.testing.assert_allclose(latents[:, count:], x, atol=1e-5)

    # What 8-bit layers are compared by: the first call of the first network, from other noise.
    carry, actions, noise = given()
    noise = jax.random.normal(jax.random.key(0), noise.shape)
    start = np.concatenate([carry.history, noise[:, count:]], axis=1)
    want = denoise(params, start, np.where(noisy, table.level[0], 0)[None], inputs)
    v = jax.jit(build().first_prediction)(params, carry, actions)
    np.testing.assert_allclose(v, want[:, count:], atol=1e-4)


def test_experts_in_host_memory_make_the_same_latents():
    world, params = build(**{'stream.experts.offload': True}), drawn()
    mesh = sharding.make_mesh(Mesh(fsdp=4, seq=2))
    placed = world.device_put(params, mesh)
    kinds = {
        name: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}
        for name, tree in placed.items()
    }
    assert kinds.pop('transformer') == kinds.pop('transformer_2') == {'pinned_host'}
    assert set.union(*kinds.values()) == {'device'}
    with sharding.use_mesh(mesh):
        x, _, _ = segment(world.cfg, placed)
    np.testing.assert_allclose(x, mixture()[0], atol=1e-5)


def test_8_bit_layers_stay_in_host_memory_until_their_expert_runs():
    world = build(**{'stream.experts.offload': True, 'dit.int8': 'attention'})
    params = world.quantize(world.device_put(drawn(), sharding.make_mesh(Mesh())))['transformer_2']
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {'pinned_host'}
    moved = jax.jit(networks.from_host)(params, np.zeros(1, np.float32))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved)} == {'device'}
    for one, other in zip(*map(jax.tree.leaves, (moved, params)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_folder_holds_both_experts(tmp_path):
    cfg = build().cfg
    folder = tmp_path / 'two'
    converter.write_random(cfg, str(folder), seed=0)
    want = worlds.describe(cfg, folder, whole=True).load(folder)
    assert {'transformer', 'transformer_2'} <= set(want)
    pairs = zip(*map(jax.tree.leaves, (want['transformer'], want['transformer_2'])), strict=True)
    assert any((one != other).any() for one, other in pairs)
    # The names of Wan 2.2.
    (folder / 'transformer').rename(folder / 'high_noise_model')
    (folder / 'transformer_2').rename(folder / 'low_noise_model')
    made = worlds.describe(cfg, folder, whole=True).load(folder)
    for path, leaf in conversion.flatten(want).items():
        np.testing.assert_array_equal(conversion.flatten(made)[path], leaf)
    # Experts of other sizes do not go together.
    released, tensors = diffusers_layout.read_component(folder, 'low_noise_model')
    diffusers_layout.write_component(
        folder, 'low_noise_model', released | {'eps': 1e-5}, tensors, dtype=None
    )
    with pytest.raises(diffusers_layout.CheckpointError, match='transformer_2 has another config'):
        worlds.describe(cfg, folder, whole=True)


def test_an_adapter_of_one_network_is_refused(tmp_path):
    folder = tmp_path / 'two'
    converter.write_random(build().cfg, str(folder), seed=0)
    run = recipes.load('matrix_game_3:TINY_MOE', [f'--weights={folder}', '--lora=adapter'])
    with pytest.raises(UsageError, match='this world has two networks'):
        worlds.open_run(run)


def test_the_published_size():
    world = worlds.build(recipes.load('matrix_game_3:MOE').world)
    sizes = world.sizes(sharding.abstract_mesh(Mesh()))
    assert sizes['transformer'] == sizes['transformer_2'] == (18_994_195_392,) * 2
    levels = [table.level for table, _ in world.cfg.stream.runs]
    assert levels[0].min() >= 900 > levels[1].max() and sum(map(len, levels)) == 40
    assert world.cfg.stream.passes == 80
    offloaded = worlds.build(change(world.cfg, {'stream.experts.offload': True}))
    last = offloaded.summary(sharding.abstract_mesh(Mesh(fsdp=8))).splitlines()[-1]
    assert last.startswith('at a time') and '25,379,794,396 parameters' in last


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'boundary': 1.0}, 'boundary: got 1, expected between 0 and 1'),
        ({'boundary': 0.5}, 'got 0.5, expected a step of each network; .* levels 999 to 624'),
        ({'low_guidance': 0.5}, 'low_guidance: got 0.5, expected at least 1'),
    ],
)
def test_bad_experts_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        build(**{f'stream.experts.{name}': value for name, value in fields.items()})
