"""Operators of ONNX that rules of several primitives add to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from matrix_jax.browser.graph import Graph, Value, size


def elementwise(
    graph: Graph, operator: str, args: Sequence[Value], dtype: Any = None, **attributes: Any
) -> Value:
    """Adds an elementwise operator, which repeats axes by itself."""
    held = np.broadcast_shapes(*(one.held for one in args))
    shape = np.broadcast_shapes(*(one.shape for one in args))
    names = [one.name for one in args]
    return graph.node(operator, names, args[0], held, shape, dtype or args[-1].dtype, **attributes)


def reshape(graph: Graph, x: Value, shape: Sequence[int]) -> Value:
    """Adds a reshape, unless the shape is the same."""
    x, shape = graph.full(x), tuple(map(int, shape))
    if shape == x.shape:
        return x
    return graph.node('Reshape', [x.name, graph.integers(shape)], x, shape=shape)


def transpose(graph: Graph, x: Value, order: Sequence[int]) -> Value:
    """Adds a transposition, unless the order is the same; axes of size 1 only need a reshape."""
    order = [int(axis) for axis in order]
    if order == sorted(order):
        return x
    shape, held = ([sizes[axis] for axis in order] for sizes in (x.shape, x.held))
    moved = [axis for axis in order if x.held[axis] > 1]
    if moved == sorted(moved):
        return graph.node('Reshape', [x.name, graph.integers(held)], x, held, shape)
    return graph.node('Transpose', [x.name], x, held, shape, perm=order)


def take(graph: Graph, x: Value, starts: Sequence[int], stops: Sequence[int], steps=None) -> Value:
    """Adds a slice along the axes that it changes."""
    x, steps = graph.full(x), steps or [1] * len(starts)
    axes = [
        axis
        for axis, now in enumerate(zip(starts, stops, steps, strict=True))
        if now != (0, x.shape[axis], 1)
    ]
    if not axes:
        return x
    shape = list(x.shape)
    for axis in axes:
        shape[axis] = len(range(starts[axis], stops[axis], steps[axis]))
    chosen = ([sizes[axis] for axis in axes] for sizes in (starts, stops))
    inputs = [x.name, *map(graph.integers, chosen), graph.integers(axes)]
    return graph.node(
        'Slice', [*inputs, graph.integers([steps[axis] for axis in axes])], x, shape=shape
    )


def concatenate(graph: Graph, parts: Sequence[Value], axis: int) -> Value:
    """Adds a concatenation of the parts that hold anything."""
    filled = [graph.full(one) for one in parts if size(one.shape)] or [parts[0]]
    if len(filled) == 1:
        return filled[0]
    shape = list(filled[0].shape)
    shape[axis] = sum(one.shape[axis] for one in filled)
    return graph.node('Concat', [one.name for one in filled], filled[0], shape=shape, axis=axis)
