"""The DiT with memory on a mesh is that of one device."""

import functools

import jax
import numpy as np
import pytest

from matrix_jax.config import Mesh
from matrix_jax.dit import wan_memory
from matrix_jax.parallel import sharding
from matrix_jax.weights import conversion
from tests.dit.test_wan_memory import MEMORY, TINY, inputs, made, noisy


@pytest.mark.parametrize('mesh', [Mesh(data=2, tensor=2, seq=2), Mesh(fsdp=2, seq=4)], ids=str)
def test_any_devices_share_the_sites(mesh):
    """Six sites; where they do not divide, some are padding."""
    params = noisy(TINY)['params']
    mesh = sharding.make_mesh(mesh)
    axes = conversion.axes(wan_memory.weights(TINY))
    placed = jax.device_put(params, sharding.param_shardings(axes, params, mesh))
    call = jax.jit(functools.partial(wan_memory.WanMemoryTransformer(TINY).apply, memory=MEMORY))
    with jax.set_mesh(mesh):
        v = call({'params': placed}, *inputs())
    np.testing.assert_allclose(v, made(), atol=1e-5)
