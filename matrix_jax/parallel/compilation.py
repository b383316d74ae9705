"""Compiler options for this machine, and the cache of compiled programs in the user's home."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE_BYTES = 4 * 2**30  # the least recently used programs are removed first

# XLA's CPU compiler hands products and convolutions to YNNPACK, which runs most of a convolution on
# one core. Eigen, the library before it, shares each among all cores. Sums stay with YNNPACK.
ALL_CORES = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
# Compiles in a third of the time; the program takes half as long again.
FAST_COMPILE = {'xla_backend_optimization_level': 0}


def jit(function: Callable, fast_compile: bool = False, **settings: Any) -> Any:
    """`jax.jit` with `compiler_options`; not for use inside another jit.

    Args:
      function: what to compile.
      fast_compile: for a function that runs so seldom that compiling takes longer than running.
      **settings: arguments of `jax.jit`.
    """
    import jax

    return jax.jit(function, compiler_options=compiler_options(fast_compile), **settings)


@functools.cache
def compiler_options(fast_compile: bool = False) -> dict | None:
    """Returns the XLA options that pay on this machine, or None.

    There are some on a CPU with several cores and for `fast_compile`, if this version of the
    compiler knows them. A setting of the same name in `XLA_FLAGS` wins.
    """
    import jax

    if jax.default_backend() != 'cpu':
        return None
    flags = os.environ.get('XLA_FLAGS', '')
    wanted = (ALL_CORES if cores() > 1 else {}) | (FAST_COMPILE if fast_compile else {})
    wanted = {name: value for name, value in wanted.items() if name not in flags}
    if not wanted:
        return None
    try:
        jax.jit(lambda x: x, compiler_options=wanted)(0)
    except jax.errors.JaxRuntimeError:  # another version of the compiler
        return None
    return wanted


def cores() -> int:
    """Returns how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # this system does not have the call
        return os.cpu_count() or 1


def cache_folder() -> Path:
    """Returns the cache of this user and this kind of processor."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(base) / 'matrix_jax' / 'programs' / _processor()


def enable_cache(wanted: bool = True) -> None:
    """Makes jax store compiled programs on disk, and load those that are there.

    A cache folder that the user has set for jax stays in use. A folder that is not writable, or
    holds damaged programs, only costs the time to compile.

    Args:
      wanted: False leaves jax as it is.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    if not wanted or config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # jax runs the programs that it finds here
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return
    config.update('jax_compilation_cache_dir', str(folder))
    config.update('jax_compilation_cache_max_size', CACHE_BYTES)
    compilation_cache.reset_cache()  # jax looks for a folder only once
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def _processor() -> str:
    """A short name of the processor's features, which compiled CPU programs depend on.

    jax does not compare them when it loads a program.
    """
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    except OSError:
        features = [platform.processor()]
    return hashlib.sha256(' '.join([platform.machine(), *features]).encode()).hexdigest()[:12]
