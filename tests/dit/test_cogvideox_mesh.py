"""The CogVideoX DiT gives the same result with its tokens split over devices.

Equal to 2e-6 of the largest value, as only the order of some sums differs.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from matrix_jax.benchmark import roofline_cogvideox
from matrix_jax.benchmark.hlo import collectives, sent_bytes
from matrix_jax.config import Mesh
from matrix_jax.dit import cogvideox
from matrix_jax.parallel import sharding

BATCH, FRAMES, ROWS, COLUMNS, PLACES = 2, 3, 6, 10, 15
# Six heads divide by 2, 3 and 6 devices; 5 and 8 devices gather keys, as 8 do for 30 heads. Seven
# text tokens divide by no mesh, the 15 of a frame by 3 and 5.
CFG = cogvideox.Config(
    heads=6,
    head_dim=8,
    channels=4,
    layers=2,
    time_dim=24,
    text_dim=20,
    text_length=7,
    control=cogvideox.ControlConfig(dim=10, start=0, end=2),
)
MESHES = {
    Mesh(): '',
    Mesh(seq=2): 'heads',
    Mesh(seq=3): 'heads',
    Mesh(seq=5): 'keys',
    Mesh(seq=6): 'heads',
    Mesh(seq=8): 'keys',
    Mesh(data=2, seq=3): 'heads',
    Mesh(data=2, seq=4): 'keys',
    Mesh(data=2, tensor=2, seq=2): 'keys',
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def given():
    """(parameters, latents, text, levels, control)."""
    params = jax.tree.map(
        lambda leaf: normal(*leaf.shape, seed=leaf.size) / 4, cogvideox.shapes(CFG)
    )
    level = np.random.default_rng(0).integers(0, 1000, (BATCH, FRAMES))
    return (
        params,
        normal(BATCH, FRAMES, ROWS, COLUMNS, CFG.channels),
        normal(BATCH, CFG.text_length, CFG.text_dim, seed=1),
        level,
        normal(BATCH, FRAMES, CFG.control.dim, seed=2),
    )


def forward(cfg, given):
    """(v, its collectives: kind -> count, bytes that each device sends)."""
    function = jax.jit(
        lambda params, *args: cogvideox.CogVideoXTransformer(cfg).apply({'params': params}, *args)
    )
    compiled = function.lower(*given).compile()
    found = collectives(compiled.as_text(), 8)
    return compiled(*given), {kind: one['count'] for kind, one in found.items()}, sent_bytes(found)


@pytest.fixture(scope='module')
def alone(given):
    v, found, _ = forward(CFG, given)
    assert not found and np.std(v) > 0.1
    return np.asarray(v)


def expected(exchange):
    """Expected collectives: kind -> count.

    Only self-attention exchanges tokens: by two all-to-alls (queries, keys and values, then
    results) or one all-gather of keys and values. One more all-gather is of the prediction.
    """
    if exchange == 'heads':
        return {'all-to-all': 2 * CFG.layers, 'all-gather': 1}
    return {'all-gather': CFG.layers + 1}


def close(made, wanted):
    assert np.abs(np.asarray(made) - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_split_tokens_equal_one_device_and_are_exchanged_only_in_attention(mesh, given, alone):
    with jax.set_mesh(sharding.make_mesh(mesh)):
        v, found, moved = forward(CFG, given)
    close(v, alone)
    if mesh.tensor > 1:  # tensor parallelism has its own collectives
        return
    if mesh.devices == 1:
        assert not found
        return
    assert found == expected(MESHES[mesh])
    what, attention = roofline_cogvideox.exchanged(CFG, FRAMES, ROWS, COLUMNS, mesh.seq)
    padded = -(-PLACES // mesh.seq) * (mesh.seq - 1)
    prediction = 4 * FRAMES * padded * CFG.patch**2 * CFG.channels
    assert what == MESHES[mesh]
    assert moved == pytest.approx(BATCH // mesh.data * (attention + prediction))


def test_the_config_chooses_the_exchange(given, alone):
    with jax.set_mesh(sharding.make_mesh(Mesh(seq=3))):
        v, found, _ = forward(dataclasses.replace(CFG, exchange='keys'), given)
    close(v, alone)
    assert found == expected('keys')
    with (
        jax.set_mesh(sharding.make_mesh(Mesh(seq=5))),
        pytest.raises(ValueError, match='6 heads do not divide by mesh.seq = 5'),
    ):
        jax.eval_shape(
            functools.partial(forward, dataclasses.replace(CFG, exchange='heads')), given
        )
