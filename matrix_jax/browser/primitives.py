"""Primitives of jax as operators of ONNX.

Covers what the networks and streams of this package use. `write` names all others at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from matrix_jax.browser import flatten, indexing
from matrix_jax.browser.graph import Graph, Value, element_type, size
from matrix_jax.browser.operators import concatenate, elementwise, reshape, take, transpose
from matrix_jax.config import UsageError

Rule = Callable[[Graph, Any, list[Value]], 'Value | list[Value]']

UNARY = {
    'abs': 'Abs',
    'ceil': 'Ceil',
    'cos': 'Cos',
    'erf': 'Erf',
    'exp': 'Exp',
    'floor': 'Floor',
    'log': 'Log',
    'logistic': 'Sigmoid',
    'neg': 'Neg',
    'not': 'Not',
    'sign': 'Sign',
    'sin': 'Sin',
    'sqrt': 'Sqrt',
    'tanh': 'Tanh',
}
BINARY = {
    'add': 'Add',
    'add_any': 'Add',
    'and': 'And',
    'div': 'Div',
    'eq': 'Equal',
    'ge': 'GreaterOrEqual',
    'gt': 'Greater',
    'le': 'LessOrEqual',
    'lt': 'Less',
    'max': 'Max',
    'min': 'Min',
    'mul': 'Mul',
    'or': 'Or',
    'pow': 'Pow',
    'sub': 'Sub',
    'xor': 'Xor',
}
NOTHING = {('Sub', 0), ('Mul', 1), ('Div', 1)}  # an operator and a number that change nothing
SAME = ('copy', 'copy_p', 'optimization_barrier', 'reduce_precision', 'stop_gradient')
REDUCTIONS = {'reduce_max': 'ReduceMax', 'reduce_min': 'ReduceMin', 'reduce_sum': 'ReduceSum'}


def write(graph: Graph, program: flatten.FlatProgram, inputs: Sequence[Value]) -> list[Value]:
    """Adds a flat program to a graph; returns its outputs.

    Raises:
      UsageError: it uses primitives, or types, that have no form here.
    """
    _check(program)
    values: dict[Any, Value] = dict(zip(program.inputs, inputs, strict=True))
    values |= {var: graph.constant(one) for var, one in program.constants.items()}

    def read(var: Any) -> Value:
        if isinstance(var, core.Literal):
            kind: Any = var.aval
            return graph.constant(np.asarray(var.val, kind.dtype))
        return values[var]

    for eqn in program.equations:
        made = rule_of(eqn)(graph, eqn, [read(var) for var in eqn.invars])
        made = made if isinstance(made, list) else [made]
        values |= dict(zip(eqn.outvars, made, strict=True))
    return [read(var) for var in program.outputs]


def _check(program: flatten.FlatProgram) -> None:
    names = sorted({eqn.primitive.name for eqn in program.equations if rule_of(eqn) is None})
    if names:
        raise UsageError(f'no ONNX form of {", ".join(names)}, which a step of this world uses')
    for eqn in program.equations:
        for var in eqn.outvars:
            if var.aval.dtype.name in ('bfloat16', 'float16'):
                raise UsageError(
                    f'got a network that computes in {var.aval.dtype.name}, expected float32 '
                    '(--world.dit.dtype float32)'
                )


def rule_of(eqn: Any) -> Rule | None:
    """Returns the rule of an equation, or None."""
    return RULES.get(eqn.primitive.name)


# --- elementwise ---------------------------------------------------------------------------------


def _unary(operator: str) -> Rule:
    return lambda graph, eqn, args: elementwise(graph, operator, args)


def _binary(operator: str) -> Rule:
    def rule(graph: Graph, eqn: Any, args: list[Value]) -> Value:
        name = operator
        if operator in ('And', 'Or', 'Xor') and args[0].dtype != bool:
            name = f'Bitwise{operator}'
        x, other = args
        if other.constant is not None and other.held == (1,) * len(other.held):
            if (operator, other.constant.item()) in NOTHING and x.shape == eqn.outvars[
                0
            ].aval.shape:
                return x
        return elementwise(graph, name, args, eqn.outvars[0].aval.dtype)

    return rule


def _ne(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return elementwise(graph, 'Not', [elementwise(graph, 'Equal', args, bool)])


def _rem(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return elementwise(graph, 'Mod', args, fmod=1)


def _square(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return elementwise(graph, 'Mul', [args[0], args[0]])


def _integer_pow(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    power = eqn.params['y']
    if not 2 <= power <= 4:
        exponent = graph.constant(np.array(power, args[0].dtype))
        return elementwise(graph, 'Pow', [args[0], exponent])
    y = args[0]
    for _ in range(power - 1):
        y = elementwise(graph, 'Mul', [y, args[0]])
    return y


def _rsqrt(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return elementwise(graph, 'Reciprocal', [elementwise(graph, 'Sqrt', args)])


def _convert(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    dtype = np.dtype(eqn.params['new_dtype'])
    if dtype == args[0].dtype:
        return args[0]
    return elementwise(graph, 'Cast', args, dtype, to=element_type(dtype))


def _round(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    if eqn.params['rounding_method'].name != 'TO_NEAREST_EVEN':
        raise UsageError('no ONNX form of rounding away from zero')
    return elementwise(graph, 'Round', args)


def _clamp(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    low, x, high = args
    return elementwise(graph, 'Min', [elementwise(graph, 'Max', [x, low]), high])


def _erfc(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    one = graph.constant(np.ones((), args[0].dtype))
    return elementwise(graph, 'Sub', [one, elementwise(graph, 'Erf', args)])


def _is_finite(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    wrong = [elementwise(graph, name, args, bool) for name in ('IsInf', 'IsNaN')]
    return elementwise(graph, 'Not', [elementwise(graph, 'Or', wrong)])


def _select(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    which, *cases = args
    if len(cases) != 2 or which.dtype != bool:
        raise UsageError('no ONNX form of a choice among more than two cases')
    return elementwise(graph, 'Where', [which, cases[1], cases[0]])


def _shift_right(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    """x >> n rounds down; ONNX shifts only unsigned numbers."""
    x, count = args
    if count.constant is None:
        raise UsageError('no ONNX form of a shift by a computed number of bits')
    wide = elementwise(graph, 'Cast', [x], np.int64, to=element_type(np.int64))
    power = graph.constant(np.left_shift(np.int64(1), count.constant.astype(np.int64)))
    rest = elementwise(graph, 'Mod', [wide, power])
    y = elementwise(graph, 'Div', [elementwise(graph, 'Sub', [wide, rest]), power])
    return elementwise(graph, 'Cast', [y], x.dtype, to=element_type(x.dtype))


# --- reductions and products ---------------------------------------------------------------------


def _reduce(operator: str) -> Rule:
    def rule(graph: Graph, eqn: Any, args: list[Value]) -> Value:
        x, shape = graph.full(args[0]), eqn.outvars[0].aval.shape
        axes = graph.integers(eqn.params['axes'])
        return graph.node(operator, [x.name, axes], x, shape=shape, keepdims=0)

    return rule


def _argmax(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    x, (axis,) = graph.full(args[0]), eqn.params['axes']
    out = eqn.outvars[0].aval
    y = graph.node('ArgMax', [x.name], x, shape=out.shape, dtype=np.int64, axis=axis, keepdims=0)
    return elementwise(graph, 'Cast', [y], out.dtype, to=element_type(out.dtype))


def _cumsum(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    x, axis = graph.full(args[0]), graph.constant_name(np.array(eqn.params['axis'], np.int64))
    return graph.node('CumSum', [x.name, axis], x, reverse=int(eqn.params['reverse']))


def _dot_general(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params['dimension_numbers']
    left, right = (graph.full(one) for one in args)
    out = eqn.outvars[0].aval
    if left.dtype != np.float32 or right.dtype != np.float32:
        raise UsageError(f'no ONNX form of products of {left.dtype} and {right.dtype}')
    rank = len(left.shape)
    plain = len(right.shape) == 2 and not left_batch
    if plain and tuple(left_sum) == (rank - 1,) and len(right_sum) == 1:
        right = right if tuple(right_sum) == (0,) else transpose(graph, right, (1, 0))
        return graph.node('MatMul', [left.name, right.name], left, shape=out.shape)

    def free(value: Value, batch: Sequence[int], summed: Sequence[int]) -> list[int]:
        return [axis for axis in range(len(value.shape)) if axis not in (*batch, *summed)]

    left_free = free(left, left_batch, left_sum)
    right_free = free(right, right_batch, right_sum)
    batch = [left.shape[axis] for axis in left_batch]
    rows = size([left.shape[axis] for axis in left_free])
    columns = size([right.shape[axis] for axis in right_free])
    inner = size([left.shape[axis] for axis in left_sum])
    left = transpose(graph, left, (*left_batch, *left_free, *left_sum))
    right = transpose(graph, right, (*right_batch, *right_sum, *right_free))
    left = reshape(graph, left, (*batch, rows, inner))
    right = reshape(graph, right, (*batch, inner, columns))
    y = graph.node('MatMul', [left.name, right.name], left, shape=(*batch, rows, columns))
    return reshape(graph, y, out.shape)


def _conv(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    params, out = eqn.params, eqn.outvars[0].aval
    spec = params['dimension_numbers']
    if any(one != 1 for one in params['lhs_dilation']) or params['batch_group_count'] != 1:
        raise UsageError('no ONNX form of convolutions of dilated inputs')
    x = transpose(graph, graph.full(args[0]), spec.lhs_spec)
    kernel = transpose(graph, graph.full(args[1]), spec.rhs_spec)
    pads = params['padding']
    y = graph.node(
        'Conv',
        [x.name, kernel.name],
        x,
        shape=[out.shape[axis] for axis in spec.out_spec],
        strides=list(map(int, params['window_strides'])),
        dilations=list(map(int, params['rhs_dilation'])),
        pads=[int(before) for before, _ in pads] + [int(after) for _, after in pads],
        group=int(params['feature_group_count']),
    )
    return transpose(graph, y, np.argsort(spec.out_spec))


# --- layout --------------------------------------------------------------------------------------


def _reshape(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return reshape(graph, args[0], eqn.outvars[0].aval.shape)


def _broadcast(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    shape, places = eqn.params['shape'], eqn.params['broadcast_dimensions']
    held = [1] * len(shape)
    for axis, place in enumerate(places):
        held[place] = args[0].held[axis]
    if tuple(held) == args[0].held:
        return Value(args[0].name, tuple(shape), args[0].held, args[0].dtype, args[0].constant)
    return graph.node('Reshape', [args[0].name, graph.integers(held)], args[0], held, shape)


def _transpose(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return transpose(graph, args[0], eqn.params['permutation'])


def _slice(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    params = eqn.params
    steps = params['strides'] and list(params['strides'])
    return take(graph, args[0], params['start_indices'], params['limit_indices'], steps)


def _concatenate(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    return concatenate(graph, args, eqn.params['dimension'])


def _stack(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    axis, shape = eqn.params['axis'], list(args[0].shape)
    shape.insert(axis, 1)
    return concatenate(graph, [reshape(graph, one, shape) for one in args], axis)


def _split(graph: Graph, eqn: Any, args: list[Value]) -> list[Value]:
    axis, sizes = eqn.params['axis'], list(map(int, eqn.params['sizes']))
    parts = []
    for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        starts, stops = [0] * len(args[0].shape), list(args[0].shape)
        starts[axis], stops[axis] = start, stop
        if start == stop:
            stops[axis] = 0
            parts.append(graph.constant(np.zeros(stops, args[0].dtype)))
        else:
            parts.append(take(graph, args[0], starts, stops))
    return parts


def _pad(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    x, value = graph.full(args[0]), args[1]
    config = [tuple(map(int, one)) for one in eqn.params['padding_config']]
    if any(inside for *_, inside in config):
        raise UsageError('no ONNX form of padding between elements')
    starts = [max(0, -before) for before, _, _ in config]
    stops = [one - max(0, -after) for one, (_, after, _) in zip(x.shape, config)]
    x = take(graph, x, starts, stops)
    pads = [max(0, one[side]) for side in (0, 1) for one in config]
    if not any(pads):
        return x
    shape = eqn.outvars[0].aval.shape
    return graph.node('Pad', [x.name, graph.integers(pads), value.name], x, shape=shape)


def _rev(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    x, axes = graph.full(args[0]), list(eqn.params['dimensions'])
    ends = [-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes)
    return graph.node('Slice', [x.name, *map(graph.integers, ends)], x)


def _tile(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    reps, x, shape = eqn.params['reps'], args[0], eqn.outvars[0].aval.shape
    if all(one == 1 or x.held[axis] == 1 for axis, one in enumerate(reps)):
        return Value(x.name, tuple(shape), x.held, x.dtype, x.constant)
    x = graph.full(x)
    return graph.node('Tile', [x.name, graph.integers(reps)], x, shape=shape)


def _iota(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    shape, axis = eqn.params['shape'], eqn.params['dimension']
    line = np.arange(shape[axis], dtype=eqn.params['dtype'])
    line = line.reshape([-1 if one == axis else 1 for one in range(len(shape))])
    return graph.constant(np.broadcast_to(line, shape))


def _empty(graph: Graph, eqn: Any, args: list[Value]) -> Value:
    out = eqn.outvars[0].aval
    return graph.constant(np.zeros(out.shape, out.dtype))


# --- branches ------------------------------------------------------------------------------------


def _cond(graph: Graph, eqn: Any, args: list[Value]) -> list[Value]:
    which, *inputs = args
    if len(eqn.params['branches']) != 2:
        raise UsageError('no ONNX form of more than two branches')
    inputs = [graph.full(one) for one in inputs]
    if which.dtype != bool:
        which = elementwise(graph, 'Cast', [which], bool, to=element_type(bool))
    made = []
    for name, closed in zip(('otherwise', 'then'), eqn.params['branches'], strict=True):
        program = flatten.inline(closed)
        with graph.branch(name) as outputs:
            outputs += write(graph, program, inputs)
        made.append(outputs[0])
    avals = [var.aval for var in eqn.outvars]
    names = graph.nodes_of('If', [which.name], len(avals), then_branch=made[1], else_branch=made[0])
    graph.shapes |= {name: aval.shape for name, aval in zip(names, avals)}
    return [
        Value(name, aval.shape, aval.shape, np.dtype(aval.dtype))
        for name, aval in zip(names, avals)
    ]


RULES: dict[str, Rule] = {
    **{name: _unary(operator) for name, operator in UNARY.items()},
    **{name: _binary(operator) for name, operator in BINARY.items()},
    **{name: _reduce(operator) for name, operator in REDUCTIONS.items()},
    **dict.fromkeys(SAME, lambda graph, eqn, args: args if len(args) > 1 else args[0]),
    'argmax': _argmax,
    'broadcast_in_dim': _broadcast,
    'clamp': _clamp,
    'concatenate': _concatenate,
    'cond': _cond,
    'conv_general_dilated': _conv,
    'convert_element_type': _convert,
    'cumsum': _cumsum,
    'dot_general': _dot_general,
    'dynamic_slice': indexing.dynamic_slice,
    'dynamic_update_slice': indexing.dynamic_update_slice,
    'empty': _empty,
    'empty2': _empty,
    'erfc': _erfc,
    'expand_dims': _reshape,
    'gather': indexing.gather,
    'integer_pow': _integer_pow,
    'iota': _iota,
    'is_finite': _is_finite,
    'ne': _ne,
    'pad': _pad,
    'rem': _rem,
    'reshape': _reshape,
    'rev': _rev,
    'round': _round,
    'rsqrt': _rsqrt,
    'scatter': indexing.scatter,
    'scatter-add': indexing.scatter,
    'select_n': _select,
    'shift_right_arithmetic': _shift_right,
    'slice': _slice,
    'split': _split,
    'square': _square,
    'squeeze': _reshape,
    'stack': _stack,
    'tile': _tile,
    'transpose': _transpose,
}
