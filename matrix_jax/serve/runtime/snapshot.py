"""A moment of a world as bytes: `.world` = safetensors of the carry, and JSON of how it came about.

Anyone who loads the bytes goes on from that moment: a save-game, or a fork of someone's world.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.serve.runtime import session_log

FORMAT = 'matrix_jax.world.1'
HEADER_BYTES = session_log.LOG_BYTES + 2 * 2**20  # its log is JSON in JSON


class WorldFileError(UsageError):
    """Bytes that are no saved world, or one that does not fit this world."""


def names(tree) -> list[str]:
    """One name per leaf."""
    return [
        jax.tree_util.keystr(path, simple=True, separator='.')
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def dump(carry, log: session_log.Log) -> bytes:
    """Bytes of a carry on the host and its log."""
    from safetensors.numpy import save

    leaves = (np.asarray(leaf, order='C') for leaf in jax.tree.leaves(carry))
    # The format's reader for numpy does not know bfloat16.
    tensors = {
        name: leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf
        for name, leaf in zip(names(carry), leaves)
    }
    return save(tensors, {'format': FORMAT, 'log': log.dumps()})


def parse(data: bytes, like, fingerprint: str):
    """(carry, log) of bytes from anyone.

    Args:
      data: the bytes.
      like: tree of ShapeDtypeStructs that the carry must have.
      fingerprint: of this world.

    Raises:
      WorldFileError: what does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], 'little')
    if HEADER_BYTES < size <= len(data):
        raise WorldFileError(
            f'world file: got a log and names of {size} bytes, expected at most {HEADER_BYTES}'
        )
    try:
        tensors = load(data)  # strict about the header: all that follows is small
        meta = json.loads(data[8 : 8 + size])['__metadata__']
        log = session_log.loads(meta['log'])
    except session_log.ReplayError as error:
        raise WorldFileError(f'world file: {error}') from error
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WorldFileError('world file: not a saved world, or damaged') from error
    if meta.get('format') != FORMAT:
        raise WorldFileError(
            f'world file: got format {str(meta.get("format"))[:40]!r}, expected {FORMAT!r}'
        )
    if log.fingerprint != fingerprint:
        raise WorldFileError(
            f'world file: saved from another world ({log.recipe[:40]}) or other '
            'weights; it does not fit this one'
        )
    leaves, tree = jax.tree.flatten(like)
    wanted = dict(zip(names(like), leaves))
    tensors = {
        name: tensor.view(jnp.bfloat16)
        if name in wanted and tensor.dtype == np.uint16 and wanted[name].dtype == jnp.bfloat16
        else tensor
        for name, tensor in tensors.items()
    }
    wrong = sorted(set(wanted) ^ set(tensors)) or [
        name
        for name, leaf in wanted.items()
        if tensors[name].shape != leaf.shape or tensors[name].dtype != leaf.dtype
    ]
    if wrong:
        raise WorldFileError(f'world file: does not fit this world in {", ".join(wrong[:4])}')
    if not all(np.isfinite(tensors[name].astype(np.float32)).all() for name in wanted):
        raise WorldFileError('world file: holds numbers that are not finite')
    return jax.tree.unflatten(tree, [tensors[name] for name in wanted]), log
