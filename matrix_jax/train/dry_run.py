"""Memory and FLOPs of a training step on devices that are not there: compiled, never run.

Memory is XLA's analysis of the compiled step, per device; FLOPs are its cost analysis. No
parameters are allocated. The CPU emulates the devices, so two things differ from an accelerator:
XLA keeps many bfloat16 values in float32, and attention is computed block by block. Work space is
therefore an upper bound.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from matrix_jax import worlds
from matrix_jax.nn import conv_cpu
from matrix_jax.parallel import sharding
from matrix_jax.train import program
from matrix_jax.weights import conversion

FLAG = '--xla_force_host_platform_device_count'
MIB, GIGA = 2**20, 10**9


def emulate_devices(count: int):
    """Makes the CPU emulate `count` devices, unless the environment sets a number."""
    flags = os.environ.get('XLA_FLAGS', '')
    if FLAG not in flags:
        # The code never runs, so it need not be optimised.
        os.environ['XLA_FLAGS'] = f'{flags} {FLAG}={count} --xla_backend_optimization_level=0'
    jax.config.update('jax_platforms', 'cpu')


class Update(NamedTuple):
    """One update of a run, traced for a mesh and lowered.

    Attributes:
      made: the program.
      params, state: ShapeDtypeStructs of the start and of the training state.
      lowered: the lowered step.
    """

    made: program.TrainProgram
    params: Any
    state: Any
    lowered: Any


def lower(run, devices: Sequence[jax.Device] | None = None) -> Update:
    """Lowers one update of a run.

    Args:
      run: the run.
      devices: devices of the mesh; None = those of this machine.

    Raises:
      UsageError: the stage does not train this kind of world.
      ValueError: the stage or the batch does not fit the mesh.
    """
    world = worlds.build(run.world).with_tokenizers(None)
    run.stage.check_world(world)
    params = _start(run, world)
    made = program.build(run, world, params, devices)
    state = jax.eval_shape(made.start, params)
    batch = run.stage.example(world, made.examples)
    lowered = made.lower(
        _placed(state, made.places), _placed(batch, sharding.batch_sharding(made.mesh))
    )
    return Update(made, params, state, lowered)


def report(run) -> str:
    """Cost of one update of a run, as lines of text.

    Raises:
      UsageError, ValueError: see `lower`.
    """
    began = time.time()
    update = lower(run)
    lowering, began = time.time() - began, time.time()
    memory = update.lowered.compile().memory_analysis()
    compiling = time.time() - began
    made, state = update.made, update.state
    # Counted for the examples of one device, as attention blocks depend on the batch size.
    ways = run.mesh.data * run.mesh.fsdp
    world = worlds.build(run.world).with_tokenizers(None)
    work = ways * flops(made.update, state, run.stage.example(world, made.examples // ways))
    rows = [
        *sizes(state, made.places).items(),
        ('activations, gradients and work space', memory.temp_size_in_bytes),
        ('in all', program_bytes(memory)),
    ]
    return '\n'.join(
        [
            title(run, update),
            'per device:',
            *(f'  {name:40}{size / MIB:>12,.1f} MiB' for name, size in rows),
            f'FLOPs per update: {work / GIGA:,.1f} G in all, '
            f'{work / made.mesh.size / GIGA:,.1f} G per device',
            f'(lowered in {lowering:.0f} s, compiled in {compiling:.0f} s; nothing was allocated)',
        ]
    )


def title(run, update: Update) -> str:
    """One line: the stage, its mesh, its batch and how many parameters train."""
    made = update.made
    mesh = ' x '.join(f'{axis}={size}' for axis, size in made.mesh.shape.items() if size > 1)
    return (
        f'{run.name}: {type(run.stage).__name__} on {mesh or "one device"}, '
        f'{made.examples} examples per update, {_count(update.state.student):,} of '
        f'{_count(update.params):,} parameters train'
    )


def program_bytes(memory) -> int:
    """Bytes that a compiled program holds on each device, of its `memory_analysis()`."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _start(run, world):
    """ShapeDtypeStructs of a stage's start: trained leaves float32, others as the network runs."""
    dtype, stage = world.cfg.dit.dtype, run.stage
    flat = conversion.flatten(stage.start(world, world.shapes(), run.train.seed))
    return conversion.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, 'float32' if stage.trainable(path) else dtype)
            for path, leaf in flat.items()
        }
    )


def _placed(tree, places):
    if isinstance(places, jax.sharding.Sharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def sizes(state, places) -> dict[str, int]:
    """Bytes per device of the parts of a state.

    Args:
      state: `state.TrainState` of ShapeDtypeStructs.
      places: their shardings.
    """

    def one(role):
        return sum(
            jax.tree.leaves(
                jax.tree.map(
                    lambda leaf, place: (
                        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                    ),
                    getattr(state, role),
                    getattr(places, role),
                )
            )
        )

    return {
        'parameters': one('student'),
        'average of them': one('ema'),
        'optimizer': one('opt'),
        'frozen weights': one('frozen'),
    }


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- FLOPs -----------------------------------------------------------------------------------


def flops(function, *arguments) -> float:
    """FLOPs of a function by XLA's cost analysis, with plain convolutions.

    The analysis counts the body of a loop once; the other iterations are analysed separately and
    added.
    """
    with conv_cpu.disabled():
        # A new function, as jax caches traces that were made with other convolutions.
        return _flops(jax.make_jaxpr(lambda *given: function(*given))(*arguments))


def _flops(program: ClosedJaxpr) -> float:
    total = _once(program)
    for scan in _scans(program.jaxpr):
        body = scan.params['jaxpr']
        total += scan.params['length'] * _flops(body) - _once(body)
    return total


def _once(program: ClosedJaxpr) -> float:
    """FLOPs with one iteration of every loop, nested ones included."""
    return jax.jit(jaxpr_as_fun(program)).lower(*program.in_avals).cost_analysis()['flops']


def _scans(program: Jaxpr):
    """The outermost scans of a program."""
    for equation in program.eqns:
        if equation.primitive.name == 'scan':
            yield equation
            continue
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, (ClosedJaxpr, Jaxpr)):
                    yield from _scans(getattr(part, 'jaxpr', part))
