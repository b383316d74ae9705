"""Checksums of a folder's files, so that damage on disk is noticed and named.

Storage formats check their indices, not the values: one flipped bit of a weight would be read.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = 'sums.json'
BLOCK = 2**20


def write(folder: Path):
    """Writes the size and CRC-32 of every file below `folder` to `folder/sums.json`."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != FILE)
    with ThreadPoolExecutor() as pool:
        names = [path.relative_to(folder).as_posix() for path in paths]
        sums = dict(zip(names, pool.map(_sum, paths)))
    (folder / FILE).write_text(json.dumps(sums, indent=0), encoding='utf-8')


def faults(folder: Path) -> list[str] | None:
    """What differs from `folder/sums.json`, one 'path: what' each; None if there is no such file."""
    folder = Path(folder)
    try:
        sums = {
            name: (int(size), int(crc))
            for name, (size, crc) in json.loads((folder / FILE).read_text(encoding='utf-8')).items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError):
        return [f'{folder / FILE}: damaged']

    def fault(name: str) -> str | None:
        path, (size, crc) = folder / name, sums[name]
        try:
            found = path.stat().st_size
            if found != size:
                short = 'truncated' if found < size else 'too long'
                return f'{path}: {short}, {found} bytes of {size}'
            return None if _sum(path)[1] == crc else f'{path}: damaged, its checksum differs'
        except FileNotFoundError:
            return f'{path}: missing'
        except OSError as error:
            return f'{path}: not readable ({error.strerror})'

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(fault, sums) if line]


def _sum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with path.open('rb') as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
