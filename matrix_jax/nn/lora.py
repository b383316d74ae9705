"""Low-rank adapters (LoRA, arXiv 2106.09685), merged into the weights before use.

    W' = W + alpha / r * B A          A [r in], B [out r]; equation 3 of the paper

An adapter is a parameter tree with three leaves for each adapted kernel: `a` [in r], `b` [r out]
and `alpha`, stacked over layers like the kernel. Networks run, train and export with
`merge(params, adapter)`.

`lora_files` reads and writes the files of diffusers, peft and others.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from matrix_jax.nn import initializers, lora_files
from matrix_jax.nn.lora_files import FILE, read, write
from matrix_jax.nn.lora_names import modules
from matrix_jax.weights import conversion

__all__ = ['FILE', 'TARGETS', 'axes', 'init', 'merge', 'modules', 'read', 'write']

# Targets as published: attention of the transformer blocks, not of the control blocks.
TARGETS = tuple(
    f'transformer_blocks.*.attn1.{name}' for name in ('to_q', 'to_k', 'to_v', 'to_out.0')
)


def init(
    table: conversion.Table,
    shapes: Mapping,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = TARGETS,
) -> dict:
    """Initial adapter, float32 numpy: `a` random as in peft, `b` zero, so it changes nothing.

    Args:
      table: weight table of the network.
      shapes: its parameter tree, of arrays or ShapeDtypeStructs.
      rank: rank r.
      alpha: numerator of the scale alpha / r.
      seed: seed of the random numbers.
      targets: patterns of torch module names.

    Raises:
      ValueError: no module fits the targets, or the rank exceeds one of them.
    """
    flat, leaves = conversion.flatten(shapes), {}
    for name, module in modules(table).items():
        if module.path in leaves or not any(fnmatch.fnmatchcase(name, one) for one in targets):
            continue
        *stack, inner, outer = flat[f'{module.path}/kernel'].shape
        if rank > min(inner, outer):
            raise ValueError(
                f'rank: got {rank}, expected at most {min(inner, outer)}, the width of {name}'
            )
        rule = initializers.uniform(1 / 3)
        draws = [
            initializers.draw((('*', rule),), f'{module.path}/a', (inner, rank), (seed,), index)
            for index in range(math.prod(stack))
        ]
        leaves[module.path] = {
            'a': np.reshape(draws, (*stack, inner, rank)),
            'b': np.zeros((*stack, rank, outer), np.float32),
            'alpha': np.full(stack, alpha, np.float32),
        }
    if not leaves:
        raise ValueError(f'targets: got {", ".join(targets)}, which fit no linear layer')
    return conversion.unflatten(leaves)


def merge(params: Mapping, adapter: Mapping, scale: float = 1.0) -> dict:
    """Adds scale * alpha / r * B A to each adapted kernel, in at least float32."""
    flat = conversion.flatten(params)
    for path, parts in lora_files.layers(adapter).items():
        factor = jnp.asarray(scale * parts['alpha'] / parts['a'].shape[-1])[..., None, None]
        update = jnp.einsum('...ir,...ro->...io', parts['a'], parts['b'], precision='highest')
        flat[f'{path}/kernel'] = flat[f'{path}/kernel'] + factor * update
    return conversion.unflatten(flat)


def axes(kernels: Mapping) -> dict:
    """Axis letters of an adapter of all kernels, from those of the network (`conversion.axes`)."""
    found = {}
    for path, letters in conversion.flatten(kernels).items():
        if path.endswith('/kernel'):
            *stack, inner, outer = letters
            found[path.removesuffix('/kernel')] = {
                'a': (*stack, inner, '_'),
                'b': (*stack, '_', outer),
                'alpha': tuple(stack),
            }
    return conversion.unflatten(found)
