"""Weights on disk in the diffusers layout, for released and bundled worlds.

A folder has one subfolder per component, with `config.json` and safetensors. Pickles are refused,
whatever their file name, because they can contain code.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax.weights import links
from matrix_jax.weights.tensor_files import (
    CheckpointError,
    ScaledTensors,
    TensorFile,
    check_file,
    read_file,
)

__all__ = [
    'ASSETS',
    'REFERENCE',
    'CheckpointError',
    'SaveError',
    'Tensors',
    'bundled_names',
    'parse_json',
    'read_component',
    'read_config',
    'read_file',
    'read_json',
    'replace_folder',
    'resolve',
    'share',
    'some',
    'write_component',
    'write_json',
]
ASSETS = Path(__file__).parents[1] / 'assets'
STEMS = ('diffusion_pytorch_model', 'model')  # file names of diffusers and transformers
SHARD_SIZE = 5 * 10**9
JSON_SIZE, JSON_DEPTH = 64 * 2**20, 20  # bytes of a config file, and levels within
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk or quota is full
# In place of a component's files: {"bundled": name of the bundled world whose component it is}.
REFERENCE = 'shared.json'
HUB_FILES = ('*.json', '*.safetensors', '*.model', '*.txt')


class SaveError(CheckpointError):
    """Something could not be written; what was there before is unchanged."""


# --- finding a folder ------------------------------------------------------------------------


def bundled_names() -> list[str]:
    """Returns the names of the bundled worlds."""
    return sorted(one.name for one in ASSETS.glob('[!_.]*') if one.is_dir())


def resolve(weights: str) -> Path:
    """Returns the local folder of weights, downloaded if necessary.

    Args:
      weights: name of a bundled world, a folder, or a hub repository: 'owner/name' or
        'owner/name/sub/folder', either with '@revision'. A bundled name wins over a folder of the
        same name; './name' means the folder.

    Raises:
      CheckpointError: there is no such folder or repository.
    """
    text = str(weights)
    if re.fullmatch(r'\w+', text) and (ASSETS / text).is_dir():
        return ASSETS / text
    path = Path(text).expanduser()
    if path.is_dir():
        _check_no_run(path)
        links.note(path)
        return path
    if path.exists():
        raise CheckpointError(
            f'weights: {text} is a file, expected a folder in the released '
            'layout (matrix-jax convert makes one)'
        )
    match = re.fullmatch(r'([\w-][\w.-]*/[\w-][\w.-]*)(/[\w./-]+)?(@[\w./-]+)?', text)
    if not match or '..' in text:
        bundled = ', '.join(bundled_names())
        raise CheckpointError(
            f'weights: no folder {text}; expected a folder, a hub repository '
            f'owner/name, or a bundled name ({bundled or "none here"})'
        )
    return _download(match[1], (match[2] or '').strip('/'), (match[3] or '@')[1:] or None)


def _check_no_run(folder: Path) -> None:
    """Refuses the folder of a training run, whose weights are in a subfolder."""
    if not (folder / 'state').is_dir() or any(folder.glob('*/config.json')):
        return
    weights = folder / 'weights'
    raise CheckpointError(
        f'weights: {folder} is the folder of a training run; '
        + (
            f'its weights are in {weights}'
            if weights.is_dir()
            else 'it has none yet: repeat the training command to finish it'
        )
    )


def _download(repo: str, folder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f'{folder}/{name}' if folder else name for name in HUB_FILES]
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f'weights: {repo} is neither a local folder nor a hub repository that can be reached '
            f'({type(error).__name__}: {reason[0] if reason else "no reason given"})'
        ) from error
    if not (root / folder).is_dir():
        raise CheckpointError(f'weights: the hub repository {repo} has no folder {folder}')
    return root / folder


# --- reading --------------------------------------------------------------------------------


def read_component(folder: str | Path, name: str) -> tuple[dict[str, Any], Tensors]:
    """Returns (config, tensors) of one component, such as 'transformer'; tensors are lazy."""
    return read_config(folder, name), Tensors(_component(folder, name))


def read_config(folder: str | Path, name: str) -> dict[str, Any]:
    """Returns config.json of one component."""
    return read_json(folder, name, 'config.json')


def read_json(folder: str | Path, name: str, file: str) -> dict[str, Any]:
    """Returns the JSON object in `folder/name/file`."""
    return _read_object(_component(folder, name) / file)


def _read_object(path: Path) -> dict[str, Any]:
    check_file(path)
    try:
        if path.stat().st_size > JSON_SIZE:
            raise ValueError(f'it has more than {JSON_SIZE >> 20} MiB')
        found = parse_json(path.read_text(encoding='utf-8-sig'))
    except (ValueError, OSError) as error:
        raise CheckpointError(f'{path}: not readable as JSON ({error})') from error
    if not isinstance(found, dict):
        raise CheckpointError(f'{path}: got a JSON {type(found).__name__}, expected an object')
    return found


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
      ValueError: it is no JSON, or nested more than a config ever is.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    level = [found]
    for _ in range(JSON_DEPTH):
        level = [
            value
            for one in level
            if isinstance(one, (dict, list))
            for value in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise ValueError(f'it is nested more than {JSON_DEPTH} times')
    return found


def _component(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f'{folder}: no such folder')
    if not (folder / name).is_dir():
        there = ', '.join(sorted(path.name for path in folder.glob('*/'))) or 'no folder'
        raise CheckpointError(f'{folder}: no component {name}; it has {there}')
    reference = folder / name / REFERENCE
    if not reference.is_file():
        return folder / name
    bundled = _read_object(reference).get('bundled')
    if bundled not in bundled_names() or not (ASSETS / bundled / name).is_dir():
        raise CheckpointError(
            f'{reference}: bundled: got {bundled!r}, expected a bundled world with {name}, one of '
            f'{", ".join(bundled_names())}'
        )
    return ASSETS / bundled / name


def share(folder: str | Path, bundled: str) -> list[str]:
    """Replaces components that a bundled world has as well by references to it.

    Args:
      folder: weights folder to be bundled.
      bundled: name of a bundled world.

    Returns:
      names of the components that were replaced.
    """
    shared = []
    for theirs in sorted((ASSETS / bundled).glob('*/*.safetensors')):
        ours = Path(folder) / theirs.parent.name
        files = {one.name for one in theirs.parent.iterdir()}
        if not ours.is_dir() or files != {one.name for one in ours.iterdir()}:
            continue
        if all(filecmp.cmp(theirs.parent / one, ours / one, shallow=False) for one in files):
            shutil.rmtree(ours)
            write_json(ours, REFERENCE, {'bundled': bundled})
            shared.append(ours.name)
    return shared


class Tensors(ScaledTensors):
    """The tensors of one component folder by name, read from its safetensors on access."""

    def __init__(self, folder: Path):
        files: dict[str, TensorFile] = {}
        shards, listed = _shards(folder)
        for shard in shards:
            for name in (file := TensorFile(shard)):
                if name in files:
                    raise CheckpointError(f'{shard}: tensor {name} is in another shard as well')
                files[name] = file
        if listed is not None and listed != set(files):
            lost, extra = sorted(listed - set(files)), sorted(set(files) - listed)
            raise CheckpointError(
                f'{folder}: shards and index differ: '
                f'missing {some(lost)}; not in the index {some(extra)}'
            )
        super().__init__(files)


def _shards(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The safetensors files of a component, and the tensor names that an index lists."""
    single = [folder / f'{stem}.safetensors' for stem in STEMS]
    indices = [folder / f'{stem}.safetensors.index.json' for stem in STEMS]
    found = [path for path in single + indices if path.exists() or path.is_symlink()]
    if not found:  # files of one `variant` of diffusers, such as fp16
        single = [path for stem in STEMS for path in sorted(folder.glob(f'{stem}.*.safetensors'))]
        indices = [
            path
            for stem in STEMS
            for path in sorted(folder.glob(f'{stem}.safetensors.index.*.json'))
        ]
        single = [path for path in single if '-of-' not in path.name]
        found = single + indices
    if len(found) > 1:
        raise CheckpointError(
            f'{folder}: got {" and ".join(path.name for path in found)}, expected one of them'
        )
    if not found:
        pickles = [
            path.name
            for path in folder.iterdir()
            if path.suffix in ('.bin', '.pth', '.pt', '.ckpt')
        ]
        raise CheckpointError(
            f'{folder}: {some(pickles)} is a pickle, which is refused; '
            'matrix-jax convert makes safetensors of it'
            if pickles
            else f'{folder}: no weights; expected {STEMS[0]}.safetensors, {STEMS[1]}.safetensors '
            'or an index.json'
        )
    if found[0] in single:
        return found, None
    weight_map = read_json(folder, '', found[0].name).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{found[0]}: no weight_map')
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith('.safetensors'):
            raise CheckpointError(f'{found[0]}: shard {name!r} is not a plain .safetensors name')
        if not (folder / name).is_file():
            raise CheckpointError(f'{found[0]}: names the shard {name}, which is missing')
    return [folder / name for name in names], set(weight_map)


def some(names: list[str], shown: int = 5) -> str:
    """Returns the first names of a list, for a message."""
    more = f' and {len(names) - shown} more' if len(names) > shown else ''
    return ', '.join(names[:shown]) + more if names else 'none'


# --- writing --------------------------------------------------------------------------------


def write_component(
    folder: str | Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    dtype: str | None = 'bfloat16',
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Writes one component, complete or not at all, and returns its folder.

    Args:
      folder: weights folder.
      name: subfolder of the component.
      config: contents of config.json.
      tensors: name -> array; converted when they are written.
      dtype: for floating-point tensors; None keeps their own.
      shard_size: bytes per file.

    Raises:
      SaveError: the disk is full.
    """
    import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    def stored(value: Any) -> np.dtype:
        kind = np.dtype(value.dtype)
        floating = kind.kind == 'f' or kind.name.startswith(('bf', 'fl'))
        return np.dtype(dtype) if dtype and floating else kind

    shards: list[list[str]] = [[]]
    used = 0
    for key in sorted(tensors):
        size = int(np.prod(tensors[key].shape)) * stored(tensors[key]).itemsize
        if shards[-1] and used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    # Only configs of transformers name architectures; its files have another stem.
    stem = STEMS[1] if 'architectures' in config else STEMS[0]
    files = (
        [f'{stem}.safetensors']
        if len(shards) == 1
        else [f'{stem}-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    )

    def fill(target: Path) -> None:
        write_json(target, 'config.json', config)
        total = 0
        for file, keys in zip(files, shards):
            arrays = {
                key: np.ascontiguousarray(np.asarray(tensors[key]), stored(tensors[key])).reshape(
                    tensors[key].shape
                )
                for key in keys
            }
            total += sum(array.nbytes for array in arrays.values())
            try:
                save_file(arrays, target / file, metadata={'format': 'pt'})
            except SafetensorError as error:
                raise SaveError(f'{folder}/{name}: could not be written ({error})') from error
        if len(files) > 1:
            weight_map = {key: file for file, keys in zip(files, shards) for key in keys}
            write_json(
                target,
                f'{stem}.safetensors.index.json',
                {'metadata': {'total_size': total}, 'weight_map': weight_map},
            )

    return replace_folder(Path(folder) / name, fill)


def write_json(folder: str | Path, file: str, value: Mapping[str, Any]) -> Path:
    """Writes `folder/file`, complete or not at all, and returns its path; creates the folder."""
    path = Path(folder) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    part.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
    return part.replace(path)


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Creates `folder` by `fill(temporary folder)`, and returns it; if that fails, an older folder
    stays."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        new, old = part / 'new', part / 'old'
        new.mkdir()
        fill(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise SaveError(f'{folder}: could not be written ({error.strerror})') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
