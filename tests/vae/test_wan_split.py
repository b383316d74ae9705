"""The Wan autoencoder gives the same result with its rows split over devices."""

import functools

import jax
import numpy as np
import pytest

from matrix_jax.config import Mesh
from matrix_jax.parallel import sharding
from matrix_jax.vae import wan as vae
from tests.vae.drawn import normal

ROWS = 4  # over 3 devices the last has none
CFG = vae.PRESETS['tiny']


@pytest.fixture(scope='module')
def params():
    return jax.tree.map(
        lambda leaf: normal(*leaf.shape, seed=leaf.size, scale=0.3), vae.shapes(CFG)
    )


def on(mesh, function, *given):
    """Results of a function of the autoencoder on a mesh; None for the mesh is no mesh."""
    function = jax.jit(
        functools.partial(function, CFG), compiler_options={'xla_backend_optimization_level': 0}
    )
    if mesh is None:
        return function(*given)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        return function(*given)


def same(made, wanted):
    """Whether trees are equal, except for padding rows in caches."""
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one)[:, :, : other.shape[2]], np.asarray(other)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 2e-6 * max(np.abs(other).max(), 1)


def test_a_split_decoder_equals_one_device(params):
    latents = normal(2, 3, ROWS, 2, 4)
    wanted = on(None, vae.prefill, params, latents)
    assert np.std(wanted[1]) > 0.1
    for mesh in (Mesh(data=2, seq=2), Mesh(seq=3)):
        cache, frames = on(mesh, vae.prefill, params, latents[:, :1])
        more, tail = on(mesh, vae.step, params, cache, latents[:, 1:])
        same((more, np.concatenate([frames, tail], axis=1)), wanted)


def test_a_split_encoder_equals_one_device(params):
    frames = normal(1, 3, 2 * ROWS, 4, 3)
    same(
        on(Mesh(seq=3), vae.encode_step, params, None, frames),
        on(None, vae.encode_step, params, None, frames),
    )
