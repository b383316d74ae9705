"""Folders of encoded data, each named by a digest of all that its content depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from matrix_jax.weights import diffusers_layout


def name(source: dict) -> str:
    """Name of the folder for data that depends on `source`, which must be JSON."""
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]


def params_digest(params) -> str:
    """Digest of parameters, so that data encoded by others is not mistaken for theirs."""
    import jax

    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return hashlib.sha256(b''.join(leaves)).hexdigest()


def build(folder: Path, marker: str, fill: Callable[[Path], None]) -> Path:
    """Makes a folder with `fill(new folder)` unless it holds the file `marker`.

    The folder is filled under another name and renamed, so an interrupted run leaves nothing. A
    failed one also removes the parent folders that it created.
    """
    if not (folder / marker).exists():
        created = [parent for parent in folder.parents if not parent.exists()]
        try:
            diffusers_layout.replace_folder(folder, fill)
        except BaseException:
            for parent in created:
                with contextlib.suppress(OSError):  # another process may use it by now
                    parent.rmdir()
            raise
    return folder
