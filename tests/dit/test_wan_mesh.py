"""The Wan DiT and its caches on a mesh equal those of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from matrix_jax.benchmark import roofline_wan
from matrix_jax.benchmark.hlo import collectives, sent_bytes
from matrix_jax.config import Mesh
from matrix_jax.dit import wan
from matrix_jax.parallel import sharding
from matrix_jax.weights import conversion

# Layers with actions have all that layers without have; frames of 2 x 3 sites.
CFG = dataclasses.replace(wan.PRESETS['tiny'], layers=2)
BATCH, BLOCK, BLOCKS = 2, 3, 2


@pytest.fixture(scope='module')
def params():
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: draw(size=leaf.shape).astype('float32') / 4, wan.shapes(CFG))


@pytest.fixture(scope='module')
def given():
    """(latents, level, cond, image, mouse, keyboard) of a clip."""
    frames, draw = BLOCK * BLOCKS, np.random.default_rng(1).normal
    latents, cond, image, mouse, keyboard = (
        draw(size=(BATCH, *shape)).astype('float32')
        for shape in (
            (frames, 4, 6, CFG.channels),
            (frames, 4, 6, CFG.cond_channels),
            (CFG.image_length, CFG.image_dim),
            (4 * frames - 3, 2),
            (4 * frames - 3, 4),
        )
    )
    return latents, np.full((BATCH, frames), 300, np.float32), cond, image, mouse, keyboard


def place(params, mesh):
    """Parameters, sharded as in a world."""
    axes = conversion.axes(wan.weights(CFG))
    return jax.device_put(params, sharding.param_shardings(axes, params, mesh))


def stream(params, given):
    """(v of all blocks, the last caches, collectives of a block)."""
    latents, level, cond, image, mouse, keyboard = given
    caches = jax.jit(
        lambda params, image: wan.WanTransformer(CFG).apply(
            {'params': params}, image, wan.init_caches(CFG, BATCH, 4, 6), method='read_image'
        )
    )(params, image)
    call = jax.jit(
        lambda params, *args: wan.WanTransformer(CFG).apply(
            {'params': params}, *args, method='cached'
        )
    )
    made = []
    for start in range(0, latents.shape[1], BLOCK):
        span = slice(start, start + BLOCK)
        told = (
            latents[:, span],
            level[:, span],
            cond[:, span],
            *(wan.windows(actions, start, BLOCK) for actions in (mouse, keyboard)),
        )
        v, caches = call(params, caches, *told)
        made.append(np.asarray(v))
        caches = wan.advance(caches, BLOCK)
    assert call._cache_size() == 1  # caches lie after a call as they did before it
    found = collectives(call.lower(params, caches, *told).compile().as_text(), 8)
    return np.concatenate(made, axis=1), caches, found


@pytest.fixture(scope='module')
def alone(params, given):
    return stream(params, given)


def test_caches_split_over_all_axes_of_a_mesh(params, given, alone):
    mesh = sharding.make_mesh(Mesh(data=2, tensor=2, seq=2))
    with jax.set_mesh(mesh):
        v, caches, _ = stream(place(params, mesh), given)
    np.testing.assert_allclose(v, alone[0], atol=2e-5)
    past, one = caches.runs['acting'], alone[1].runs['acting']
    for cache, split in ((past.video, 'seq'), (past.mouse, 'seq'), (past.keyboard, None)):
        assert tuple(cache.k.sharding.spec)[1:5] in (
            (('data', 'fsdp'), None, split, 'tensor'),
            ('data', None, split, 'tensor'),
        )
    for leaf, want in zip(jax.tree.leaves(past), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(leaf, want, atol=2e-5)


@pytest.mark.parametrize(
    'mesh',
    [Mesh(seq=2), Mesh(seq=3), Mesh(seq=5), Mesh(seq=6), Mesh(seq=8), Mesh(data=2, seq=4)],
    ids=str,
)
def test_any_number_of_devices_shares_sites_and_caches(mesh, params, given, alone):
    """Six sites; if they do not divide, the caches have padding."""
    with jax.set_mesh(sharding.make_mesh(mesh)):
        v, caches, found = stream(params, given)
    assert np.abs(v - alone[0]).max() <= 2e-6 * np.abs(alone[0]).max()
    cache, one = caches.runs['acting'].video.k, alone[1].runs['acting'].video.k
    assert cache.sharding.shard_shape(cache.shape)[3] == -(-6 // mesh.seq)
    np.testing.assert_allclose(cache[:, :, :, :6], one, atol=2e-5)
    # The two heads are traded by two devices: those of the queries, those of all that is
    # remembered, and the results. Else keys and values are gathered; and last the prediction.
    trades = {'all-to-all': 3 * CFG.layers, 'all-gather': 1}
    counts = {kind: one['count'] for kind, one in found.items()}
    assert counts == (trades if mesh.seq == 2 else {'all-gather': CFG.layers + 1})
    # The bytes are those that the page on performance counts with.
    what, attention = roofline_wan.exchanged(CFG, BLOCK, 4, 6, mesh.seq)
    prediction = 4 * BLOCK * -(-6 // mesh.seq) * (mesh.seq - 1) * CFG.patch**2 * CFG.channels
    assert what == ('heads' if mesh.seq == 2 else 'keys')
    assert sent_bytes(found) == pytest.approx(BATCH // mesh.data * (attention + prediction))


def test_a_whole_clip_whose_sites_do_not_divide(params, given):
    """Six sites on four devices, and parameters split over two."""
    whole = jax.jit(functools.partial(wan.WanTransformer(CFG).apply, block=BLOCK))
    want = whole({'params': params}, *given)
    mesh = sharding.make_mesh(Mesh(fsdp=2, seq=4))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(whole({'params': place(params, mesh)}, *given), want, atol=2e-5)
    assert np.std(want) > 0.1
