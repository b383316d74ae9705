"""What every world is made of: named parts, and a folder in the released layout.

A part is one network: its config (read from the folder's config.json, so the folder decides the
sizes), its weight table and its parameter shapes. A world lists its parts; reading, writing, counting
and sharding them is the same for all worlds and stands here.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matrix_jax import checkpoint, convert, sharding


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a world.

    Attributes:
      field: name of its config in the world's config.
      folder: its folder in the released layout.
      weights: config -> weight table.
      shapes: config -> tree of ShapeDtypeStructs.
      init: (config, key) -> fresh parameters.
    """
    field: str
    folder: str
    weights: Callable[[Any], convert.Table]
    shapes: Callable[[Any], dict]
    init: Callable[[Any, jax.Array], dict]


class Parts:
    """Base of worlds: `self.cfg` and the class attribute `parts`."""

    parts: tuple[Part, ...] = ()
    extras: tuple[str, ...] = ()     # folders without weights: tokenizers, scheduler

    def __init__(self, cfg):
        self.cfg = cfg

    @property
    def tables(self) -> dict[str, convert.Table]:
        """Folder name -> weight table."""
        return {part.folder: part.weights(getattr(self.cfg, part.field)) for part in self.parts}

    def shapes(self) -> dict:
        """Parameter tree of ShapeDtypeStructs by part; nothing is allocated."""
        return {part.folder: part.shapes(getattr(self.cfg, part.field)) for part in self.parts}

    def init(self, seed: int) -> dict:
        """Fresh float32 parameters by part."""
        keys = jax.random.split(jax.random.key(seed), len(self.parts))
        return {part.folder: part.init(getattr(self.cfg, part.field), key)
                for part, key in zip(self.parts, keys, strict=True)}

    def replace(self, **fields):
        """The same world with config fields replaced."""
        return type(self)(dataclasses.replace(self.cfg, **fields))

    def load(self, folder: str, only: tuple[str, ...] | None = None) -> dict:
        """Parameters from a folder that fits this world, strictly; numpy, dtype as stored.

        Raises:
          CheckpointError: a file is missing, damaged or not safetensors.
          ConversionError: names or shapes do not fit; all faults at once.
        """
        params = {}
        for part in self.parts:
            if only is None or part.folder in only:
                _, tensors = checkpoint.read_component(folder, part.folder)
                cfg = getattr(self.cfg, part.field)
                try:
                    params[part.folder] = convert.to_jax(part.weights(cfg), tensors, part.shapes(cfg))
                except convert.ConversionError as error:
                    raise convert.ConversionError(f'{folder}/{part.folder}: {error}') from error
        return params

    def save(self, folder: str, params: Mapping, start: str | None = None, dtype='bfloat16'):
        """Writes a folder in the released layout; parts that `params` lacks come from `start`."""
        for part in self.parts:
            cfg = getattr(self.cfg, part.field)
            if part.folder in params:
                tensors = convert.to_torch(part.weights(cfg), params[part.folder])
                checkpoint.write_component(folder, part.folder, cfg.to_released(), tensors, dtype=dtype)
            elif start:
                _copy(Path(checkpoint.resolve(start)) / part.folder, Path(folder) / part.folder)
        for name in self.extras:
            source = Path(checkpoint.resolve(start)) / name if start else None
            if source is not None and source.is_dir():
                _copy(source, Path(folder) / name)
            else:
                self.write_extra(name, os.path.join(folder, name))
        present = [part.folder for part in self.parts if (Path(folder) / part.folder).is_dir()]
        index = {name: ['matrix_jax', name] for name in (*present, *self.extras)}
        checkpoint.write_json(folder, 'model_index.json', {'_class_name': self.cfg.name, **index})

    def write_extra(self, name: str, folder: str):
        """Writes one of `extras` from scratch."""
        raise NotImplementedError

    def device_put(self, params, mesh):
        """Parameters on the mesh: sharded by the letters of their tables."""
        axes = {name: convert.axes(self.tables[name]) for name in params}
        return jax.device_put(params, sharding.shardings(axes, params, mesh))

    def summary(self, mesh) -> str:
        """One line per part: parameters, and bytes per device on `mesh` at bfloat16; abstract."""
        lines, total, local = [], 0, 0
        shapes = self.shapes()
        axes = {name: convert.axes(self.tables[name]) for name in shapes}
        places = sharding.shardings(axes, shapes, mesh)
        for name in shapes:
            leaves = list(zip(jax.tree.leaves(shapes[name]), jax.tree.leaves(places[name]), strict=True))
            count = sum(int(np.prod(leaf.shape)) for leaf, _ in leaves)
            mine = sum(int(np.prod(place.shard_shape(leaf.shape))) for leaf, place in leaves)
            lines.append(f'{name:16} {count:>14,} parameters  {mine * 2 / 2**20:>10,.1f} MiB per device')
            total, local = total + count, local + mine
        lines.append(f'{"total":16} {total:>14,} parameters  {local * 2 / 2**20:>10,.1f} MiB per device')
        return '\n'.join(lines)


def read_config(part_config, folder: str, name: str):
    """`part_config.from_released` of a part's config.json, with the folder named in errors."""
    released = checkpoint.read_config(folder, name)
    try:
        return part_config.from_released(released)
    except ValueError as error:
        raise checkpoint.CheckpointError(f'{folder}/{name}/config.json: {error}') from error


def _copy(source: Path, target: Path):
    if source.resolve() != target.resolve():
        checkpoint.replace_folder(
            target, lambda part: shutil.copytree(source, part, dirs_exist_ok=True))
