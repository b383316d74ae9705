"""Programs as one flat list of primitives: no calls, no scans, and known values computed.

ONNX has loops, but runtimes neither fold constants nor prepare weights inside them. A stream's step
has few and short scans, over layers and solver steps, so they are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# Primitives that call another program -> the parameter that holds it.
CALLS = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'remat2': 'jaxpr',
    'checkpoint': 'jaxpr',
}


class FlatProgram(NamedTuple):
    """A flat program.

    Attributes:
      inputs: its variables.
      outputs: variables or literals.
      equations: those that the outputs depend on, in order.
      constants: variable -> value.
    """

    inputs: list[Any]
    outputs: list[Any]
    equations: list[Any]
    constants: dict[Any, np.ndarray]

    def used(self) -> set[Any]:
        """Returns the variables that an equation or an output reads."""
        read = [*self.outputs, *(one for eqn in self.equations for one in eqn.invars)]
        return {one for one in read if not isinstance(one, core.Literal)}


def flatten(function: Callable, *args: Any) -> FlatProgram:
    """Returns a function of arrays as a flat program.

    Args:
      function: takes and returns trees of arrays.
      args: its arguments; `jax.ShapeDtypeStruct` for inputs, arrays for values that are known.
    """
    leaves, tree = jax.tree.flatten(args)
    given = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(*inputs: Any) -> Any:
        values = list(leaves)
        for index, value in zip(given, inputs, strict=True):
            values[index] = value
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, values)))

    shapes = [leaves[index] for index in given]
    closed = jax.make_jaxpr(call)(*shapes)
    flat = jax.make_jaxpr(lambda *inputs: _run(closed.jaxpr, closed.consts, inputs))(*shapes)
    jaxpr = flat.jaxpr
    constants = {var: np.asarray(one) for var, one in zip(jaxpr.constvars, flat.consts)}
    equations = _needed(jaxpr.eqns, jaxpr.outvars)
    return FlatProgram(list(jaxpr.invars), list(jaxpr.outvars), equations, constants)


def inline(closed: Any) -> FlatProgram:
    """Returns a closed jaxpr, such as a branch of `cond`, as a flat program."""
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in closed.in_avals]
    return flatten(lambda *inputs: _run(closed.jaxpr, closed.consts, inputs), *shapes)


def _needed(equations: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    read = {one for one in outputs if not isinstance(one, core.Literal)}
    kept = []
    for eqn in reversed(equations):
        if not read.isdisjoint(eqn.outvars):
            kept.append(eqn)
            read |= {one for one in eqn.invars if not isinstance(one, core.Literal)}
    return kept[::-1]


def _run(jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr on known values and traced ones; whatever is traced is traced flat."""
    values = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, args))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in _needed(jaxpr.eqns, jaxpr.outvars):
        outputs = _apply(eqn, [read(var) for var in eqn.invars])
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _apply(eqn: Any, args: list[Any]) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner = params[CALLS[name]]
        closed = isinstance(inner, core.ClosedJaxpr)
        return _run(inner.jaxpr if closed else inner, inner.consts if closed else [], args)
    if name == 'scan':
        return _scan(params, args)
    if name == 'cond' and _known(args[:1]):
        branch = params['branches'][int(args[0])]
        return _run(branch.jaxpr, branch.consts, args[1:])
    if _known(args):
        with jax.ensure_compile_time_eval():
            made = eqn.primitive.bind(*args, **params)
    else:
        made = eqn.primitive.bind(*args, **params)
    return made if eqn.primitive.multiple_results else [made]


def _scan(params: dict[str, Any], args: list[Any]) -> list[Any]:
    fixed = params['num_consts']
    first = fixed + params['num_carry']
    constants, carry, given = args[:fixed], args[fixed:first], args[first:]
    body, count = params['jaxpr'], params['length']
    made: list[Any] = [None] * count
    order = range(count)
    for index in reversed(order) if params['reverse'] else order:
        now = [_take(one, index) for one in given]
        outputs = _run(body.jaxpr, body.consts, [*constants, *carry, *now])
        carry, made[index] = outputs[: len(carry)], outputs[len(carry) :]
    stacked = [
        jax.lax.concatenate([jax.lax.expand_dims(one, [0]) for one in column], 0)
        for column in zip(*made)
    ]
    return [*carry, *stacked]


def _take(x: Any, index: int) -> Any:
    if _known([x]):
        return np.asarray(x)[index]
    return jax.lax.squeeze(jax.lax.slice_in_dim(x, index, index + 1), [0])


def _known(args: Sequence[Any]) -> bool:
    return not any(isinstance(one, jax.core.Tracer) for one in args)
