"""What XLA makes of each system's step and of an update for H200s, compiled without one.

`goldens/compiled/counts.json` holds the counts of one version of jax. After a wanted change,
`UPDATE_GOLDENS=1 pytest -n 0 tests/benchmark/test_compile_for.py` writes them anew.
"""

import json
import os
from pathlib import Path

import jax
import pytest

from matrix_jax import config, recipes
from matrix_jax.benchmark import compile_for
from matrix_jax.benchmark import target as targets
from matrix_jax.cli import benchmark, train
from matrix_jax.cli.parser import main_guard
from matrix_jax.parallel import compile_only

GOLDEN = Path(__file__).parents[1] / 'goldens/compiled/counts.json'
BFLOAT16 = ['--world.dit.dtype', 'bfloat16', '--world.vae.dtype', 'bfloat16']
# Heads of 16: cuDNN takes multiples of 8. One loop of layers, few levels of the autoencoder.
SMALL = {
    'the_matrix:TINY': [
        *('--world.vae.single_latent_frames', '1', '--world.vae.temporal_compression', '2'),
        *('--world.vae.block_out_channels', '8,8', '--world.vae.single_latent_frames', '2'),
        *('--world.height', '16', '--world.width', '24'),
    ],
    'matrix_game_2:TINY': ['--world.dit.head_dim', '16'],
    'matrix_game_3:TINY': [
        *('--world.dit.head_dim', '16', '--world.dit.layers', '1'),
        *('--world.light.dtype', 'bfloat16'),
    ],
}
# Each takes 10 to 20 seconds to compile; the others run with COMPILE_ALL=1 and UPDATE_GOLDENS=1.
USUAL = [*((recipe, 'h200') for recipe in SMALL), ('the_matrix:TINY', 'h200x8')]
SELDOM = [(recipe, 'h200x8') for recipe in SMALL if recipe != 'the_matrix:TINY']

every_program = pytest.mark.skipif(
    not {'COMPILE_ALL', 'UPDATE_GOLDENS'} & set(os.environ), reason='COMPILE_ALL is not set'
)
needs_compiler = pytest.mark.skipif(
    not compile_only.installed(),
    reason="the compiler for GPUs is not installed: pip install -e '.[compile]'",
)


def counts(recipe, gpus):
    """What the first step of a recipe at test size consists of."""
    run = recipes.load(recipe, [*BFLOAT16, *SMALL[recipe]])
    run, devices = compile_for.prepare(run, gpus, 'seq')
    world = targets.build(targets.shape(run, random=True))
    programs = compile_for.stream_programs(run, world, devices, settled=False)
    return compile_for.count(programs['end_to_end'], run.mesh.devices)


@needs_compiler
@pytest.mark.parametrize(
    'recipe, gpus', [*USUAL, *(pytest.param(*one, marks=every_program) for one in SELDOM)]
)
def test_a_step_compiles_for_gpus(recipe, gpus):
    found = json.loads(json.dumps(counts(recipe, gpus)))
    assert found['attention']['cudnn'] > 0
    assert found['convolutions'] and set(found['convolutions']) == {'channels last, bf16'}
    assert not found['transposed_bytes'] and not found['float64'] and not found['callbacks']
    assert bool(found['collectives']) == (gpus != 'h200')
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get('UPDATE_GOLDENS'):
        golden = golden | {'jax': jax.__version__}
        golden[recipe] = golden.get(recipe, {}) | {gpus: found}
        GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')
    if golden['jax'] == jax.__version__:
        assert found == golden[recipe][gpus]


@needs_compiler
@every_program
def test_without_the_option_convolutions_are_channels_first(monkeypatch):
    monkeypatch.setattr(compile_for.compilation, 'CHANNELS_LAST', {})
    compile_for.compilation._compiler_options.cache_clear()
    try:
        found = counts('the_matrix:TINY', 'h200')
    finally:
        compile_for.compilation._compiler_options.cache_clear()
    assert found['convolutions']['channels first, bf16'] > 0 and found['transposed_bytes'] > 0


def test_the_private_functions_of_jax_that_ask_for_a_gpu_are_there():
    from jax._src.cudnn import fused_attention_stablehlo as door

    before = {name: getattr(door, name) for name in compile_only.CUDNN_CHECKS}
    with compile_only.tracing():
        assert door.check_cudnn_version() >= 90000
        assert door.check_compute_capability('8.0') and not door.check_compute_capability('10.0')
        assert door.is_cuda_compute_capability_equal('9.0')
    assert before == {name: getattr(door, name) for name in before}


@pytest.mark.parametrize(
    'mesh, count, wanted',
    [
        (config.Mesh(), 1, config.Mesh()),
        (config.Mesh(), 8, config.Mesh(seq=8)),
        (config.Mesh(seq=2, data=4), 8, config.Mesh(seq=2, data=4)),
        (config.Mesh(pipeline='5dit_3vae'), 8, config.Mesh(pipeline='5dit_3vae')),
    ],
)
def test_the_mesh_has_as_many_devices_as_there_are_gpus(mesh, count, wanted):
    assert compile_only.fit_mesh(mesh, count, 'seq') == wanted


@pytest.mark.parametrize(
    'main, argv, said',
    [
        (benchmark.main, ['--compile-for', 'h100'], 'got h100, expected h200, or h200x2 to h200x8'),
        (
            benchmark.main,
            ['--compile-for', 'h200x8', '--mesh.seq', '2'],
            'got 8 GPU(s), expected 2, as many as the mesh has',
        ),
        (benchmark.main, ['--compile-for', 'h200', '--count'], 'got --count and --compile-for'),
        (train.main, ['--compile-for', 'h200'], 'got h200 without --dry-run'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_the_door_refuses(main, argv, said, capsys):
    options = ['--random'] * (main is benchmark.main)
    with pytest.raises(SystemExit) as stop:
        main_guard(main, ['the_matrix:TINY_SWIN', *options, *argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compile_only, 'PLUGIN', 'no_such_plugin')
    compile_only.devices.cache_clear()
    with pytest.raises(SystemExit) as stop:
        main_guard(benchmark.main, ['the_matrix:TINY', '--random', '--compile-for', 'h200'])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err == (
        'error: --compile-for: needs no_such_plugin, which is not installed: '
        "pip install -e '.[compile]'\n"
    )


FOUND = {
    'memory': {'in all': 2**21},
    'launches': 1234,
    'attention': {'cudnn': 3, 'gradient': 0, 'dense': 1},
    'convolutions': {'channels first, bf16': 2},
    'collectives': {'all-gather': {'count': 2, 'bytes': 2**20, 'overlapped': 1}},
    'flops': 2e9,
    'bytes': 3e9,
    'transposed_bytes': 1e9,
    'float64': False,
    'callbacks': 0,
}


def test_the_page_adds_up_what_a_step_takes_at_least():
    rates = {'tflops': 1, 'memory': 1e12, 'link': 2**30, 'frames': 3}
    text = compile_for.page('a title', {'end_to_end': FOUND}, 'step', rates)
    for row in (
        '| attention by cuDNN | 3 of 4 |',
        '| convolutions | 2 channels first, bf16 |',
        '| all-gather | 2, 1.0 MiB sent (0.98 ms), 1 with products meanwhile |',
        '| all other kernels | 3.00 GB, 3.00 ms |',
        '| the step takes at least | 6.0 ms, what is sent not counted |',
        '| frames per second at most | 500 |',
    ):
        assert row in text
