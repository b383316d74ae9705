"""The autoencoder with its rows split over devices is the autoencoder of one device.

Held to 1e-6 of the largest value; the difference seen is 2e-7, the order of the sums in the norms.
"""

import functools
import math

import jax
import numpy as np
import pytest

from matrix_jax.benchmark.hlo import collectives
from matrix_jax.config import Mesh
from matrix_jax.parallel import sharding
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion
from tests.vae.drawn import normal

ROWS = 12  # over 5 devices the last has none, over 8 the last two
# One residual block per decoder level: compiling is what takes time here.
CFG = vae.Config(
    latent_channels=4,
    block_out_channels=(4, 8),
    layers_per_block=0,
    norm_groups=2,
    temporal_compression=2,
    single_latent_frames=2,
)


@pytest.fixture(scope='module')
def params():
    shapes = vae.shapes(CFG)
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size, scale=0.3), shapes)


def on(mesh, function, *given):
    """(results, HLO) of a function of the autoencoder on a mesh; None for the mesh is no mesh."""
    function = jax.jit(functools.partial(function, CFG))
    if mesh is None:
        return function(*given), ''
    with jax.set_mesh(sharding.make_mesh(mesh)):
        compiled = function.lower(*given).compile()
        return compiled(*given), compiled.as_text()


def same(made, wanted):
    """Whether trees are equal, except for padding rows in caches."""
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one)[:, :, : other.shape[2]], np.asarray(other)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max()


@pytest.fixture(scope='module')
def following(params):
    """((cache, latents), (cache, frames)) of a step of one device."""
    latents = normal(2, 2, ROWS, 2, 4)
    like, _ = jax.eval_shape(functools.partial(vae.prefill, CFG), params, latents)
    cache = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), like)
    made, _ = on(None, vae.step, params, cache, latents)
    assert made[1].shape == (2, 4, 2 * ROWS, 4, 3) and np.std(made[1]) > 0.1
    return (cache, latents), made


def filled_up(cache, ways):
    """A cache of whole frames, padded as `ways` devices have it."""
    below = -ROWS % ways
    return jax.tree.map(
        lambda leaf: np.pad(
            leaf, ((0, 0), (0, 0), (0, below * leaf.shape[2] // ROWS), (0, 0), (0, 0))
        ),
        cache,
    )


@pytest.mark.parametrize(
    'mesh',
    [Mesh(), Mesh(seq=2), Mesh(data=2, seq=3), Mesh(seq=5), Mesh(seq=6), Mesh(seq=8)],
    ids=str,
)
def test_a_split_decoder_equals_one_device(mesh, params, following):
    (cache, latents), wanted = following
    made, text = on(mesh, vae.step, params, filled_up(cache, mesh.seq), latents)
    same(made, wanted)
    assert made[1].shape == wanted[1].shape
    # A row up and a row down per convolution, one exchange per norm.
    leaves = conversion.flatten(vae.shapes(CFG)['decoder'])
    rows = 2 * sum(
        path.endswith('kernel') and max(leaf.shape[:-2]) > 1 for path, leaf in leaves.items()
    )
    norms = sum(path.endswith('scale') for path in leaves)
    found = {kind: one['count'] for kind, one in collectives(text, 8).items()}
    if mesh.devices == 1:
        assert not found
    elif ROWS % mesh.seq == 0:
        assert found == {'collective-permute': rows, 'all-gather': norms}
    else:  # filling up and cutting off takes a few more
        assert found.pop('collective-permute') - rows in range(8)
        assert sum(found.values()) - norms in range(4)


def test_a_split_encoder_equals_one_device(params):
    frames = normal(2, 5, 2 * ROWS, 4, 3)
    wanted, _ = on(None, vae.encode_step, params, None, frames)
    for mesh in (Mesh(data=2, seq=2), Mesh(seq=5)):
        same(on(mesh, vae.encode_step, params, None, frames)[0], wanted)


def test_caches_stay_split_over_the_devices(params, following):
    """Each device has the rows that it computed."""
    latents = following[0][1]
    wanted, _ = on(None, vae.prefill, params, latents)
    (cache, frames), _ = on(Mesh(seq=4), vae.prefill, params, latents)
    same((cache, frames), wanted)
    for leaf in [*jax.tree.leaves(cache), frames]:
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size
