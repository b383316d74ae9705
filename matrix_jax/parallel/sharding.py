"""Axis letters, logical names and mesh axes; no other module names mesh axes.

| letter | meaning              | logical name | mesh axes by default |
|--------|----------------------|--------------|----------------------|
| B      | batch (players)      | batch        | data, fsdp           |
| F      | pixel frames         |              |                      |
| T      | latent frames        |              |                      |
| H      | latent height        | rows         | seq                  |
| W      | latent width         |              |                      |
| C      | latent channels      |              |                      |
| N      | video tokens         | tokens       | seq                  |
| L      | text tokens          |              |                      |
| S      | cache slots          | slots        |                      |
| D      | model width          | embed        | fsdp                 |
| K      | heads                | heads        | tensor               |
| E      | head width           |              |                      |
| M      | mlp width            | mlp          | tensor               |
| A      | action width         |              |                      |
| G      | noise groups         |              |                      |

Layers and conversion tables use letters and logical names; `RULES` maps them to mesh axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from matrix_jax.parallel import compilation
from matrix_jax.parallel.mesh import AXES
from matrix_jax.parallel.mesh import Mesh as MeshShape

RULES: dict[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp'),
    'rows': 'seq',
    'tokens': 'seq',
    'heads': 'tensor',
    'mlp': 'tensor',
    'embed': 'fsdp',
    # Heads on a device after an all-to-all has gathered its tokens.
    'shared heads': ('tensor', 'seq'),
}
LETTERS = {'b': 'batch', 'n': 'tokens', 'd': 'embed', 'k': 'heads', 'm': 'mlp'}


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes data, fsdp, tensor, seq.

    Args:
      shape: devices per axis.
      devices: devices to use; by default as many of `jax.devices()` as the shape asks for.

    Raises:
      ValueError: the shape asks for more devices than there are, or for a pipeline.
    """
    if shape.pipeline != '1':
        raise ValueError(
            f'mesh.pipeline: got {shape.pipeline}, expected 1: only streams that are '
            'generated or played run in two parts'
        )
    sizes = tuple(shape.axes.values())
    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        asked = ' x '.join(f'{axis}={size}' for axis, size in shape.axes.items())
        raise ValueError(
            f'mesh: got {asked} = {shape.devices} devices, expected at most {len(devices)}'
        )
    return Mesh(np.asarray(devices[: shape.devices]).reshape(sizes), AXES)


def make_meshes(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """Returns the meshes of a stream's network and of its decoder, two parts with a pipeline.

    Raises:
      ValueError: the shape asks for more devices than there are.
    """
    if not shape.parts:
        return (make_mesh(shape, devices),) * 2
    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise ValueError(
            f'mesh.pipeline: got {shape.pipeline} = {shape.devices} devices, '
            f'expected at most {len(devices)}'
        )
    network, decoder = shape.parts
    return make_mesh(network, devices), make_mesh(decoder, devices[network.devices :])


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """Returns the mesh of a shape without devices, to compute shardings only."""
    return AbstractMesh(tuple(shape.axes.values()), AXES)


def spec(names: Iterable[str | None]) -> PartitionSpec:
    """Returns the PartitionSpec of logical names; None means not split."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over the batch axes of the mesh."""
    return NamedSharding(mesh, spec(('batch',)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_global(tree: Any, shardings: Any) -> Any:
    """Returns a tree of host arrays as arrays on a mesh that may span processes.

    Args:
      tree: arrays, the same in every process.
      shardings: tree of shardings of the same structure.
    """

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The context to trace a program for a mesh in; None or one device needs none."""
    return set_mesh(mesh) if mesh is not None and mesh.size > 1 else contextlib.nullcontext()


def set_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """The context of a mesh, of one device too."""
    # What is computed while tracing cannot be computed on compile-only devices.
    if compilation.compile_only():
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return jax.set_mesh(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh that a tree of arrays lies on, or None on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding: Any = getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding):
            mesh: Any = sharding.mesh
            return mesh if mesh.size > 1 else None
    return None


def device_names(tree: Any) -> str:
    """Describes the devices of a tree of arrays, such as 'cpu' or 'NVIDIA H200 data=2 seq=4'."""
    mesh = mesh_of(tree)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    devices = arrays[0].devices() if arrays else jax.devices()
    sizes = mesh.shape.items() if mesh else ()
    return ' '.join(
        [next(iter(devices)).device_kind, *(f'{axis}={size}' for axis, size in sizes if size > 1)]
    )


def tree_shardings(tree: Any) -> Any:
    """Returns the shardings of a tree of arrays on a mesh, or None on one device.

    As `out_shardings` of a step they keep its carry where it was; else the next step is compiled
    again.
    """
    if mesh_of(tree) is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def output_shapes(compiled: Any) -> Any:
    """Returns a tree of ShapeDtypeStructs, with shardings, of what a compiled program returns."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        compiled.out_info,
    )


# --- inside a traced program -----------------------------------------------------------------


def num_shards(name: str) -> int:
    """Returns how many parts the current mesh makes of an axis.

    It is 1 without a mesh, and inside `per_device`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else _num_shards(name, mesh)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Returns `x` with its axes split by logical names (None means not split).

    Without a mesh it returns `x`. An axis that does not divide evenly stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(names, x.shape, mesh))


def per_device(function: Callable, arguments: Sequence[tuple], result: int) -> Callable:
    """Returns `function` applied by each device to its own part of the arguments.

    Without a mesh, or inside another `per_device`, it is `function` itself. Inside, data crosses
    the split axes only by `all_to_all` and `all_gather`. An axis that does not divide evenly stays
    whole.

    Args:
      function: arrays -> array.
      arguments: one tuple of logical names per argument.
      result: index of the argument that the result is shaped and split like.
    """

    def call(*arrays: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*arrays)
        specs = tuple(
            fitting_spec(names, array.shape, mesh)
            for names, array in zip(arguments, arrays, strict=True)
        )
        return jax.shard_map(function, in_specs=specs, out_specs=specs[result], check_vma=False)(
            *arrays
        )

    return call


def all_to_all(x: jax.Array, name: str, split_axis: int, concat_axis: int) -> jax.Array:
    """Inside `per_device`: gathers `concat_axis`, split by `name`, and splits `split_axis`
    instead, by one all-to-all."""
    return jax.lax.all_to_all(x, RULES[name], split_axis, concat_axis, tiled=True)


def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `per_device`: gathers an axis split by `name` on every device."""
    return jax.lax.all_gather(x, RULES[name], axis=axis, tiled=True)


def fitting_spec(names: Iterable[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Returns `spec` of the axes of an array that divide evenly over a mesh."""
    return spec(
        name if size % _num_shards(name, mesh) == 0 else None
        for name, size in zip(names, shape, strict=True)
    )


def _num_shards(name: str | None, mesh: Any) -> int:
    rule = RULES.get(name or '', ())
    return math.prod(mesh.shape[axis] for axis in ((rule,) if isinstance(rule, str) else rule))


# --- parameters ------------------------------------------------------------------------------


def param_shardings(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the shardings of a parameter tree from the letters of its conversion table.

    Args:
      axes: tree of letter tuples (`conversion.axes`).
      shapes: tree of arrays or ShapeDtypeStructs of the same structure.
      mesh: the mesh. An axis that does not divide evenly stays whole.
    """

    def one(letters: tuple[str, ...], leaf: Any) -> NamedSharding:
        names: list[Any] = []
        for letter, size in zip(letters, leaf.shape, strict=True):
            rule: Any = RULES.get(LETTERS.get(letter, ''))
            free = rule is not None and rule not in names
            names.append(rule if free and size % mesh.shape[rule] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
