"""Rules of the primitives that read and write slices at computed places."""

from __future__ import annotations

from typing import Any

import numpy as np

from matrix_jax.browser.graph import Graph, Value, element_type
from matrix_jax.browser.operators import concatenate, elementwise, reshape, transpose
from matrix_jax.config import UsageError


def gather(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    """Whole slices at computed places. Indices are within bounds, or clipped, as in our streams."""
    spec, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
    x, places = (graph.full(one) for one in args)
    batch, mapped = list(spec.operand_batching_dims), list(spec.start_index_map)
    rest = [axis for axis in range(len(x.shape)) if axis not in (*batch, *mapped)]
    whole = all(sizes[axis] == x.shape[axis] for axis in rest)
    if set(mapped) != set(spec.collapsed_slice_dims) or not whole:
        raise UsageError('no ONNX form of gathering parts of slices')
    if eqn.params['mode'] is not None and eqn.params['mode'].name == 'CLIP':
        limits = np.array([x.shape[axis] - 1 for axis in mapped], places.dtype)
        low = graph.constant(np.zeros_like(limits))
        places = elementwise(graph, 'Max', [places, low])
        places = elementwise(graph, 'Min', [places, graph.constant(limits)])
    last = len(places.shape) - 1
    first = list(spec.start_indices_batching_dims)
    others = [axis for axis in range(last) if axis not in first]
    x = transpose(graph, x, [*batch, *mapped, *rest])
    places = transpose(graph, places, [*first, *others, last])
    shape = [*places.shape[:-1], *x.shape[len(batch) + len(mapped) :]]
    if not batch and len(mapped) == 1:
        flat = reshape(graph, places, places.shape[:-1])
        y = graph.node('Gather', [x.name, flat.name], x, shape=shape, axis=0)
    else:
        wide = graph.node('Cast', [places.name], places, dtype=np.int64, to=element_type(np.int64))
        inputs = [x.name, wide.name]
        y = graph.node('GatherND', inputs, x, shape=shape, batch_dims=len(batch))
    # Axes now: batch and other axes of the places, then those of a slice.
    made = [*first, *others]
    out = eqn.outvars[0].aval
    free = [axis for axis in range(len(out.shape)) if axis not in spec.offset_dims]
    order = []
    for axis in range(len(out.shape)):
        if axis in free:
            order.append(made.index(free.index(axis)))
        else:
            order.append(last + spec.offset_dims.index(axis))
    return transpose(graph, y, order)


def scatter(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    """Whole slices written at computed places, which are within bounds, as in our streams."""
    spec = eqn.params['dimension_numbers']
    x, places, updates = (graph.full(one) for one in args)
    mapped = list(spec.scatter_dims_to_operand_dims)
    rest = [axis for axis in range(len(x.shape)) if axis not in mapped]
    window = list(spec.update_window_dims)
    whole = [updates.shape[axis] for axis in window] == [x.shape[axis] for axis in rest]
    if set(mapped) != set(spec.inserted_window_dims) or spec.operand_batching_dims or not whole:
        raise UsageError('no ONNX form of scattering parts of slices')
    free = [axis for axis in range(len(updates.shape)) if axis not in window]
    data = transpose(graph, x, [*mapped, *rest])
    updates = transpose(graph, updates, [*free, *window])
    wide = graph.node('Cast', [places.name], places, dtype=np.int64, to=element_type(np.int64))
    kind = {'scatter-add': 'add', 'scatter_add': 'add'}.get(eqn.primitive.name, 'none')
    inputs = [data.name, wide.name, updates.name]
    y = graph.node('ScatterND', inputs, data, reduction=kind)
    return transpose(graph, y, np.argsort([*mapped, *rest]))


def dynamic_slice(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    x, sizes = graph.full(args[0]), eqn.params['slice_sizes']
    begin = _begin(graph, args[1:], np.array(x.shape) - np.array(sizes))
    end = elementwise(graph, 'Add', [begin, graph.constant(np.array(sizes, np.int64))])
    return graph.node('Slice', [x.name, begin.name, graph.full(end).name], x, shape=sizes)


def dynamic_update_slice(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    """What lies before, the update and what lies behind, along the only axis that is not whole."""
    x, update = graph.full(args[0]), graph.full(args[1])
    axes = [axis for axis, size in enumerate(x.shape) if update.shape[axis] != size]
    if not axes:
        return update
    if len(axes) > 1:
        raise UsageError('no ONNX form of updating slices along several axes')
    axis, size = axes[0], update.shape[axes[0]]
    begin = _begin(graph, [args[2 + axis]], np.array([x.shape[axis] - size]))
    end = graph.full(elementwise(graph, 'Add', [begin, graph.constant(np.array([size]))]))
    zero, last, place = (graph.constant(np.array([one])).name for one in (0, x.shape[axis], axis))
    before = graph.node('Slice', [x.name, zero, begin.name, place], x)
    behind = graph.node('Slice', [x.name, end.name, last, place], x)
    return graph.node('Concat', [before.name, update.name, behind.name], x, axis=axis)


def _begin(graph: Graph, starts: list[Value], limits: np.ndarray) -> Value:
    """Starts [] each, moved into 0 to `limits` [N] -> int64 [N]."""
    wide = [
        elementwise(graph, 'Cast', [reshape(graph, one, (1,))], np.int64, to=element_type(np.int64))
        for one in starts
    ]
    begin = wide[0] if len(wide) == 1 else concatenate(graph, wide, 0)
    begin = elementwise(graph, 'Max', [begin, graph.constant(np.zeros(len(wide), np.int64))])
    limits = graph.constant(limits.astype(np.int64))
    return graph.full(elementwise(graph, 'Min', [begin, limits]))
