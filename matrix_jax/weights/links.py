"""Links in a weights folder that lead out of it."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

log = logging.getLogger(__name__)


def leaving(folder: Path) -> list[Path]:
    """Returns the links in a weights folder, also in its components, that lead out of it.

    Files of the hub's cache are links to the folder `blobs` of their repository, which is no other
    place.
    """
    root = folder.resolve()
    repositories = (one.parent for one in (root, *root.parents) if one.parent.name == 'snapshots')
    inside = next((one.parent for one in repositories if (one.parent / 'blobs').is_dir()), root)
    found = []
    for path in sorted(folder.iterdir()):
        links = [path] if path.is_symlink() else []
        if not links and path.is_dir():
            links = [one for one in sorted(path.iterdir()) if one.is_symlink()]
        found += [one for one in links if not one.resolve().is_relative_to(inside)]
    return found


@functools.cache
def note(folder: Path) -> None:
    """Logs a line, once for a folder, if some of its links lead out of it."""
    found = leaving(folder)
    if found:
        first = found[0]
        more = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
        log.warning(
            'note: weights: %s leads out of %s, to %s%s',
            first.relative_to(folder),
            folder,
            first.resolve(),
            more,
        )
