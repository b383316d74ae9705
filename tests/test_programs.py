"""Programs outlive a process where they can, and nothing breaks where they cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import jax, sys
from matrix_jax import config, programs
programs.keep({wanted})
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(4.0))))
print(sum(name.endswith('cache_hits') for name in hits))
"""


def start(home, wanted=True):
    """(result, programs that were read) of a process of its own."""
    env = os.environ | {'XDG_CACHE_HOME': str(home), 'PYTHONPATH': str(ROOT),
                        'JAX_ENABLE_COMPILATION_CACHE': 'true'}
    done = subprocess.run([sys.executable, '-c', CODE.format(wanted=wanted)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and 'cache' not in done.stderr, done.stderr
    result, hits = done.stdout.split()
    return float(result), int(hits)


def test_programs_are_read_by_the_next_process_and_damaged_ones_compiled_anew(tmp_path):
    assert start(tmp_path) == (18, 0)
    kept = list((tmp_path / 'matrix_jax' / 'programs').glob('*/*-cache'))
    assert kept and start(tmp_path)[1] > 0
    assert kept[0].parent.stat().st_mode & 0o77 == 0
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert start(tmp_path) == (18, 0)


@pytest.mark.parametrize('fault', ['off', 'a file'])
def test_without_a_folder_programs_compile_as_ever(tmp_path, fault):
    home = tmp_path / 'home'
    if fault == 'a file':
        home.write_text('')
    assert start(home, wanted=fault != 'off') == (18, 0)
    assert not home.is_dir()
