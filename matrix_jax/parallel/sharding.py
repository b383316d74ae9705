"""Axis letters, logical names and mesh axes: the one place that knows a mesh.

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

Layers and tables speak letters and logical names; only `RULES` names mesh axes.
"""

from __future__ import annotations

import contextlib
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from matrix_jax.parallel.mesh import AXES

RULES = {
    'batch': ('data', 'fsdp'),
    'rows': 'seq',
    'tokens': 'seq',
    'heads': 'tensor',
    'mlp': 'tensor',
    'embed': 'fsdp',
    # Heads of a device that has traded its tokens for them.
    'shared heads': ('tensor', 'seq'),
}
LETTERS = {'b': 'batch', 'n': 'tokens', 'd': 'embed', 'k': 'heads', 'm': 'mlp'}


def make_mesh(shape, devices=None) -> Mesh:
    """Mesh with the axes data, fsdp, tensor, seq.

    Args:
      shape: object with int fields data, fsdp, tensor, seq (`config.Mesh`).
      devices: devices to use; all local ones by default, as many as the shape asks for.

    Raises:
      ValueError: the shape asks for more devices than there are, or for a pipeline.
    """
    if shape.pipeline != '1':
        raise ValueError(
            f'mesh.pipeline: got {shape.pipeline}, expected 1: only streams that are '
            'generated or played run in two parts'
        )
    sizes = tuple(getattr(shape, axis) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    count = int(np.prod(sizes))
    if count > len(devices):
        asked = ' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
        raise ValueError(f'mesh: got {asked} = {count} devices, expected at most {len(devices)}')
    return Mesh(np.asarray(devices[:count]).reshape(sizes), AXES)


def make_meshes(shape, devices=None) -> tuple[Mesh, Mesh]:
    """Meshes of a stream's network and of its decoder: the same one, or the two of a pipeline.

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


def abstract_mesh(shape) -> AbstractMesh:
    """The mesh of a shape without devices: for counting what would lie where."""
    return AbstractMesh(tuple(getattr(shape, axis) for axis in AXES), AXES)


def spec(names) -> PartitionSpec:
    """PartitionSpec of logical names (None = not split)."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the batch axes of the mesh."""
    return NamedSharding(mesh, spec(('batch',)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree, places):
    """Host arrays on the mesh: each process gives its devices their parts of equal arrays.

    Args:
      tree: arrays that are the same in every process.
      places: tree of shardings of the same structure.
    """

    def one(leaf, place):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

    return jax.tree.map(one, tree, places)


def within(mesh: Mesh | None):
    """The context in which programs for a mesh are traced; None = for one device."""
    return jax.set_mesh(mesh) if mesh is not None and mesh.size > 1 else contextlib.nullcontext()


def mesh_of(tree) -> Mesh | None:
    """The mesh of several devices that a tree of arrays lies on, if it does."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, 'sharding', None)
        if isinstance(place, NamedSharding):
            return place.mesh if place.mesh.size > 1 else None
    return None


def named(tree) -> str:
    """The devices that a tree of arrays lies on, such as 'cpu' or 'NVIDIA H200 data=2 seq=4'."""
    mesh, arrays = (
        mesh_of(tree),
        [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)],
    )
    devices = arrays[0].devices() if arrays else jax.devices()
    sizes = mesh.shape.items() if mesh else ()
    return ' '.join(
        [next(iter(devices)).device_kind, *(f'{axis}={size}' for axis, size in sizes if size > 1)]
    )


def places(tree):
    """The shardings of a tree of arrays on a mesh; None on one device, where there is no choice.

    A carry has to lie at the end of a step as it did at the start, or the next step is compiled
    anew.
    """
    if mesh_of(tree) is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def made(compiled):
    """Tree of ShapeDtypeStructs of what a compiled program gives, with where it will lie."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        compiled.out_info,
    )


# --- inside a program ------------------------------------------------------------------------


def ways(name: str) -> int:
    """Parts that the mesh in force makes of an axis; 1 without one, or in the program of a device."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else _ways(name, mesh)


def constrain(x, *names):
    """`x` with its axes split by logical names (None = not split).

    Within `jax.set_mesh`; without a mesh it is `x`. An axis that does not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(names, x.shape, mesh))


def spread(function, arguments, result):
    """`function` of each device's part of its arguments, as a program of its own per device.

    Within `jax.set_mesh`; without a mesh, or in such a program, it is `function`. What it computes
    must not cross the axes that split, but by `trade` and `gather`. An axis that does not divide
    stays whole.

    Args:
      function: arrays -> array.
      arguments: one tuple of logical names per argument.
      result: index of the argument that the result is shaped and split like.
    """

    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*arrays)
        specs = tuple(
            fitting(names, array.shape, mesh)
            for names, array in zip(arguments, arrays, strict=True)
        )
        return jax.shard_map(function, in_specs=specs, out_specs=specs[result], check_vma=False)(
            *arrays
        )

    return call


def trade(x, name: str, given: int, taken: int):
    """Within `spread`: axis `taken`, of which devices hold parts by `name`, comes together, and
    axis `given` is parted instead. One all-to-all."""
    return jax.lax.all_to_all(x, RULES[name], given, taken, tiled=True)


def gather(x, name: str, axis: int):
    """Within `spread`: the parts by `name` of an axis side by side on every device. One
    all-gather."""
    return jax.lax.all_gather(x, RULES[name], axis=axis, tiled=True)


def fitting(names, shape, mesh) -> PartitionSpec:
    """`spec` of the axes of an array that divide evenly over a mesh."""
    return spec(
        name if size % _ways(name, mesh) == 0 else None
        for name, size in zip(names, shape, strict=True)
    )


def _ways(name, mesh) -> int:
    rule = RULES.get(name) or ()
    return math.prod(mesh.shape[axis] for axis in ((rule,) if isinstance(rule, str) else rule))


# --- parameters ------------------------------------------------------------------------------


def shardings(axes, shapes, mesh: Mesh):
    """Shardings of a parameter tree from the letters of its weight table.

    Args:
      axes: tree of letter tuples (`conversion.axes`).
      shapes: tree of arrays or ShapeDtypeStructs of the same structure.
      mesh: the mesh. An axis that does not divide evenly stays whole.
    """

    def one(letters, leaf):
        names = []
        for letter, size in zip(letters, leaf.shape, strict=True):
            rule = RULES.get(LETTERS.get(letter, ''))
            free = rule is not None and rule not in names
            names.append(rule if free and size % mesh.shape[rule] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
