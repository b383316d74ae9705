"""Checksums of the files of a folder.

Storage formats check their indices but not the values: they would load a weight with a flipped bit.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = 'sums.json'  # file with the checksums of its folder
BLOCK = 2**20  # bytes read at a time


def write_checksums(folder: Path) -> None:
    """Writes size and CRC-32 of every file below `folder` to `folder/sums.json`."""
    paths = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != SUMS)
    with ThreadPoolExecutor() as pool:
        names = [path.relative_to(folder).as_posix() for path in paths]
        sums = dict(zip(names, pool.map(_checksum, paths)))
    (folder / SUMS).write_text(json.dumps(sums, indent=0), encoding='utf-8')


def checksum_faults(folder: Path) -> list[str] | None:
    """Returns 'path: fault' for each file that differs from `folder/sums.json`, or None without
    that file."""
    try:
        sums = {
            name: (int(size), int(crc))
            for name, (size, crc) in json.loads((folder / SUMS).read_text(encoding='utf-8')).items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError):
        return [f'{folder / SUMS}: damaged']

    def fault(name: str) -> str | None:
        path, (size, crc) = folder / name, sums[name]
        try:
            found = path.stat().st_size
            if found != size:
                short = 'truncated' if found < size else 'too long'
                return f'{path}: {short}, {found} bytes of {size}'
            return None if _checksum(path)[1] == crc else f'{path}: damaged, its checksum differs'
        except FileNotFoundError:
            return f'{path}: missing'
        except OSError as error:
            return f'{path}: not readable ({error.strerror})'

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(fault, sums) if line]


def _checksum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with path.open('rb') as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
