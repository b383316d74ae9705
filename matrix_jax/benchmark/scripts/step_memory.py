"""Memory of one step of a stream on devices that are not there: compiled, never run.

    python -m matrix_jax.benchmark.scripts.step_memory matrix_game_3:MOE --mesh.fsdp 8

Parameters are those that a step reads, without text and image encoders. The CPU emulates the
devices, so work space is an upper bound (`train.dry_run`): XLA keeps many bfloat16 values in
float32 there, and attention is computed block by block.
"""

import argparse
import math
import sys
import time

import jax

from matrix_jax import recipes
from matrix_jax.benchmark import compiled
from matrix_jax.benchmark import target as targets
from matrix_jax.parallel import sharding
from matrix_jax.train import dry_run

MIB = 2**20


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('recipe')
    args, overrides = parser.parse_known_args(argv)
    run = recipes.load(args.recipe, overrides)
    dry_run.emulate_devices(run.mesh.devices)
    print(report(run))


def report(run) -> str:
    """MiB per device of the parameters, the state of one stream and the program of a step."""
    world = targets.build(run.world)
    mesh = sharding.make_mesh(run.mesh)
    params, carry, control = compiled.step_arguments(world)
    params = _placed(params, world.param_places(params, mesh))
    carry = _placed(carry, jax.tree.map(lambda _: sharding.replicated(mesh), carry))
    rows = {
        f'{name}, in host memory' if _on_host(tree) else name: _local_bytes(tree)
        for name, tree in params.items()
    }
    rows['state of a stream'] = _local_bytes(carry)
    began = time.time()
    with sharding.use_mesh(mesh):
        program = jax.jit(world.stream().step, donate_argnums=1).lower(params, carry, control)
        memory = program.compile().memory_analysis()
    rows['work space of a step'] = memory.temp_size_in_bytes
    axes = ' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1)
    return '\n'.join(
        [
            f'{run.name} on {axes or "one device"}, per device:',
            *(f'  {name:40}{size / MIB:>12,.1f} MiB' for name, size in rows.items()),
            f'(compiled in {time.time() - began:.0f} s; nothing was allocated)',
        ]
    )


def _placed(tree, places):
    """ShapeDtypeStructs with their shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def _local_bytes(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _on_host(tree) -> bool:
    return any(leaf.sharding.memory_kind == 'pinned_host' for leaf in jax.tree.leaves(tree))


if __name__ == '__main__':
    sys.exit(main())
