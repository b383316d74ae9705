"""Every test runs on the CPU with 8 forced devices, so that the sharding tests always run."""

import os
from importlib.metadata import version

# Before the first import of jax, which reads them once. The suite compiles far more than it
# computes, so the compiler takes it easy; the new way of jax 0.10 to compile loops takes three
# times as long as its old one, and later versions have no choice.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
os.environ['XLA_FLAGS'] = ' '.join(
    [
        *(
            flag
            for flag in os.environ.get('XLA_FLAGS', '').split()
            if not flag.startswith('--xla_force_host_platform_device_count')
        ),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
        '--xla_cpu_parallel_codegen_split_count=1',
        *['--xla_cpu_use_fusion_emitters=false'] * version('jaxlib').startswith('0.10.'),
    ]
)
# The suite needs no network: a forgotten download fails at once in place of hanging.
os.environ['HF_HUB_OFFLINE'] = '1'
# Nor does it leave programs in the home of who runs it.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'

import numpy as np
import pytest

# Files are dealt out to processes in this order and then as collected: the longest first, so that
# no process is left with one of them in the end.
LONGEST = (
    'test_parity.py',
    'test_cogvideox.py',
    'test_calls.py',
    'test_mesh.py',
    'test_consistency.py',
    'test_bundled.py',
    'test_api.py',
    'test_wan_mesh.py',
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


def write_random(recipe, tmp_path_factory):
    """A folder of random weights of a recipe in the diffusers layout."""
    from matrix_jax import recipes
    from matrix_jax.weights import converter

    folder = tmp_path_factory.mktemp('weights') / 'tiny'
    converter.write_random(recipes.load(recipe).world, str(folder), seed=0)
    return folder


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """Random weights of the_matrix:TINY."""
    return write_random('the_matrix:TINY', tmp_path_factory)


@pytest.fixture(scope='session')
def tiny_walk(tmp_path_factory):
    """Random weights of matrix_game_2:TINY, a world of keyboard and mouse."""
    return write_random('matrix_game_2:TINY', tmp_path_factory)


@pytest.fixture(scope='session')
def start_image(tmp_path_factory):
    """A picture to start a clip from."""
    from matrix_jax import video

    path = tmp_path_factory.mktemp('start') / 'start.png'
    colours = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    video.write_image(path, colours.repeat(8, 0).repeat(8, 1))
    return path


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    """A folder of three recorded clips of 9 frames, 32 x 48, of a moving square."""
    from matrix_jax.data import records

    folder = tmp_path_factory.mktemp('clips')

    def clip(index):
        frames = np.full((9, 32, 48, 3), 40 * index + 60, np.uint8)
        for time, frame in enumerate(frames):
            frame[8:20, time : time + 10] = 200
        return records.Clip(
            frames=frames,
            controls=np.full(9, index, np.int8),
            caption='A car on a road.' if index % 2 else 'A car on snow.',
            theme='meadow',
            seed=index,
            fps=16,
            telemetry=np.zeros((9, len(records.TELEMETRY)), np.float32),
        )

    records.write_shard(folder / f'train-0{records.SUFFIX}', (clip(index) for index in range(3)))
    return folder


@pytest.fixture(scope='session')
def compiled_once(tmp_path_factory):
    """The same program compiles once, though every call of a tool makes it anew."""
    import jax

    settings = {
        'jax_enable_compilation_cache': True,
        'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
