"""The tool as a whole on the smallest world, its doors, and what PyTorch is given."""

import importlib.util
import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import numpy as np
import pytest

from matrix_jax import config, recipes
from matrix_jax.benchmark import int8, measure, pages, report, target, torch_baseline
from matrix_jax.benchmark import run as modes
from matrix_jax.cli.parser import main_guard
from matrix_jax.dit import cogvideox as dit
from matrix_jax.weights import conversion, diffusers_layout

ROOT = Path(__file__).parents[2]
# Seconds to compile: two levels of the autoencoder, two groups of the window.
SMALL = [
    '--world.vae.single_latent_frames',
    '1',
    '--world.vae.temporal_compression',
    '2',
    '--world.vae.block_out_channels',
    '4,4',
    '--world.vae.single_latent_frames',
    '2',
    '--world.height',
    '8',
    '--world.width',
    '12',
]


def run(*argv):
    """Exit code of the tool, in this process."""
    spec = importlib.util.spec_from_file_location('tools_benchmark', ROOT / 'tools/benchmark.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as stop:
        main_guard(module.main, list(map(str, argv)))
    return stop.value.code


def test_a_benchmark_of_random_weights(tmp_path, capsys):
    assert (
        run(
            'the_matrix:TINY_SWIN',
            *SMALL,
            '--random',
            '--layers',
            2,
            '--steps',
            3,
            '--warmup',
            1,
            '--entries',
            'tail',
            '--peak-tflops',
            1,
            '--out',
            tmp_path,
        )
        == 0
    )
    found = json.loads((tmp_path / 'benchmark.json').read_text())
    parts = found['parts']
    assert all(one['fps'] > 0 and one['p95_ms'] >= one['p50_ms'] for one in parts.values())
    assert found['shape']['layers'] == 2 and found['devices'] == 1
    assert found['frames_per_step'] == 2
    assert found['latency']['late']['noise'] == 0
    assert all(value > 0 for value in found['ceilings_tflops'].values())
    assert found['latency']['late']['changed']['steps'] >= 1
    assert found['mesh_bytes'] == 0 and found['program_bytes'] > 0
    assert min(found['compile_seconds'].values()) > 0
    assert found['memory']['process'] > 1e8
    page = (tmp_path / 'benchmark.md').read_text()
    assert '; 3 steps timed (fewer than 30 steps).' in page and 'not measured' not in page
    assert pages.RANDOM in page and page.strip() in capsys.readouterr().out
    rows = [line for line in page.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in rows[:5]}) == 1


def test_a_benchmark_of_keyboard_and_mouse(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.measure, 'ceilings', lambda *kinds: {'matmul': 1e9, 'conv': 1e9})
    assert (
        run('matrix_game_2:TINY', '--random', '--steps', 2, '--warmup', 1, '--out', tmp_path) == 0
    )
    found = json.loads((tmp_path / 'benchmark.json').read_text())
    assert all(one['fps'] > 0 for one in found['parts'].values()) and len(found['parts']) == 3
    shape = found['shape']
    # Blocks of 3 frames of 2 x 3 sites that see 4 frames; two steps, and one that reads the block.
    assert (shape['tokens'], shape['keys'], shape['calls_per_step']) == (18, 24, 3)
    assert found['frames_per_step'] == 12
    # There is no queue: what is pressed shows in the block that takes it, wherever keys bind.
    assert found['latency'].keys() == {'block'} and found['latency']['block']['noise'] == 0
    assert found['latency']['block']['changed']['steps'] == 1
    page = (tmp_path / 'benchmark.md').read_text()
    assert '18 tokens that see 24, 3 network call(s) and 12 frames per step' in page
    assert '| block | step 1, frame ' in page and 'not measured' not in page


def test_the_errors_of_8_bits_are_a_page(tmp_path, capsys):
    assert (
        run('the_matrix:TINY_SWIN', *SMALL, '--random', '--layers', 2, '--int8', '--out', tmp_path)
        == 0
    )
    found = json.loads((tmp_path / 'benchmark.json').read_text())
    exact, half, attention, blocks = found.values()
    assert exact['prediction']['rms'] == 0 < half['prediction']['rms'] < 0.05
    assert 0 < attention['prediction']['rms'] < blocks['prediction']['rms'] < 0.1
    assert blocks['bytes'] < attention['bytes'] < exact['bytes']
    assert half['to_bfloat16']['latents']['rms'] == 0 < exact['to_bfloat16']['latents']['rms']
    assert (
        0
        < attention['to_bfloat16']['prediction']['rms']
        < blocks['to_bfloat16']['prediction']['rms']
        < 0.1
    )
    page = (tmp_path / 'benchmark.md').read_text()
    assert 'int8 (attention) and float32' in page and page.strip() in capsys.readouterr().out


def test_truncated_8_bits_are_measured_where_a_network_has_them():
    found = {
        name: list(int8.arithmetics(recipes.load(name).world.dit))
        for name in ('the_matrix:TINY_SWIN', 'matrix_game_3:TINY')
    }
    assert found == {
        'the_matrix:TINY_SWIN': [
            'float32',
            'bfloat16',
            'int8 (attention) and float32',
            'int8 (blocks) and float32',
        ],
        'matrix_game_3:TINY': [
            'float32',
            'bfloat16',
            'int8 (attention, rounded) and float32',
            'int8 (attention, truncated) and float32',
        ],
    }


@pytest.mark.parametrize(
    'recipe, frames, decoder',
    [('matrix_game_2:TINY', 12, 'vae'), ('matrix_game_3:TINY', 8, 'vae_decoder')],
)
def test_a_count_of_keyboard_and_mouse(capsys, monkeypatch, recipe, frames, decoder):
    monkeypatch.setattr(modes, 'apart', lambda function, *given: function(*given))
    assert run(recipe, '--random', '--layers', 1, '--count') == 0
    printed = capsys.readouterr().out
    assert '| both |' in printed and '| seq=8 |' in printed
    assert f'{frames} frames per step' in printed and f', {decoder} ' in printed
    assert '| 5dit_3vae |' in printed


def test_a_count_prints_the_floor(capsys, monkeypatch):
    monkeypatch.setattr(modes, 'apart', lambda function, *given: function(*given))
    assert run('the_matrix:TINY_SWIN', *SMALL, '--random', '--count') == 0
    printed = capsys.readouterr().out
    assert '| 5dit_3vae | ' in printed and 'At 791.2 TFLOP/s' in printed
    assert '| both |' in printed


def test_keyboard_and_mouse_on_a_mesh(monkeypatch):
    monkeypatch.setattr(report.measure, 'ceilings', lambda *kinds: {'matmul': 1e9, 'conv': 1e9})
    monkeypatch.setattr(
        report.compiled, 'compile_seconds', lambda build: ({'cold': 2.0, 'cached': 1.0}, build())
    )
    given = target.open_target(recipes.load('matrix_game_2:TINY', ['--mesh.seq', '2']), random=True)
    seen = []
    timed = measure.intervals
    monkeypatch.setattr(
        report.measure, 'intervals', lambda *given: seen.append(given[2]) or timed(*given)
    )
    monkeypatch.setattr(type(given.world), 'warmup_steps', 3)
    found = report.run(
        given,
        measure.Settings(steps=1, warmup=1, entries=()),
        {'dit': 1e6, 'vae': 3e6},
        say=lambda line: None,
    )
    assert set(found['parts']) == {'end_to_end', 'dit', 'vae'} and found['exchange'] == 'heads'
    assert seen == [3, 3, 3]
    # Queries, what is remembered, and the results, in each call of its layer.
    trades = found['collectives']['end_to_end']['all-to-all']['count']
    assert trades == 3 * given.world.cfg.stream.passes


def test_a_pipeline_is_measured_whole_and_by_its_parts(monkeypatch):
    monkeypatch.setattr(report.measure, 'ceilings', lambda *kinds: {'matmul': 1e9, 'conv': 1e9})
    monkeypatch.setattr(
        report.compiled, 'compile_seconds', lambda build: ({'cold': 2.0, 'cached': 1.0}, build())
    )
    given = target.open_target(
        recipes.load('the_matrix:TINY_SWIN', [*SMALL, '--mesh.pipeline', '2dit_3vae']),
        random=True,
        layers=1,
    )
    made = []
    found = report.run(
        given,
        measure.Settings(steps=2, warmup=1, entries=()),
        {'dit': 1e6, 'vae': 3e6},
        say=lambda line: None,
        keep=lambda found: made.append(pages.benchmark(found)),
    )
    # What is measured is there before the rest is.
    assert len(made) == 3 and made[-1] == pages.benchmark(found)
    for page, rest in zip(made, ('DiT; VAE + uint8 + host copy', 'VAE + uint8 + host copy')):
        assert f'Note: not measured: {rest}.' in page and '| DiT + VAE + uint8' in page
    assert found['devices_of'] == {'dit': 2, 'vae': 3, 'end_to_end': 5}
    assert all(one['fps'] > 0 for one in found['parts'].values())
    # Of the layer: heads for tokens and back.
    assert set(found['collectives']) == {'dit', 'vae'} and found['exchange'] == 'heads'
    calls_made = given.world.cfg.stream.passes
    assert found['collectives']['dit']['all-to-all']['count'] == 2 * calls_made
    assert found['mesh_bytes'] > 0
    # Both parts at work at the same time: the longer one decides.
    assert pages.at_best(found, 'end_to_end') == pages.at_best(found, 'vae') == 1e-3
    assert 'per step (VAE + uint8' in pages.benchmark(found)


@pytest.mark.parametrize(
    'argv, said',
    [
        (['the_matrix:TINY'], 'needs --weights FOLDER, or --random'),
        (['carracing', '--layers', '2'], '--layers: got 2 without --random'),
        (['the_matrix:TINY', '--random', '--layers', '0'], '--layers: got 0'),
        (['the_matrix:TINY', '--random', '--lora', 'x'], '--lora: got an adapter'),
        (['the_matrix:STAGE2', '--random'], 'the_matrix:STAGE2: does not stream'),
        (['the_matrix:TINY_LORA', '--random'], 'does not stream'),
        (['carracing', '--steps', '0'], '--steps: got 0'),
        (['carracing', '--entries', 'tail,side'], "--entries: got 'side'"),
        (['carracing', '--entries', ''], "--entries: got ''"),
        (['carracing', '--peak-tflops', '-1'], '--peak-tflops: got -1'),
        (['carracing', '--vs', 'jax'], "--vs: got 'jax', expected one of 'torch'"),
        (['doom:FOUNDATION', '--random'], 'doom:FOUNDATION: does not stream'),
        (['doom', '--vs', 'torch'], '--vs torch: got doom:PLAY, expected a world of The Matrix'),
        (
            ['doom', '--int8'],
            '--int8: got doom:PLAY, expected a world whose transformer has 8-bit layers',
        ),
        (
            [
                'the_matrix:TINY',
                '--random',
                '--world.stream.groups',
                '2',
                '--world.stream.steps',
                '2',
                '--entries',
                'head',
            ],
            '--entries head: stream.head_group: got 2, expected 0 to 1',
        ),
        (['carracing', '--vs', 'torch'], '--vs torch: needs torch and diffusers: pip install'),
        (['carracing', '--vs', 'torch', '--sweep', 'mesh'], 'got --vs and --sweep'),
        (['carracing', '--int8', '--count'], 'got --int8 and --count'),
        (['the_matrix:TINY', '--random', '--mesh.seq', '16'], 'expected at most 8'),
        (['carracing', '--out', 'FILE'], 'is a file, expected a folder'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_the_tool_refuses(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('FILE').write_text('')
    lookup = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name, *rest: None if name in ('torch', 'diffusers') else lookup(name, *rest),
    )
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and said in error
    assert [path.name for path in tmp_path.iterdir()] == ['FILE']


def test_a_process_of_its_own_sees_the_devices_it_is_given():
    assert modes.apart(jax.device_count, devices=3) == 3


def results(devices, fps):
    part = {'fps': fps}
    return {
        'devices': devices,
        'exchange': 'keys' * (devices > 1),
        'mesh_bytes': 2**20 * (devices - 1),
        'program_bytes': 2**30,
        'parts': dict.fromkeys(('end_to_end', 'dit', 'vae'), part),
        'machine': {'device': 'cpu', 'processor': 'x', 'cores': 2, 'busy': 0.0},
    }


def test_a_sweep_prints_scaling_and_what_did_not_run(monkeypatch):
    def apart(function, *arguments, devices=1, emulate=True):
        if function is not modes.one:
            return 'gpu'
        parts = arguments[0].mesh.parts
        if devices == 8 and not parts:
            raise config.UsageError('mesh: expected at most 4')
        if parts and parts[1].seq == 2:
            raise BrokenProcessPool('ended abruptly.\nwhile running')
        assert arguments[0].mesh.devices == devices and not arguments[1].entries
        return results(devices, 10 * devices**0.5)

    monkeypatch.setattr(modes, 'apart', apart)
    given, made = recipes.load('the_matrix:TINY'), []
    found, page = modes.sweep(
        given, measure.Settings(), True, None, lambda found, page: made.append(page)
    )
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in page.splitlines()
        if line.startswith('|')
    ][2:]
    names = ['seq=1', 'seq=2', 'seq=4', '5dit_3vae']
    assert [row[0] for row in rows] == names == list(found['sweep'])
    assert [row[2] for row in rows[:2]] == ['nothing', 'keys']
    assert rows[2][6:9] == ['2.00', '50.0%', '3.00']
    assert '- seq=8: not run (mesh: expected at most 4)' in page
    assert '- 6dit_2vae: not run (ended abruptly.)' in page
    # After every mesh, whatever became of it.
    assert len(made) == 6 and '| seq=1 |' in made[0] and made[-1] == page
    assert '30 steps timed.' in page


def test_a_sweep_in_which_nothing_runs_says_why(monkeypatch):
    def apart(function, *arguments, **fields):
        if function is modes.one:
            raise MemoryError
        return 'cpu'

    monkeypatch.setattr(modes, 'apart', apart)
    with pytest.raises(config.UsageError, match='seq=1: MemoryError; seq=2: MemoryError'):
        modes.sweep(recipes.load('the_matrix:TINY'), measure.Settings(), True, None)


def test_pytorch_gets_our_weights_without_control(tmp_path):
    given = target.open_target(recipes.load('the_matrix:TINY', SMALL), random=True)
    cfg, plain = torch_baseline.export(given, tmp_path)
    _, tensors = diffusers_layout.read_component(tmp_path, 'transformer')
    assert not [name for name in tensors if 'control' in name]
    back = conversion.to_jax(dit.weights(cfg), tensors, dit.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, back, plain)
    ours = np.asarray(given.params['transformer']['steered']['block']['mlp']['up']['kernel'])
    np.testing.assert_array_equal(plain['before']['mlp']['up']['kernel'][1:3], ours)
    _, decoder = diffusers_layout.read_component(tmp_path, 'vae')
    assert all(name.startswith('decoder.') for name in decoder)


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ('torch', 'diffusers')),
    reason='needs torch and diffusers',
)
def test_pytorch_computes_what_ours_does():
    given = target.open_target(recipes.load('the_matrix:TINY'), random=True)
    found = torch_baseline.run(given, measure.Settings(steps=2, warmup=1))
    assert max(found['difference'].values()) < 1e-4
    assert found['end_to_end']['fps'] > 0
