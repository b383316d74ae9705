"""Compiled programs kept on disk, so that the second start of a run does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import warnings
from pathlib import Path

LIMIT = 4 * 2**30       # bytes; the programs that were not used for longest go first


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
        place.chmod(0o700)      # programs are run as they are found
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError:
        return
    config.update('jax_compilation_cache_dir', str(place))
    config.update('jax_compilation_cache_max_size', LIMIT)
    compilation_cache.reset_cache()         # jax looks for a folder only once
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def _processor() -> str:
    """Programs for a CPU use what the one that compiled them can do, which jax does not compare."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        able = sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    except OSError:
        able = [platform.processor()]
    return hashlib.sha256(' '.join([platform.machine(), *able]).encode()).hexdigest()[:12]
