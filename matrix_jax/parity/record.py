"""Recordings: tensors of the PyTorch reference, and what to run on them.

A recording is a safetensors file with `weights/*` (names of the reference's state dict), `inputs/*`
and `outputs/*`. Its metadata holds what to run (`system`, `kind`), sizes and options (`config`,
JSON) and the tolerances of the outputs (`atol`, `rtol`). A file without weights may name another
file in its folder that has them (`weights`). Control signals are recorded as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from einops import rearrange

SYSTEM = 'the_matrix'  # of JSON files, which have no metadata
PREFIXES = ('weights/', 'inputs/', 'outputs/')
EXPECTED = ('grad_norm', 'guidance_per_step')  # outputs that a file keeps in its config

# Recordings are tiny: compiling takes far longer than running.
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


class BadInput(ValueError):
    """A file is not a recording that can be replayed."""


class Fields(dict):
    """Named parts of a recording; a missing name raises `BadInput`."""

    def __init__(self, where: str, content: Mapping):
        super().__init__(content)
        self.where = where

    def __missing__(self, key):
        raise BadInput(f'{self.where}: no {key!r}')


@dataclasses.dataclass(frozen=True)
class Record:
    """A recording; the parts are those of its file."""

    path: Path
    system: str
    kind: str
    config: Fields
    weights: Fields
    inputs: Fields
    outputs: Fields
    atol: float = 0.0
    rtol: float = 0.0


def read(path: str | Path) -> Record:
    """Reads a recording: safetensors, or the JSON of control signals.

    Raises:
      BadInput: not a file, damaged, or without the metadata of a recording.
    """
    path = Path(path)
    if path.suffix == '.json':
        return _read_signals(path)
    metadata, tensors = _read_tensors(path)
    if 'weights' in metadata:
        shared = _read_tensors(path.parent / metadata['weights'])[1]
        tensors |= {name: shared[name] for name in shared if name.startswith('weights/')}
    weights, inputs, outputs = (
        Fields(
            f'{path}: {prefix[:-1]}',
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            },
        )
        for prefix in PREFIXES
    )
    unexpected = [name for name in tensors if not name.startswith(PREFIXES)]
    if unexpected:
        raise BadInput(f'{path}: tensor {unexpected[0]!r}, expected names in {", ".join(PREFIXES)}')
    try:
        config = Fields(f'{path}: config', json.loads(metadata['config']))
        atol, rtol = float(metadata['atol']), float(metadata['rtol'])
    except (ValueError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f'{path}: metadata is not readable ({error})') from None
    for name in EXPECTED:
        if config.get(name) is not None:
            outputs[name] = np.asarray(config[name])
    return Record(
        path, metadata['system'], metadata['kind'], config, weights, inputs, outputs, atol, rtol
    )


def _read_tensors(path: Path) -> tuple[Fields, dict]:
    """(metadata, tensors by name) of a safetensors file."""
    _check_file(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'np') as file:
            metadata = Fields(f'{path}: metadata', file.metadata() or {})
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f'{path}: not a readable safetensors file ({error})') from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f'{path}: not a file')


def _read_signals(path: Path) -> Record:
    _check_file(path)
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except ValueError as error:
        raise BadInput(f'{path}: not readable JSON ({error})') from None
    known = ('generate_random_control_signal', 'generate_padding')
    if not isinstance(content, dict) or not set(known) & set(content):
        raise BadInput(f'{path}: expected a JSON object with {" or ".join(known)}')
    try:
        cases = {
            name: [Fields(f'{path}: {name}', case) for case in content.get(name, ())]
            for name in known
        }
    except (TypeError, ValueError):
        raise BadInput(f'{path}: expected lists of JSON objects') from None
    outputs = {'random': [case['out'] for case in cases[known[0]]]}
    for name in ('base_frames', 'base_signal', 'streaming_signal'):
        outputs[name] = [case[name] for case in cases[known[1]]]
    outputs = {name: values for name, values in outputs.items() if values}
    empty = Fields(str(path), {})
    return Record(
        path,
        SYSTEM,
        'control_signals',
        Fields(str(path), cases),
        empty,
        empty,
        Fields(f'{path}: outputs', outputs),
    )


def from_btchw(x) -> np.ndarray:
    """[... T C H W] -> [... T H W C], the layout of the reference's DiT."""
    return np.moveaxis(np.asarray(x), -3, -1)


def to_btchw(x) -> np.ndarray:
    """Inverse of `from_btchw`."""
    return np.moveaxis(np.asarray(x), -1, -3)


def from_bcthw(x) -> np.ndarray:
    """[B C T H W] -> [B T H W C], the layout of the reference's VAE."""
    return rearrange(np.asarray(x), 'b c t h w -> b t h w c')


def to_bcthw(x) -> np.ndarray:
    """Inverse of `from_bcthw`."""
    return rearrange(np.asarray(x), 'b t h w c -> b c t h w')


def frame_levels(x) -> np.ndarray:
    """Noise levels [B], [B T] or [B T 1 1 1] -> int32 [B T], T = 1 for one level for all frames."""
    return np.asarray(x, np.int32).reshape(len(x), -1)
