"""A saved session as the bytes of a `.world` file: safetensors of the carry, and the log as JSON.

Loading the bytes continues the session: a save-game, or a fork of another player's world.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.serve.runtime import session_log

FORMAT = 'matrix_jax.world.1'
HEADER_BYTES = session_log.LOG_BYTES + 2 * 2**20  # the log is JSON inside JSON


class WorldFileError(UsageError):
    """The bytes are not a saved world, or do not fit this world."""


def names(tree) -> list[str]:
    """The tensor name of every leaf."""
    return [
        jax.tree_util.keystr(path, simple=True, separator='.')
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def dump(carry, log: session_log.Log) -> bytes:
    """The bytes of a carry on the host and its log.

    Raises:
      ReplayError: the log is longer than a file may be.
    """
    from safetensors.numpy import save

    leaves = (np.asarray(leaf, order='C') for leaf in jax.tree.leaves(carry))
    # safetensors' numpy reader does not know bfloat16.
    tensors = {
        name: leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf
        for name, leaf in zip(names(carry), leaves)
    }
    return save(tensors, {'format': FORMAT, 'log': log.dumps()})


def parse(data: bytes, carry_shapes, fingerprint: str):
    """Reads bytes from an untrusted source -> (carry, log).

    Args:
      data: the bytes.
      carry_shapes: tree of `jax.ShapeDtypeStruct` that the carry must have.
      fingerprint: fingerprint of this world.

    Raises:
      WorldFileError: the bytes are damaged, or do not fit this world.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], 'little')
    if HEADER_BYTES < size <= len(data):
        raise WorldFileError(
            f'world file: got a log and names of {size} bytes, expected at most {HEADER_BYTES}'
        )
    try:
        tensors = load(data)  # checks the header strictly, so that what follows is small
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
    leaves, tree = jax.tree.flatten(carry_shapes)
    expected = dict(zip(names(carry_shapes), leaves))
    tensors = {
        name: tensor.view(jnp.bfloat16)
        if name in expected and tensor.dtype == np.uint16 and expected[name].dtype == jnp.bfloat16
        else tensor
        for name, tensor in tensors.items()
    }
    wrong = sorted(set(expected) ^ set(tensors)) or [
        name
        for name, leaf in expected.items()
        if tensors[name].shape != leaf.shape or tensors[name].dtype != leaf.dtype
    ]
    if wrong:
        raise WorldFileError(f'world file: does not fit this world in {", ".join(wrong[:4])}')
    if not all(np.isfinite(tensors[name].astype(np.float32)).all() for name in expected):
        raise WorldFileError('world file: contains numbers that are not finite')
    return jax.tree.unflatten(tree, [tensors[name] for name in expected]), log
