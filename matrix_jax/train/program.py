"""One update of a stage as a compiled program on a mesh, for the training loop and for dry runs.

Parameters, their average and the optimizer state have the same shardings: over fsdp and tensor, by
the axis letters of the weight tables. The batch is sharded over data and fsdp, video tokens over
seq.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from matrix_jax.parallel import compilation, sharding
from matrix_jax.train import state as states
from matrix_jax.weights import conversion


class TrainProgram(NamedTuple):
    """A stage on a mesh.

    Attributes:
      mesh: the mesh.
      examples: examples per update, over all processes and accumulated batches.
      share: (index, count) of the equal part of these that this process reads.
      places: shardings of the state.
      start: `start(params) -> state`, pure.
      init: `init(params) -> state` on the mesh, from host arrays.
      put: `put(batch rows of this process) -> batch` on the mesh.
      step: `step(state, batch) -> (state, metrics)`; donates the state.
      update: `step` before compilation.
      lower: `lower(state, batch)` lowers `step` for arrays or ShapeDtypeStructs.
    """

    mesh: jax.sharding.Mesh
    examples: int
    share: tuple[int, int]
    places: Any
    start: Callable
    init: Callable
    put: Callable
    step: Callable
    update: Callable
    lower: Callable


def build(run, world, params: Mapping, devices: Sequence[jax.Device] | None = None) -> TrainProgram:
    """Builds the program of a run.

    Args:
      run: the recipe (`config.Run`).
      world: the world whose components train.
      params: parameters by component, or their ShapeDtypeStructs.
      devices: devices of the mesh; None = those of this machine.

    Raises:
      ValueError: the batch does not divide by the mesh, or the mesh does not fit the devices.
    """
    stage, train = run.stage, run.train
    check(run)
    mesh = sharding.make_mesh(run.mesh, devices)
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f'mesh: got {mesh.size} devices, expected all {jax.device_count()} of the '
            f'{jax.process_count()} processes'
        )
    axes = stage.axes(world)
    tx = stage.transform(axes, train.steps)
    if not train.shard_frozen:  # leaves without letters are replicated
        axes = {path: letters for path, letters in axes.items() if stage.trainable(path)}
    start = partial(states.init, trainable=stage.trainable, tx=tx, seed=train.seed)
    places = states.shardings(jax.eval_shape(start, params), axes, mesh)
    update = states.make_step(partial(stage.loss, world), tx, stage.ema, train.accumulate)
    jitted = compilation.jit(
        update, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
    )
    split, examples = sharding.batch_sharding(mesh), train.batch * train.accumulate
    share = _share(split, examples)

    def init(params):
        flat = conversion.flatten(params)
        given = sharding.put_global(flat, states.shardings(flat, axes, mesh))
        return jax.jit(start, out_shardings=places)(conversion.unflatten(given))

    def put(batch):
        return {
            name: jax.make_array_from_process_local_data(
                split, np.asarray(leaf), (len(leaf) * share[1], *leaf.shape[1:])
            )
            for name, leaf in batch.items()
        }

    def within(function):
        def call(state, batch):
            with sharding.set_mesh(mesh):
                return function(state, batch)

        return call

    return TrainProgram(
        mesh,
        examples,
        share,
        places,
        start,
        init,
        put,
        within(jitted),
        update,
        within(jitted.lower),
    )


def check(run):
    """Raises ValueError unless each batch splits evenly over the mesh."""
    ways = run.mesh.data * run.mesh.fsdp
    if run.train.batch % ways:
        raise ValueError(
            f'train.batch: got {run.train.batch}, expected a multiple of mesh.data x '
            f'mesh.fsdp = {run.mesh.data} x {run.mesh.fsdp} = {ways}'
        )


def _share(split, examples: int) -> tuple[int, int]:
    """(index, count): this process holds part `index` of `count` equal parts of a batch."""
    spans = [
        index[0].indices(examples)[:2]
        for index in split.addressable_devices_indices_map((examples,)).values()
    ] or [(0, examples)]  # compile-only devices belong to no process
    start, stop = min(start for start, _ in spans), max(stop for _, stop in spans)
    return start // (stop - start), examples // (stop - start)
