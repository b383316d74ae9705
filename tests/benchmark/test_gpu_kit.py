"""The phases of the GPU kit: budgets, results that stay, and phases that fail or run over."""

import json

import pytest

from matrix_jax import recipes
from matrix_jax.benchmark.scripts import gpu_kit
from matrix_jax.benchmark.scripts.gpu_kit import Phase


def test_phases_leave_minutes_for_training_and_name_recipes_that_exist():
    found = gpu_kit.phases()
    assert sum(one.budget for one in found) <= 10 * 60
    assert len({one.name for one in found}) == len(found)
    for one in found:
        if one.argv[0] == 'benchmark':
            fields = [at for at, word in enumerate(one.argv) if word.startswith('--world.')]
            recipes.load(one.argv[2], [word for at in fields for word in one.argv[at : at + 2]])
        else:
            assert one.precise and len(one.argv) > 10


def test_flags_of_a_phase_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=a')
    phase = Phase('a', 1, ('benchmark',), '--xla_gpu_enable_triton_gemm=false')
    found = gpu_kit.environment(phase, tmp_path, cpu=False)
    assert found['XLA_FLAGS'].split() == [
        '--xla_dump_to=a',
        '--xla_gpu_enable_triton_gemm=false',
        f'--xla_gpu_per_fusion_autotune_cache_dir={tmp_path}/autotune',
    ]
    assert found['JAX_COMPILATION_CACHE_DIR'] == f'{tmp_path}/programs'
    precise = Phase('b', 1, ('parity',), precise=True)
    monkeypatch.delenv('JAX_DEFAULT_MATMUL_PRECISION')
    for one, wanted in ((phase, None), (precise, 'highest')):
        given = gpu_kit.environment(one, tmp_path, cpu=False)
        assert given.get('JAX_DEFAULT_MATMUL_PRECISION') == wanted
    assert gpu_kit.environment(phase, tmp_path, cpu=True)['XLA_FLAGS'] == '--xla_dump_to=a'


def test_a_phase_that_fails_or_runs_over_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    # A phase runs `python -m matrix_jax ...`: here a package of that name that does as it is told.
    (tmp_path / 'matrix_jax.py').write_text(
        'import sys, time\n'
        'print(sys.argv[1])\n'
        'sys.exit(3) if sys.argv[1] == "fail" else time.sleep(60 * (sys.argv[1] == "sleep"))\n'
    )
    monkeypatch.setattr(gpu_kit, 'ROOT', tmp_path)
    monkeypatch.setattr(gpu_kit, 'GRACE', 1)
    todo = [Phase('fail', 9, ('fail',)), Phase('long', 1, ('sleep',)), Phase('last', 9, ('fine',))]
    monkeypatch.setattr(gpu_kit, 'phases', lambda tiny: todo)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out'
    assert gpu_kit.main([str(out), '--minutes', '1', '--train', 'carracing:SWIN']) == 1
    done = json.loads((out / 'summary.json').read_text())
    assert [one['exit'] for one in done] == [3, 'over time', 0, 0]
    assert done[2]['found'] == {'last line': 'fine'}
    assert done[3]['phase'] == 'train_0' and done[3]['found'] == {'last line': 'train'}
    lines = (out / 'summary.md').read_text().splitlines()
    assert len(lines) == 6 and lines[3].startswith('| long | ')
    assert capsys.readouterr().out.count('\n') == 4
    with pytest.raises(SystemExit) as stop:
        gpu_kit.main([str(out), '--only', 'nothing'])
    assert stop.value.code == 2


def test_figures_are_those_of_the_benchmark(tmp_path):
    whole = {'fps': 50.0, 'p50_ms': 1.0, 'p95_ms': 2.0, 'p99_ms': 3.0, 'tflops': 4.0}
    made = {
        'parts': {'end_to_end': whole},
        'latency': {'late': {'visible': {'ms': 7.5}}, 'early': {'visible': None}},
    }
    (tmp_path / 'benchmark.json').write_text(json.dumps(made))
    found = gpu_kit.figures(tmp_path)
    assert found == whole | {'key late, ms': 7.5, 'key early, ms': None}
    assert '| a | 3 | 0 | fps 50.0, ' in gpu_kit.summary(
        [{'phase': 'a', 'seconds': 3.2, 'exit': 0, 'found': found}]
    )
