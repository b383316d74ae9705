"""The cache of compiled programs, and compiler options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from matrix_jax.parallel import compilation

ROOT = Path(__file__).parents[2]
CODE = """
import jax
from matrix_jax.parallel import compilation
compilation.enable_cache({wanted})
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(4.0))))
print(sum(name.endswith('cache_hits') for name in hits))
"""


def start(home, wanted=True):
    """(result, number of loaded programs) of a new process."""
    env = os.environ | {
        'XDG_CACHE_HOME': str(home),
        'PYTHONPATH': str(ROOT),
        'JAX_ENABLE_COMPILATION_CACHE': 'true',
    }
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(wanted=wanted)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and 'cache' not in done.stderr, done.stderr
    result, hits = done.stdout.split()
    return float(result), int(hits)


def test_the_next_process_loads_programs_and_compiles_damaged_ones_again(tmp_path):
    assert start(tmp_path) == (18, 0)
    kept = list((tmp_path / 'matrix_jax' / 'programs').glob('*/*-cache'))
    assert kept and start(tmp_path)[1] > 0
    assert kept[0].parent.stat().st_mode & 0o77 == 0
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert start(tmp_path) == (18, 0)


@pytest.mark.parametrize('fault', ['off', 'a file'])
def test_without_a_cache_folder_programs_are_compiled(tmp_path, fault):
    home = tmp_path / 'home'
    if fault == 'a file':
        home.write_text('')
    assert start(home, wanted=fault != 'off') == (18, 0)
    assert not home.is_dir()


OPTIONS = """
import jax

from matrix_jax.parallel import compilation
shared = compilation.compiler_options() == compilation.ALL_CORES
print(shared, compilation.compiler_options(fast_compile=True)
      == compilation.FAST_COMPILE | (compilation.ALL_CORES if shared else {}),
      float(compilation.jit(lambda x: x + 1, fast_compile=True)(1.0)))
"""


@pytest.mark.parametrize(
    'cores, flags, wanted',
    [(1, '', False), (2, '', True), (2, '--xla_cpu_experimental_ynn_fusion_type=', False)],
)
def test_convolutions_use_all_cores_unless_there_is_one_or_the_user_chose(cores, flags, wanted):
    code = OPTIONS.replace('shared', f'compilation.cores = lambda: {cores}\nshared', 1)
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    )
    assert done.stdout.split() == [str(wanted), 'True', '2.0']


def test_a_compiler_without_the_option_compiles_without_it(monkeypatch):
    monkeypatch.setattr(compilation, 'ALL_CORES', {'xla_no_such_option': '1'})
    monkeypatch.setattr(compilation, 'cores', lambda: 2)
    compilation._compiler_options.cache_clear()
    try:
        assert compilation.compiler_options() is None and compilation.jit(lambda x: x + 1)(1.0) == 2
    finally:
        compilation._compiler_options.cache_clear()
