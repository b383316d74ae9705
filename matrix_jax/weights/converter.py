"""Whole folders of weights: diffusers layout <-> orbax trees, and random weights.

An orbax folder is the diffusers folder with the safetensors of every component replaced by
`params/`, an orbax tree with our names and axes. All other files (configs, tokenizers, scheduler)
are copied, so a round trip gives the same folder. Components are converted one by one; the largest
has to fit into memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from matrix_jax import worlds
from matrix_jax.config import UsageError, check_writable
from matrix_jax.weights import conversion, diffusers_layout, tensor_files, training_state
from matrix_jax.worlds.networks import Component

PARAMS = 'params'
PICKLES = ('.bin', '.pth', '.pt', '.ckpt')
WEIGHT_SUFFIXES = ('.safetensors', '.safetensors.index.json', '.bin.index.json', *PICKLES)
RANDOM_SHARD = 10**9  # bytes of random weights in memory at a time

SHARD = re.compile(r'(.+)-\d+-of-(\d+)')

# Writes the tensors of a pickle as safetensors; (pickle, safetensors).
Unpickle = Callable[[Path, Path], None]


def convert(
    world_cfg: Any, source: str, target: str, unpickle: Unpickle, allow_non_finite: bool = False
) -> str:
    """Converts a folder to the other layout and returns a line about it; all of it or nothing.

    Args:
      world_cfg: config of a world with the same components; the folder decides all sizes.
      source: folder in either layout, or one pickle of tensors.
      target: must not exist. For a single pickle it is a `.safetensors` file, or the folder of a
        component, such as 'DIR/vae', whose tensors are then checked.
      unpickle: reads pickles.
      allow_non_finite: whether values may be infinite or not a number.

    Raises:
      CheckpointError, ConversionError: the source cannot be used.
      UsageError: the source has neither layout, or the target exists.
    """
    _check_new(target)
    if Path(source).suffix in PICKLES and Path(source).is_file():
        return _convert_pickle(world_cfg, Path(source), Path(target), unpickle, allow_non_finite)
    folder = diffusers_layout.resolve(source)
    components = worlds.build(world_cfg).components
    orbax = [one for one in components if (folder / one.folder / PARAMS).is_dir()]
    diffusers = [
        one
        for one in components
        if one not in orbax and (folder / one.folder / 'config.json').is_file()
    ]
    if bool(orbax) == bool(diffusers):
        raise UsageError(
            f'{folder}: got {len(diffusers)} parts in the diffusers layout and '
            f'{len(orbax)} as orbax trees, expected parts in one of them ({_names(components)})'
        )

    def fill(new: Path) -> None:
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=_weight_files)
        world = worlds.describe(world_cfg, folder)
        for one in orbax:
            table = one.weights(getattr(world.cfg, one.field))
            config = diffusers_layout.read_config(folder, one.folder)
            tensors = conversion.to_torch(table, _read_orbax(folder / one.folder))
            wrong = [key for key, value in tensors.items() if not conversion.is_finite(value)]
            if wrong and not allow_non_finite:
                raise conversion.ConversionError(
                    f'{folder / one.folder}: {wrong[0]} has values that are not finite'
                    f'{conversion.ALLOWED_BY}'
                )
            diffusers_layout.write_component(new, one.folder, config, tensors, dtype=None)
        for one in diffusers:
            with _without_pickle(folder, one.folder, unpickle) as plain:
                params = world.load(plain, (one.folder,), allow_non_finite)[one.folder]
                _write_orbax(new / one.folder, params)

    diffusers_layout.replace_folder(Path(target), fill)
    layout = 'in the diffusers layout' if orbax else 'as orbax trees'
    return f'{target}: {_names(orbax or diffusers)} {layout}'


def write_random(
    world_cfg: Any,
    folder: str,
    seed: int,
    layers: int | None = None,
    text_layers: int | None = None,
) -> str:
    """Writes random weights in the diffusers layout, with byte tokenizers; returns a line about it.

    Tensors are drawn as they are written, so the folder may be larger than memory.

    Args:
      world_cfg: config of the world.
      folder: must not exist.
      seed: the same seed gives the same folder.
      layers: layers of the DiT and the encoders; None means as many as the config.
      text_layers: layers of the text encoder; None means `layers`.

    Raises:
      UsageError: the folder exists, or a number of layers does not fit the world.
    """
    _check_new(folder)
    world = worlds.build(shorten(world_cfg, layers, text_layers))

    def fill(new: Path) -> None:
        for one in world.components:
            tensors = {
                key: RandomTensor(row, shape, draw, layer)
                for row, shape, draw in world.draws(one, seed, zero_init=False)
                for key, layer in zip(row.keys(), range(*row.layers) if row.layers else (None,))
            }
            config = getattr(world.cfg, one.field).to_released()
            diffusers_layout.write_component(
                new, one.folder, config, tensors, shard_size=RANDOM_SHARD
            )
        world.save(new, {})

    diffusers_layout.replace_folder(Path(folder), fill)
    size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
    return f'{folder}: random weights, {size / 2**20:,.1f} MiB'


def shorten(cfg: Any, layers: int | None, text_layers: int | None = None) -> Any:
    """Returns the world's config with fewer layers (`World.shortened`).

    Raises:
      UsageError: a number is below 1, or the world has no such layers.
    """
    for name, count in (('--layers', layers), ('--text-layers', text_layers)):
        if count is not None and count < 1:
            raise UsageError(f'{name}: got {count}, expected at least 1')
    return worlds.build(cfg).shortened(layers, text_layers).cfg


class RandomTensor:
    """A torch tensor whose values are drawn when it is converted to numpy."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, row: conversion.Row, shape: Sequence[int], draw: Callable, layer: int | None
    ):
        self._sizes = conversion.merged_sizes(row, shape)
        self._row, self._draw, self._layer = row, draw, layer
        empty = np.broadcast_to(np.float32(0), shape)  # takes no memory
        self.shape = rearrange(empty, row.inverse(), **self._sizes).shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        drawn = rearrange(self._draw(self._layer), self._row.inverse(), **self._sizes)
        return np.asarray(drawn, dtype)


def _names(components: Sequence[Component]) -> str:
    return ', '.join(one.folder for one in components)


def _check_new(target: str) -> None:
    """Raises UsageError unless `target` can be created."""
    if Path(target).name in ('', '..'):
        raise UsageError(f'DST: got {str(target)!r}, expected a new name')
    if os.path.lexists(target):
        raise UsageError(f'{target}: is there already, expected a new name')
    check_writable('DST', target)


def _convert_pickle(
    world_cfg: Any, source: Path, target: Path, unpickle: Unpickle, allow_non_finite: bool
) -> str:
    """Converts one pickle; see `convert`."""
    if target.suffix == '.safetensors':
        if not target.parent.is_dir():
            raise UsageError(f'DST: got {target}, expected a name in an existing folder')
        unpickle(source, target)
        return f'{target}: tensors of {source}'
    world = worlds.build(world_cfg)
    one = next((one for one in world.components if one.folder == target.name), None)
    if one is None:
        raise UsageError(
            f'{target}: a single pickle becomes a .safetensors file, or a part of the '
            f'recipe ({_names(world.components)})'
        )
    cfg = getattr(world.cfg, one.field)
    table = one.weights(cfg)
    with tempfile.TemporaryDirectory() as copy:
        unpickle(source, Path(copy) / 'model.safetensors')
        tensors = diffusers_layout.Tensors(Path(copy))
        try:
            params = conversion.to_jax(table, tensors, one.shapes(cfg), allow_non_finite)
            checked = conversion.to_torch(table, params)
        except conversion.ConversionError as error:
            raise conversion.ConversionError(f'{source}: {error}') from error
        diffusers_layout.write_component(
            target.parent, target.name, cfg.to_released(), checked, dtype=None
        )
    return f'{target}: {one.folder} of {source}'


def _unpickle_shards(pickles: Sequence[Path], folder: Path, unpickle: Unpickle) -> None:
    """Writes the shards of a component, NAME-00001-of-00002.bin, as safetensors with an index."""
    if len(pickles) == 1:
        unpickle(pickles[0], folder / 'model.safetensors')
        return
    matches = [SHARD.fullmatch(path.stem) for path in pickles]
    wholes = {match and (match[1], int(match[2])) for match in matches}
    if len(wholes) > 1 or [whole and whole[1] for whole in wholes] != [len(pickles)]:
        raise diffusers_layout.CheckpointError(
            f'{pickles[0].parent}: got {diffusers_layout.some([one.name for one in pickles])}, '
            'expected one pickle or all shards of one'
        )
    weight_map: dict[str, str] = {}
    for path in pickles:
        unpickle(path, folder / f'{path.stem}.safetensors')
        file = tensor_files.TensorFile(folder / f'{path.stem}.safetensors')
        weight_map |= dict.fromkeys(file, f'{path.stem}.safetensors')
    index = 'model.safetensors.index.json'
    diffusers_layout.write_json(folder, index, {'weight_map': weight_map})


def _weight_files(folder: str, names: list[str]) -> list[str]:
    """The names of a folder that are weights, in any layout."""
    return [name for name in names if name.endswith(WEIGHT_SUFFIXES) or name == PARAMS]


def _read_orbax(folder: Path) -> dict[str, Any]:
    saver = training_state.Checkpoints(folder / PARAMS)
    try:
        found = saver.restore()
    finally:
        saver.close()
    if found is None:
        raise diffusers_layout.CheckpointError(f'{folder / PARAMS}: no parameters')
    return found[1]


def _write_orbax(folder: Path, params: Any) -> None:
    saver = training_state.Checkpoints(folder / PARAMS)
    saver.save(0, params)
    saver.close()


@contextlib.contextmanager
def _without_pickle(source: Path, name: str, unpickle: Unpickle) -> Iterator[Path]:
    """A folder with one component as safetensors: `source`, or a copy if it has a pickle."""
    component = source / name
    files = sorted(component.iterdir())
    pickles = [path for path in files if path.suffix in PICKLES]
    if not pickles or any(path.suffix == '.safetensors' for path in files):
        yield source
        return
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(copy) / name
        folder.mkdir()
        shutil.copy(component / 'config.json', folder)
        _unpickle_shards(pickles, folder, unpickle)
        yield Path(copy)
