"""Low-rank adapters (LoRA, arXiv 2106.09685), merged into the weights before use.

    W' = W + alpha / r * B A          A [r in], B [out r]; equation 3 of the paper

An adapter is a parameter tree with three leaves for each adapted kernel: `a` [in r], `b` [r out]
and `alpha`, stacked over layers like the kernel. Networks run, train and export with
`merge(params, adapter)`.

Files are those of diffusers, `pytorch_lora_weights.safetensors`, with peft's names such as
`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`. The weight table of the network maps
the names to kernels.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from matrix_jax.nn import initializers
from matrix_jax.weights import conversion, diffusers_layout

FILE = 'pytorch_lora_weights.safetensors'
PEFT = ('adapter_model.safetensors', 'adapter_config.json')  # files of a folder of peft
METADATA = 'lora_adapter_metadata'  # header key of diffusers: the settings as JSON
PREFIXES = ('base_model.model.', 'diffusion_model.')
# Targets as published: attention of the transformer blocks, not of the control blocks.
TARGETS = tuple(
    f'transformer_blocks.*.attn1.{name}' for name in ('to_q', 'to_k', 'to_v', 'to_out.0')
)
KEY = re.compile(r'(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.\w+)?\.weight|(?P<alpha>alpha))')


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer: the path of its parameters, its table row and its index in the stack."""

    path: str
    row: conversion.Row
    index: int


def modules(table: conversion.Table) -> dict[str, Module]:
    """Torch module name -> `Module` of all layers of a weight table that can be adapted."""
    found = {}
    for row in table:
        linear = isinstance(row, conversion.Row) and re.fullmatch(
            r'(\w+) (\w+) -> \2 \1', row.layout
        )
        if linear and row.path.endswith('/kernel'):
            for index, key in enumerate(row.keys()):
                found[key.removesuffix('.weight')] = Module(
                    row.path.removesuffix('/kernel'), row, index
                )
    return found


def init(
    table: conversion.Table,
    shapes: Mapping,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = TARGETS,
) -> dict:
    """Initial adapter, float32 numpy: `a` random as in peft, `b` zero, so it changes nothing.

    Args:
      table: weight table of the network.
      shapes: its parameter tree, of arrays or ShapeDtypeStructs.
      rank: rank r.
      alpha: numerator of the scale alpha / r.
      seed: seed of the random numbers.
      targets: patterns of torch module names.

    Raises:
      ValueError: no module fits the targets, or the rank exceeds one of them.
    """
    flat, leaves = conversion.flatten(shapes), {}
    for name, module in modules(table).items():
        if module.path in leaves or not any(fnmatch.fnmatchcase(name, one) for one in targets):
            continue
        *stack, inner, outer = flat[f'{module.path}/kernel'].shape
        if rank > min(inner, outer):
            raise ValueError(
                f'rank: got {rank}, expected at most {min(inner, outer)}, the width of {name}'
            )
        rule = initializers.uniform(1 / 3)
        draws = [
            initializers.draw((('*', rule),), f'{module.path}/a', (inner, rank), (seed,), index)
            for index in range(math.prod(stack))
        ]
        leaves[module.path] = {
            'a': np.reshape(draws, (*stack, inner, rank)),
            'b': np.zeros((*stack, rank, outer), np.float32),
            'alpha': np.full(stack, alpha, np.float32),
        }
    if not leaves:
        raise ValueError(f'targets: got {", ".join(targets)}, which fit no linear layer')
    return conversion.unflatten(leaves)


def merge(params: Mapping, adapter: Mapping, scale: float = 1.0) -> dict:
    """Adds scale * alpha / r * B A to each adapted kernel, in at least float32."""
    flat = conversion.flatten(params)
    for path, parts in _leaves(adapter).items():
        factor = jnp.asarray(scale * parts['alpha'] / parts['a'].shape[-1])[..., None, None]
        update = jnp.einsum('...ir,...ro->...io', parts['a'], parts['b'], precision='highest')
        flat[f'{path}/kernel'] = flat[f'{path}/kernel'] + factor * update
    return conversion.unflatten(flat)


def axes(kernels: Mapping) -> dict:
    """Axis letters of an adapter of all kernels, from those of the network (`conversion.axes`)."""
    found = {}
    for path, letters in conversion.flatten(kernels).items():
        if path.endswith('/kernel'):
            *stack, inner, outer = letters
            found[path.removesuffix('/kernel')] = {
                'a': (*stack, inner, '_'),
                'b': (*stack, '_', outer),
                'alpha': tuple(stack),
            }
    return conversion.unflatten(found)


def _leaves(adapter: Mapping) -> dict[str, dict]:
    """Path of each adapted layer -> its leaves."""
    found: dict[str, dict] = {}
    for path, leaf in conversion.flatten(adapter).items():
        module, _, name = path.rpartition('/')
        found.setdefault(module, {})[name] = leaf
    return found


# --- files -----------------------------------------------------------------------------------


def read(
    path: str | os.PathLike,
    table: conversion.Table,
    shapes: Mapping,
    component: str = 'transformer',
) -> dict:
    """Reads an adapter from a file of diffusers or peft, or from its folder, as numpy arrays.

    Layers that are not in the file get zeros; ranks may differ between layers. Alpha comes from an
    `.alpha` tensor, the settings in the file's header (diffusers) or the settings file (peft);
    without any the scale is 1, as in diffusers.

    Args:
      path: file or folder.
      table: weight table of the network.
      shapes: its parameter tree, of arrays or ShapeDtypeStructs.
      component: network of a pipeline, the prefix of the names in the file.

    Raises:
      CheckpointError: no such file, or not a whole safetensors file.
      ConversionError: names or shapes do not fit the network; all faults at once.
    """
    path = _file(Path(path).expanduser())
    metadata, tensors = diffusers_layout.read_file(path)
    try:
        settings = _settings(path, metadata, component)
        return _to_jax(tensors, settings, table, conversion.flatten(shapes), component)
    except conversion.ConversionError as error:
        raise conversion.ConversionError(f'{path}: {error}') from error


def write(
    path: str | os.PathLike,
    adapter: Mapping,
    table: conversion.Table,
    component: str = 'transformer',
) -> Path:
    """Writes an adapter in the format of diffusers, with its settings in the header.

    Layers with alpha 0 are left out. The file is written completely and then renamed.

    Returns:
      The path.

    Raises:
      ValueError: every alpha is zero.
    """
    from safetensors.numpy import save_file

    tensors, ranks, alphas = {}, {}, {}
    names = {(module.path, module.index): name for name, module in modules(table).items()}
    for layer, parts in _leaves(adapter).items():
        a, b, alpha = (np.asarray(parts[name]) for name in ('a', 'b', 'alpha'))
        for index in range(len(a) if a.ndim == 3 else 1):
            name, at = names[layer, index], index if a.ndim == 3 else ()
            if alpha[at]:
                alphas[name], ranks[name] = float(alpha[at]), a.shape[-1]
                key = f'{component}.{name}.lora_'
                tensors[f'{key}A.weight'] = np.ascontiguousarray(a[at].T)
                tensors[f'{key}B.weight'] = np.ascontiguousarray(b[at].T)
    if not tensors:
        raise ValueError('adapter: every alpha is zero, so there is nothing to write')
    (rank, rank_pattern), (alpha, alpha_pattern) = map(_pattern, (ranks, alphas))
    settings = {
        'peft_type': 'LORA',
        'r': rank,
        'lora_alpha': alpha,
        'target_modules': sorted(ranks),
        'rank_pattern': rank_pattern,
        'alpha_pattern': alpha_pattern,
    }
    header = {
        'format': 'pt',
        METADATA: json.dumps(
            {f'{component}.{key}': value for key, value in settings.items()},
            indent=2,
            sort_keys=True,
        ),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    save_file(tensors, part, metadata=header)
    return part.replace(path)


def _pattern(values: Mapping[str, float]):
    """(most common value, {pattern: value} of the modules that differ), as in peft's settings."""
    common = max(values.values(), key=list(values.values()).count)
    return common, {f'^{name}': value for name, value in values.items() if value != common}


def _file(path: Path) -> Path:
    """The adapter file of a path, which may be its folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in (FILE, PEFT[0]) if (path / name).is_file()]
    if not found:
        raise diffusers_layout.CheckpointError(f'{path}: no adapter; expected {FILE} or {PEFT[0]}')
    return found[0]


def _settings(path: Path, metadata: Mapping[str, str], component: str) -> dict:
    """Settings of a file, with peft's names; empty if there are none."""
    try:
        if METADATA in metadata:
            stored = json.loads(metadata[METADATA])  # of a pipeline or of one network
            found = {key.removeprefix(f'{component}.'): value for key, value in stored.items()}
        elif path.name == PEFT[0] and path.with_name(PEFT[1]).is_file():
            found = json.loads(path.with_name(PEFT[1]).read_text(encoding='utf-8'))
        else:
            return {}
        alphas = [found.get('lora_alpha', 1), *(found.get('alpha_pattern') or {}).values()]
    except (ValueError, AttributeError, OSError) as error:
        raise conversion.ConversionError(
            f'the settings of the adapter are not readable ({error})'
        ) from error
    if not all(isinstance(alpha, (int, float)) and math.isfinite(alpha) for alpha in alphas):
        raise conversion.ConversionError(f'lora_alpha: got {alphas}, expected numbers')
    if found.get('use_dora'):
        raise conversion.ConversionError(
            'use_dora: this adapter rescales its weights (DoRA), which is not implemented'
        )
    return found


def _alpha(name: str, rank: int, settings: Mapping) -> float:
    """Alpha of a module that has no alpha tensor."""
    alpha = settings.get('lora_alpha', rank)
    for pattern, value in (settings.get('alpha_pattern') or {}).items():
        pattern = pattern.strip('^$').replace('\\', '')
        if name == pattern or name.endswith(f'.{pattern}'):
            alpha = value
    return alpha * math.sqrt(rank) if settings.get('use_rslora') else alpha


def _to_jax(tensors, settings, table, flat, component) -> dict:
    known, faults = modules(table), []
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        name = key
        for prefix in (*PREFIXES, f'{component}.'):
            name = name.removeprefix(prefix)
        match = KEY.fullmatch(name)
        if match is None or match['module'] not in known:
            near = difflib.get_close_matches(match['module'] if match else name, known, 1, 0.6)
            faults.append(f'unknown key {key}' + (f' (nearest: {near[0]})' if near else ''))
            continue
        part, side = parts.setdefault(match['module'], {}), match['alpha'] or match['side']
        if side in part:
            faults.append(f'{key}: is there under another prefix as well')
        part[side] = tensor
    leaves: dict[str, dict] = {}
    for name, part in parts.items():
        module = known[name]
        inner, outer = flat[f'{module.path}/kernel'].shape[-2:]
        lost = [f'missing key {name}.lora_{side}.weight' for side in 'AB' if side not in part]
        if lost:
            faults += lost
            continue
        rank = len(part['A']) if part['A'].ndim else 0
        shapes = tuple(part['A'].shape), tuple(part['B'].shape)
        if shapes != ((rank, inner), (outer, rank)) or not rank:
            faults.append(
                f'{name}: got A {shapes[0]} and B {shapes[1]}, expected (r, {inner}) and '
                f'({outer}, r)'
            )
            continue
        if 'alpha' in part and part['alpha'].size != 1:
            faults.append(f'{name}.alpha: got shape {part["alpha"].shape}, expected one number')
            continue
        alpha = part['alpha'].item() if 'alpha' in part else _alpha(name, rank, settings)
        leaves.setdefault(module.path, {})[module.index] = (part['A'].T, part['B'].T, alpha)
    if not (tensors or faults):
        faults = ['no tensors']
    if faults:
        more = (
            f'; and {len(faults) - conversion.SHOWN} more' if len(faults) > conversion.SHOWN else ''
        )
        raise conversion.ConversionError(
            f'{len(faults)} adapter fault(s): ' + '; '.join(faults[: conversion.SHOWN]) + more
        )
    return conversion.unflatten(
        {path: _stacked(layers, flat[f'{path}/kernel'].shape) for path, layers in leaves.items()}
    )


def _stacked(layers: Mapping[int, tuple], shape: Sequence[int]) -> dict:
    """Leaves of a stack; smaller ranks are padded with zeros, and alpha is scaled to match."""
    *stack, inner, outer = shape
    rank = max(a.shape[1] for a, _, _ in layers.values())
    made = {
        'a': np.zeros((*stack, inner, rank), np.float32),
        'b': np.zeros((*stack, rank, outer), np.float32),
        'alpha': np.zeros(stack, np.float32),
    }
    for index, (a, b, alpha) in layers.items():
        at = index if stack else ()
        made['a'][at][:, : a.shape[1]] = a
        made['b'][at][: a.shape[1]] = b
        made['alpha'][at] = alpha * rank / a.shape[1]
    return made
