"""Streams as files of `jax.export`: programs that run without this package's models.

A folder holds `condition`, `init`, `prefill` and `step` of a world's stream, and `export.json` with
their input shapes. The carry is a tree as in Python: nothing has to be flattened. Parameters are
arguments, not part of the files.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from matrix_jax import config, worlds
from matrix_jax.weights import diffusers_layout

SUFFIX = '.jax_export'
INDEX = 'export.json'
_registered: set[type] = set()


def save(run: config.Run, folder: str | Path, platforms: tuple[str, ...] | None = None) -> str:
    """Writes the programs of a recipe, batch 1; returns a line about it.

    Args:
      run: a recipe with weights.
      folder: must not exist.
      platforms: such as ('cpu', 'cuda', 'tpu'); that of this process by default.

    Raises:
      UsageError: the model makes whole clips, the folder exists, or flatbuffers is missing.
    """
    _check_installed()
    if run.world.clip:
        raise config.UsageError(f'{run.name}: makes whole clips, expected a model that streams')
    if Path(folder).exists():
        raise config.UsageError(f'{folder}: is there already, expected a new name')
    world, params = worlds.open_run(run)
    stream = world.stream()
    frames = np.zeros((world.start_frames, world.cfg.height, world.cfg.width, 3), np.uint8)
    inputs, _ = world.inputs('', frames)
    key = jax.ShapeDtypeStruct((1, 2), jnp.uint32)
    cond = jax.eval_shape(world.condition, params, *inputs)
    carry = jax.eval_shape(stream.init, params, cond, key)
    idle = world.vocabulary.encode([world.vocabulary.idle] * world.cfg.stream.controls_per_step)
    first = world.vocabulary.encode([world.vocabulary.idle] * world.first_step_controls)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    filled, _ = jax.eval_shape(stream.prefill, params, carry, first[None])
    calls = {
        'condition': (world.condition, (shapes, *inputs)),
        'init': (stream.init, (shapes, cond, key)),
        'prefill': (stream.prefill, (shapes, carry, first[None])),
        'step': (stream.step, (shapes, filled, idle[None])),
    }
    types = sorted({_name(one) for tree in (cond, carry, filled) for one in node_types(tree)})
    register(types)

    def fill(new: Path) -> None:
        about: dict[str, Any] = {'recipe': run.name, 'types': types, 'inputs': {}}
        for name, (function, args) in calls.items():
            made = export.export(jax.jit(function), platforms=platforms)(*args)
            (new / f'{name}{SUFFIX}').write_bytes(made.serialize())
            about['inputs'][name] = [str(one) for one in made.in_avals[-2:]]
        (new / INDEX).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')

    diffusers_layout.replace_folder(Path(folder), fill)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return f'{folder}: {", ".join(calls)} of {run.name}, {size / 2**20:.1f} MiB'


def load(folder: str | Path) -> dict[str, Any]:
    """Returns the functions that `save` wrote, by name; jit them or call them.

    Raises:
      UsageError: the folder is not one of `save`.
    """
    _check_installed()
    try:
        register(json.loads(Path(folder, INDEX).read_text(encoding='utf-8'))['types'])
        return {
            path.stem: export.deserialize(bytearray(path.read_bytes())).call
            for path in sorted(Path(folder).glob(f'*{SUFFIX}'))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise config.UsageError(f'{folder}: not a folder of exported programs ({error})') from error


def node_types(tree: Any) -> Iterator[type]:
    """Yields the classes of this package that a tree is made of."""
    waiting: list[Any] = [jax.tree.structure(tree)]
    while waiting:
        node = waiting.pop()
        waiting += node.children()
        data = node.node_data()
        if data and data[0].__module__.partition('.')[0] == __name__.partition('.')[0]:
            yield data[0]


def register(names: list[str]) -> None:
    """Lets `jax.export` write and read classes of this package, by 'module:class'.

    Raises:
      ValueError: a name is not that of a tree of this package.
    """
    for name in names:
        module, _, qualname = name.partition(':')
        if module.partition('.')[0] != __name__.partition('.')[0]:
            raise ValueError(f'{name}: not a class of this package')
        found: Any = getattr(importlib.import_module(module), qualname)
        if found in _registered:
            continue
        _registered.add(found)
        if hasattr(found, '_fields'):
            export.register_namedtuple_serialization(found, serialized_name=name)
        else:
            # Classes of `flax.struct` whose fields are all arrays: there is nothing else to keep.
            blank = found(**dict.fromkeys(found.__dataclass_fields__))
            tree: Any = jax.tree.structure(blank)
            auxdata = tree.node_data()[1]
            export.register_pytree_node_serialization(
                found,
                serialized_name=name,
                serialize_auxdata=lambda _: b'',
                deserialize_auxdata=lambda _, aux=auxdata: aux,
            )


def _check_installed() -> None:
    if not importlib.util.find_spec('flatbuffers'):
        raise config.UsageError(
            "exported programs need flatbuffers: pip install 'matrix_jax[export]'"
        )


def _name(found: type) -> str:
    return f'{found.__module__}:{found.__qualname__}'
