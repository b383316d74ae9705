"""Programs: compiled for this machine, and kept on disk so that the second start has them."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import tempfile
import warnings
from pathlib import Path

LIMIT = 4 * 2**30  # bytes; the programs that were not used for longest go first

# XLA's CPU compiler hands products and convolutions to YNNPACK, which runs most of a convolution on
# one core; Eigen, which it had before, shares each among all. Sums stay with YNNPACK.
SHARED = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


# A program that runs once: compiled in a third of the time, and half as slow again.
QUICK = {'xla_backend_optimization_level': 0}


def jit(function, once: bool = False, **settings):
    """`jax.jit` with `options` for this machine; not for use within another jit.

    Args:
      function: what to compile.
      once: whether it runs so seldom that compiling takes longer than running.
      **settings: of `jax.jit`.
    """
    import jax

    return jax.jit(function, compiler_options=options(once), **settings)


@functools.cache
def options(once: bool = False) -> dict | None:
    """Options of the compiler that pay here: on a CPU, with more than one core or for what runs
    once, and if the compiler knows them. A setting of the same name in `XLA_FLAGS` stays in force.
    """
    import jax

    if jax.default_backend() != 'cpu':
        return None
    given = os.environ.get('XLA_FLAGS', '')
    wanted = (SHARED if cores() > 1 else {}) | (QUICK if once else {})
    wanted = {name: value for name, value in wanted.items() if name not in given}
    if not wanted:
        return None
    try:
        jax.jit(lambda x: x, compiler_options=wanted)(0)
    except jax.errors.JaxRuntimeError:  # of another version
        return None
    return wanted


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def folder() -> Path:
    """Where the programs of this user and this kind of processor lie."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(base) / 'matrix_jax' / 'programs' / _processor()


def keep(wanted: bool = True):
    """Makes jax keep the programs that it compiles, and read those that are there.

    A folder that the user gave to jax stays in force. A folder that cannot be written, or holds
    damaged programs, costs the time of compiling and nothing else.

    Args:
      wanted: False leaves jax as it is.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config = jax.config
    if not wanted or config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)  # programs are run as they are found
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError:
        return
    config.update('jax_compilation_cache_dir', str(place))
    config.update('jax_compilation_cache_max_size', LIMIT)
    compilation_cache.reset_cache()  # jax looks for a folder only once
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def _processor() -> str:
    """Programs for a CPU use what the one that compiled them can do, which jax does not compare."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        able = sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    except OSError:
        able = [platform.processor()]
    return hashlib.sha256(' '.join([platform.machine(), *able]).encode()).hexdigest()[:12]
