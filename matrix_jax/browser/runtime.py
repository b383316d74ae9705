"""The files of onnxruntime-web, which run a world in a browser tab.

They come from the npm package `onnxruntime-web`: a tarball or a folder that the user names, or
`npm pack`, whose result is kept in the user's cache.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from matrix_jax.config import UsageError

PACKAGE, VERSION = 'onnxruntime-web', '1.30.0'
# The second two run on WebGPU, in browsers whose WebAssembly can wait for it.
PROGRAMS = ('ort.wasm.min.mjs', 'ort.jspi.min.mjs')
LOADERS = ('ort-wasm-simd-threaded', 'ort-wasm-simd-threaded.jspi')
NPM_SECONDS = 300


def files(source: str | None) -> dict[str, bytes]:
    """Returns the runtime's files by name; the large ones are compressed by gzip.

    Args:
      source: tarball or folder of the package; None = `npm pack`.

    Raises:
      UsageError: the package cannot be had, or lacks a file.
    """
    path = Path(source) if source else _packed()
    wanted = [*PROGRAMS, *(f'{name}.mjs' for name in LOADERS), *(f'{n}.wasm' for n in LOADERS)]
    read = _folder if path.is_dir() else _tarball
    found = read(path, wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(
            f'--runtime: got {path} without {missing[0]}, expected {PACKAGE} {VERSION} or newer'
        )
    return {
        f'{name}.gz' if name.endswith('.wasm') else name: gzip.compress(data, 9, mtime=0)
        if name.endswith('.wasm')
        else data
        for name, data in found.items()
    }


def _folder(path: Path, wanted: list[str]) -> dict[str, bytes]:
    folder = path / 'dist' if (path / 'dist').is_dir() else path
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def _tarball(path: Path, wanted: list[str]) -> dict[str, bytes]:
    try:
        with tarfile.open(path) as tar:
            found = {}
            for name in wanted:
                try:
                    member = tar.extractfile(f'package/dist/{name}')
                except KeyError:
                    continue
                if member:
                    found[name] = member.read()
            return found
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f'--runtime: got {path}, expected a folder or tarball of {PACKAGE} ({error})'
        ) from error


def _packed() -> Path:
    """Returns the tarball that npm downloads, from the cache where it is there."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    kept = Path(base) / 'matrix_jax' / f'{PACKAGE}-{VERSION}.tgz'
    if kept.is_file():
        return kept
    npm = shutil.which('npm')
    how = f'expected --runtime, a tarball or folder of the npm package {PACKAGE}'
    if npm is None:
        raise UsageError(f'npm: not found, {how}')
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [npm, 'pack', '--silent', f'{PACKAGE}@{VERSION}'],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=NPM_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f'npm pack: no answer in {NPM_SECONDS} s, {how}') from None
        made = list(Path(folder).glob('*.tgz'))
        if done.returncode or not made:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            raise UsageError(f'npm pack: {reason}, {how}')
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made[0], kept)
    return kept
