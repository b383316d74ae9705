"""Files that people bring: text in any Unicode encoding, endings in any case, linked folders."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matrix_jax.data.ingest import IngestError

# The byte order mark that a file begins with tells its encoding. UTF-32 comes first, because its
# little-endian mark begins with that of UTF-16.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
    (codecs.BOM_UTF8, 'utf-8-sig'),
)
TEXT_BYTES = 2**28  # of one text file, at most


def read_text(path: Path) -> str:
    """Returns the text of a file, without its byte order mark; without a mark it is UTF-8.

    Raises:
      IngestError: the file is not readable, not text, or too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise IngestError(f'{path}: is not a file')
        if path.stat().st_size > TEXT_BYTES:
            raise IngestError(f'{path}: larger than {TEXT_BYTES >> 20} MiB')
        data = path.read_bytes()
    except OSError as error:
        raise IngestError(f'{path}: {error.strerror or error}') from error
    encoding = next((name for mark, name in ENCODINGS if data.startswith(mark)), 'utf-8')
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise IngestError(f'{path}: not UTF-8 text ({error})') from error


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      IngestError: the file is not readable, or not JSON.
    """
    return parse_json(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, content) of each line of a JSON Lines file that is not empty.

    Raises:
      IngestError: the file is not readable, or a line is not JSON.
    """
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if line.strip():
            where = f'{path} line {number}'
            yield where, parse_json(line, where)


def parse_json(text: str, where: str) -> Any:
    """Returns the content of a JSON text.

    Raises:
      IngestError: it is not JSON; names `where`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IngestError(f'{where}: not JSON ({error})') from error


def beside(path: Path, suffix: str) -> Path | None:
    """Returns the file with the name of `path` and another ending; None if there is none.

    Args:
      path: a file.
      suffix: the ending in lower case, such as '.txt'; '.TXT' and '.Txt' serve as well.
    """
    endings = (suffix, suffix.upper(), '.' + suffix[1:].capitalize())
    others = (path.with_suffix(ending) for ending in endings)
    return next((other for other in others if other.is_file()), None)


def walk(root: Path) -> list[Path]:
    """Returns all files below a folder, sorted, also in linked folders.

    Links may form loops, and several may lead to the same place: each folder and each file is
    listed once, under its own name if it is below the folder, else under the first link to it.

    Raises:
      IngestError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    found, waiting, links = [], [root], []
    while waiting or links:
        path = waiting.pop() if waiting else links.pop(0)
        try:
            info = path.stat()
        except OSError:  # a broken link
            found.append(path)
            continue
        place = info.st_dev, info.st_ino
        if place in seen:
            continue
        seen.add(place)
        if not path.is_dir():
            found.append(path)
            continue
        try:
            names = sorted(path.iterdir())
        except OSError as error:
            raise IngestError(f'{path}: {error.strerror or error}') from error
        links += [name for name in names if name.is_symlink()]
        waiting += [name for name in reversed(names) if not name.is_symlink()]
    return sorted(found)


def digest(path: Path | None) -> str:
    """Returns a digest of the content of a file; empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else ''
