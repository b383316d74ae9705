"""Whole folders of weights: released layout <-> ours, and random ones for tests and benchmarks.

Ours is the same folder with the safetensors of every part replaced by `params/`, an orbax tree in
our names and axes. All other files (configs, tokenizers, scheduler) are carried along, so there and
back gives the same folder. Parts are handled one by one: the largest has to fit the memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange

from matrix_jax import worlds
from matrix_jax.config import UsageError, check_writable
from matrix_jax.weights import conversion, diffusers_layout, training_state

PARAMS = 'params'
PICKLES = ('.bin', '.pth', '.pt')
RANDOM_SHARD = 10**9  # bytes that are drawn before they are written


def convert(world_cfg, source: str, target: str, unpickle: Callable[[Path, Path], None]) -> str:
    """Converts a folder to the other layout, whichever it has; strictly, all of it or nothing.

    Args:
      world_cfg: config of a world of that kind; the folder decides all sizes.
      source: folder in the released layout or ours, or one pickle of tensors.
      target: what to write; must not exist. Of one pickle it is a `.safetensors` file with the same
        names, or the folder of a part, such as 'DIR/vae', which is then checked.
      unpickle: `unpickle(pickle, safetensors)` for `.bin`, `.pth` and `.pt` files.

    Returns:
      One line about what was done.

    Raises:
      CheckpointError, ConversionError: the source cannot be used.
      UsageError: it is neither layout, or the target is there.
    """
    _check_new(target)
    if Path(source).suffix in PICKLES and Path(source).is_file():
        return _from_pickle(world_cfg, Path(source), Path(target), unpickle)
    source = diffusers_layout.resolve(source)
    parts = worlds.build(world_cfg).components
    ours = [part for part in parts if (source / part.folder / PARAMS).is_dir()]
    released = [
        part
        for part in parts
        if part not in ours and (source / part.folder / 'config.json').is_file()
    ]
    if not (ours or released) or (ours and released):
        raise UsageError(
            f'{source}: got {len(released)} parts in the released layout and '
            f'{len(ours)} in ours, expected parts in one of them '
            f'({", ".join(part.folder for part in parts)})'
        )

    def fill(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=_weight_files)
        world = worlds.describe(world_cfg, source)
        for part in ours:
            tensors = conversion.to_torch(
                part.weights(getattr(world.cfg, part.field)), _read_ours(source / part.folder)
            )
            diffusers_layout.write_component(
                folder,
                part.folder,
                diffusers_layout.read_config(source, part.folder),
                tensors,
                None,
            )
        for part in released:
            with _plain_part(source, part.folder, unpickle) as plain:
                params = world.load(plain, only=(part.folder,))[part.folder]
                _write_ours(folder / part.folder, params)

    diffusers_layout.replace_folder(Path(target), fill)
    return f'{target}: {", ".join(part.folder for part in ours or released)} ' + (
        'in the released layout' if ours else 'as orbax trees'
    )


def write_random(
    world_cfg, folder: str, seed: int, layers: int | None = None, text_layers: int | None = None
) -> str:
    """Writes a folder of random weights in the released layout, with byte tokenizers.

    Tensors are drawn while they are written, so that the folder may be larger than the memory.

    Args:
      world_cfg: config of the world.
      folder: must not exist.
      seed: one seed is one folder.
      layers: of the DiT and the encoders, if it is to have fewer than the recipe.
      text_layers: of the text encoder; as `layers` by default.
    """
    _check_new(folder)
    world = worlds.build(shorten(world_cfg, layers, text_layers))

    def fill(fresh):
        for part in world.components:
            tensors = {}
            for row, shape, draw in world.draws(part, seed, zero_init=False):
                for key, layer in zip(row.keys(), range(*row.layers) if row.layers else (None,)):
                    tensors[key] = Drawn(row, shape, draw, layer)
            diffusers_layout.write_component(
                fresh,
                part.folder,
                getattr(world.cfg, part.field).to_released(),
                tensors,
                shard_size=RANDOM_SHARD,
            )
        world.save(fresh, {})

    diffusers_layout.replace_folder(Path(folder), fill)
    size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    return f'{folder}: random weights, {size / 2**20:,.1f} MiB'


def shorten(cfg, layers: int | None, text_layers: int | None = None):
    """The world's config with fewer layers; blocks that differ keep their share of the DiT."""
    for name, count in (('--layers', layers), ('--text-layers', text_layers)):
        if count is not None and count < 1:
            raise UsageError(f'{name}: got {count}, expected at least 1')
    if text_layers is not None and not hasattr(cfg, 'text'):
        raise UsageError(f'--text-layers: got {text_layers}, expected a world that reads text')
    counts = {'text': layers if text_layers is None else text_layers}
    if layers is not None:
        name = 'control' if hasattr(cfg.dit, 'control') else 'actions'
        span, whole = getattr(cfg.dit, name), cfg.dit.layers
        if span:
            span = dataclasses.replace(
                span, start=span.start * layers // whole, end=math.ceil(span.end * layers / whole)
            )
        cfg = dataclasses.replace(
            cfg, dit=dataclasses.replace(cfg.dit, layers=layers, **{name: span})
        )
        # Of a tower of images, the last layer is not used.
        counts |= {
            name: max(least, min(layers, getattr(cfg, name).layers))
            for name, least in (('control', 1), ('image', 2))
            if hasattr(cfg, name)
        }
    return dataclasses.replace(
        cfg,
        **{
            name: dataclasses.replace(getattr(cfg, name), layers=count)
            for name, count in counts.items()
            if count is not None and hasattr(cfg, name)
        },
    )


def _check_new(target: str):
    """Raises UsageError unless something can be made under this name."""
    if Path(target).name in ('', '..'):
        raise UsageError(f'DST: got {str(target)!r}, expected a new name')
    if os.path.lexists(target):
        raise UsageError(f'{target}: is there already, expected a new name')
    check_writable('DST', target)


class Drawn:
    """A torch tensor that is drawn when it is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, row: conversion.Row, shape, draw, layer):
        self._sizes = conversion.merged_sizes(row, shape)
        self._row, self._draw, self._layer = row, draw, layer
        empty = np.broadcast_to(np.float32(0), shape)  # no memory behind it
        self.shape = rearrange(empty, row.inverse(), **self._sizes).shape

    def __array__(self, dtype=None, copy=None):
        drawn = rearrange(self._draw(self._layer), self._row.inverse(), **self._sizes)
        return np.asarray(drawn, dtype)


def _from_pickle(world_cfg, source: Path, target: Path, unpickle) -> str:
    """Translates one pickle: see `convert`."""
    if target.suffix == '.safetensors':
        if not target.parent.is_dir():
            raise UsageError(f'DST: got {target}, expected a name in a folder that is there')
        unpickle(source, target)
        return f'{target}: tensors of {source}'
    world = worlds.build(world_cfg)
    part = next((part for part in world.components if part.folder == target.name), None)
    if part is None:
        raise UsageError(
            f'{target}: a single pickle becomes a .safetensors file, or a part of the '
            f'recipe ({", ".join(part.folder for part in world.components)})'
        )
    cfg = getattr(world.cfg, part.field)
    table = part.weights(cfg)
    with tempfile.TemporaryDirectory() as copy:
        unpickle(source, Path(copy) / 'model.safetensors')
        try:
            params = conversion.to_jax(
                table, diffusers_layout.Tensors(Path(copy)), part.shapes(cfg)
            )
        except conversion.ConversionError as error:
            raise conversion.ConversionError(f'{source}: {error}') from error
        diffusers_layout.write_component(
            target.parent,
            target.name,
            cfg.to_released(),
            conversion.to_torch(table, params),
            dtype=None,
        )
    return f'{target}: {part.folder} of {source}'


def _weight_files(folder: str, names: list[str]) -> list[str]:
    """What of a folder is weights, in any layout."""
    weights = ('.safetensors', '.safetensors.index.json', *PICKLES)
    return [name for name in names if name.endswith(weights) or name == PARAMS]


def _read_ours(folder: Path) -> dict:
    saver = training_state.Checkpoints(folder / PARAMS)
    try:
        found = saver.restore()
    finally:
        saver.close()
    if found is None:
        raise diffusers_layout.CheckpointError(f'{folder / PARAMS}: no parameters')
    return found[1]


def _write_ours(folder: Path, params: dict):
    saver = training_state.Checkpoints(folder / PARAMS)
    saver.save(0, params)
    saver.close()


@contextlib.contextmanager
def _plain_part(source: Path, name: str, unpickle):
    """A folder that holds one part as safetensors: the source, or a copy of its pickle."""
    part = source / name
    files = sorted(part.iterdir())
    pickles = [path for path in files if path.suffix in PICKLES]
    if not pickles or any(path.suffix == '.safetensors' for path in files):
        yield source
        return
    if len(pickles) > 1:
        raise diffusers_layout.CheckpointError(f'{part}: got {len(pickles)} pickles, expected one')
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(copy) / name
        folder.mkdir()
        shutil.copy(part / 'config.json', folder)
        unpickle(pickles[0], folder / 'model.safetensors')
        yield copy
