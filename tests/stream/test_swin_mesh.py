"""The stream of a small world on several devices equals that on one device.

Held to 1e-5 of the largest value, after three shifts of two calls each under guidance; frames,
which are whole grey levels, to one of them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from matrix_jax import recipes
from matrix_jax.benchmark import target
from matrix_jax.benchmark.hlo import collectives
from matrix_jax.config import Mesh
from matrix_jax.dit.cogvideox import ControlConfig
from matrix_jax.parallel import sharding

SHIFTS = 3


@pytest.fixture(scope='module')
def world():
    """Frames of 5 x 2 tokens, 12 text tokens; six heads do not divide by 5 or 8 devices."""
    cfg = recipes.load('the_matrix:TINY').world
    return target.build(
        dataclasses.replace(
            cfg,
            height=20,
            width=8,
            decode_chunk=1,
            dit=dataclasses.replace(
                cfg.dit, heads=6, head_dim=8, layers=1, control=ControlConfig(16, 0, 1)
            ),
            vae=dataclasses.replace(
                cfg.vae,
                block_out_channels=(4, 8),
                layers_per_block=0,
                temporal_compression=2,
                single_latent_frames=2,
            ),
            stream=dataclasses.replace(cfg.stream, groups=2, group_frames=1, steps=4, guidance=3.0),
        )
    )


@pytest.fixture(scope='module')
def start(world):
    """(parameters, condition) of a stream."""
    params = world.init(0, zero_init=False, only=('transformer', 'vae'))
    return world.quantize(params), target.random_condition(world)


def play(stream, start, mesh=None):
    """Returns (outputs of all shifts, last carry, collectives: kind -> count)."""
    place = sharding.replicated(mesh) if mesh else jax.devices()[0]
    params, cond = jax.device_put(start, place)
    with sharding.use_mesh(mesh):
        carry = jax.jit(stream.init)(params, cond, jax.random.key(0))
        step = jax.jit(stream.step, out_shardings=(sharding.tree_shardings(carry), None))
        made = []
        for shift in range(SHIFTS):
            given = carry, np.full((1, 1), shift, np.int32)
            carry, output = step(params, *given)
            made.append(np.asarray(output))
        assert step._cache_size() == 1  # nothing compiles between shifts
        found = collectives(step.lower(params, *given).compile().as_text(), 8) if mesh else {}
    return np.stack(made), carry, {kind: one['count'] for kind, one in found.items()}


@pytest.fixture(scope='module')
def alone(world, start):
    latents, carry, _ = play(world.stages()['stream'], start)
    assert np.std(latents) > 0.1 and not np.allclose(latents[0], latents[1], atol=0.1)
    return latents, np.asarray(carry.window)


@pytest.mark.parametrize(
    'mesh',
    [
        Mesh(),
        Mesh(seq=2),
        Mesh(seq=3),
        Mesh(seq=5),
        Mesh(seq=6),
        Mesh(seq=8),
        Mesh(data=2, seq=3),
        Mesh(data=2, seq=4),
    ],
    ids=str,
)
def test_latents_on_a_mesh_equal_those_on_one_device(mesh, world, start, alone):
    """With data=2, the two passes of guidance run on different devices."""
    latents, carry, found = play(world.stages()['stream'], start, sharding.make_mesh(mesh))
    for made, wanted in ((latents, alone[0]), (carry.window, alone[1])):
        assert np.abs(made - wanted).max() <= 1e-5 * np.abs(wanted).max()
    calls = world.cfg.stream.steps // world.cfg.stream.groups
    if mesh.devices == 1:
        assert not found
        return
    heads = world.cfg.dit.heads % mesh.seq == 0
    assert found.pop('all-to-all', 0) == 2 * calls * world.cfg.dit.layers * heads
    # The prediction of a call is gathered over seq, and over data if guidance is split.
    gathers = calls * ((not heads) + 1 + (mesh.data > 1))
    assert found == {'all-gather': gathers}


def test_frames_on_a_mesh_equal_those_on_one_device(world, start):
    """Network and decoder are one program on all devices; ten rows of latents lie on three."""
    alone, _, _ = play(world.stream(), start)
    made, _, found = play(world.stream(), start, sharding.make_mesh(Mesh(seq=3)))
    assert made.shape == (SHIFTS, 1, 2, 20, 8, 3) and made.dtype == np.uint8 and alone.std() > 10
    # Rounding to whole grey levels can amplify the last bit of a float.
    assert np.abs(made.astype(int) - alone).max() <= 1 and (made != alone).mean() < 0.01
    assert {'all-to-all', 'collective-permute'} <= set(found)
