"""What programs are compiled for, compiler options, and the cache of compiled programs."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CACHE_BYTES = 4 * 2**30  # the least recently used programs are removed first

# XLA's CPU compiler hands products and convolutions to YNNPACK, which runs most of a convolution on
# one core. Eigen, the library before it, shares each among all cores. Sums stay with YNNPACK.
ALL_CORES = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
# Compiles in a third of the time; the program takes half as long again.
FAST_COMPILE = {'xla_backend_optimization_level': 0}
# XLA's GPU compiler lays out 3-D convolutions with channels first, which cuDNN then transposes.
CHANNELS_LAST = {'xla_gpu_force_conv_nhwc': True}
# It also joins products of equal inputs, and copies their weights into one array in every step.
NO_JOINED_PRODUCTS = {'xla_gpu_dot_merger_threshold_mb': 0}
# Without a GPU nothing is autotuned, and the default tiling of Triton's products is one that no GPU
# would use. cuBLAS, the other candidate of the autotuner, has no tiling to choose.
NO_AUTOTUNING = {'xla_gpu_enable_triton_gemm': False}

_compile_only: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    'compile_only', default=None
)


def backend() -> str:
    """Returns the backend that programs are compiled for: 'cpu', 'gpu' or 'tpu'."""
    import jax

    return _compile_only.get() or jax.default_backend()


def compile_only() -> bool:
    """Whether programs are compiled for devices that this machine may lack."""
    return _compile_only.get() is not None


@contextlib.contextmanager
def compile_for(backend: str) -> Iterator[None]:
    """Compiles programs for a backend that this machine may lack; nothing can run on it."""
    token = _compile_only.set(backend)
    try:
        yield
    finally:
        _compile_only.reset(token)


def jit(function: Callable, fast_compile: bool = False, **settings: Any) -> Any:
    """`jax.jit` with `compiler_options`; not for use inside another jit.

    Args:
      function: what to compile.
      fast_compile: for a function that runs so seldom that compiling takes longer than running.
      **settings: arguments of `jax.jit`.
    """
    import jax

    return jax.jit(function, compiler_options=compiler_options(fast_compile), **settings)


def compiler_options(fast_compile: bool = False) -> dict | None:
    """Returns the XLA options that pay on the backend that programs are compiled for, or None.

    `fast_compile` and several cores matter on a CPU only. Options that this version of the compiler
    does not know are left out. A setting of the same name in `XLA_FLAGS` wins.
    """
    return _compiler_options(backend(), compile_only(), fast_compile)


@functools.cache
def _compiler_options(backend: str, compile_only: bool, fast_compile: bool) -> dict | None:
    import jax

    wanted: dict[str, Any] = {}
    if backend == 'cpu':
        wanted = (ALL_CORES if cores() > 1 else {}) | (FAST_COMPILE if fast_compile else {})
    elif backend == 'gpu':
        wanted = CHANNELS_LAST | NO_JOINED_PRODUCTS | (NO_AUTOTUNING if compile_only else {})
    flags = os.environ.get('XLA_FLAGS', '')
    wanted = {name: value for name, value in wanted.items() if name not in flags}
    if not wanted or compile_only:
        return wanted or None
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
    return user_cache() / 'programs' / processor()


def user_cache() -> Path:
    """Returns the folder of what this package keeps for this user."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(base) / 'matrix_jax'


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


def processor() -> str:
    """Returns a short name of the processor's features, which compiled CPU programs depend on.

    jax does not compare them when it loads a program.
    """
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    except OSError:
        features = [platform.processor()]
    return hashlib.sha256(' '.join([platform.machine(), *features]).encode()).hexdigest()[:12]
