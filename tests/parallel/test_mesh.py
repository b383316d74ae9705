import jax
import pytest

from matrix_jax import config, recipes
from matrix_jax.parallel import sharding
from matrix_jax.parallel.mesh import Mesh


@pytest.mark.parametrize(
    ('mesh', 'sizes'),
    [
        (Mesh(data=2, seq=3), [6, 6]),
        (Mesh(pipeline='1'), [1, 1]),
        (Mesh(pipeline='5dit_3vae'), [5, 3]),
        (Mesh(pipeline='6dit_2vae'), [6, 2]),
        (Mesh(pipeline='1dit_1vae'), [1, 1]),
    ],
)
def test_a_pipeline_has_a_mesh_for_each_part(mesh, sizes):
    network, decoder = sharding.make_meshes(mesh)
    assert [network.size, decoder.size] == sizes
    if mesh.parts:
        devices = [*network.devices.flat, *decoder.devices.flat]
        assert devices == jax.devices()[: mesh.devices]
        assert network.shape['seq'] == sizes[0] and decoder.shape['seq'] == sizes[1]
    else:
        assert network == decoder and network.size == mesh.devices


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--mesh.pipeline=5dit'], "mesh.pipeline: got '5dit', expected the devices of both parts"),
        (['--mesh.pipeline=0dit_3vae'], "such as '5dit_3vae' or '6dit_2vae', or '1'"),
        (
            ['--mesh.seq=2', '--mesh.pipeline=5dit_3vae'],
            'got 5dit_3vae with mesh.seq 2, expected one',
        ),
    ],
)
def test_malformed_pipelines_are_refused(options, message):
    with pytest.raises(config.UsageError, match=message):
        recipes.load('carracing', options)


def test_a_pipeline_needs_enough_devices_and_a_stream():
    with pytest.raises(ValueError, match='got 7dit_2vae = 9 devices, expected at most 8'):
        sharding.make_meshes(Mesh(pipeline='7dit_2vae'))
    with pytest.raises(ValueError, match='expected 1: only streams'):
        sharding.make_mesh(Mesh(pipeline='5dit_3vae'))
