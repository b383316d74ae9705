"""Files of low-rank adapters: those of diffusers, peft, kohya, ComfyUI and older diffusers.

Names are those of `lora_names`. Files are written as diffusers writes them.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax.nn import lora_names
from matrix_jax.nn.lora_names import Module, with_convolutions
from matrix_jax.weights import conversion, diffusers_layout

FILE = 'pytorch_lora_weights.safetensors'
PEFT = ('adapter_model.safetensors', 'adapter_config.json')  # files of a folder of peft
METADATA = 'lora_adapter_metadata'  # header key of diffusers: the settings as JSON
OTHER_KINDS = {  # parts of names -> adapters that are no sum of a weight and B A
    'lora_magnitude_vector': 'DoRA',
    'dora_scale': 'DoRA',
    'hada_': 'LoHa',
    'lokr_': 'LoKr',
    'lora_mid': 'LoCon with a core',
}
# Settings of peft that do not change the update, besides those that are read.
WITHOUT_EFFECT = (
    *('auto_mapping', 'base_model_name_or_path', 'bias', 'corda_config', 'ensure_weight_tying'),
    *('eva_config', 'exclude_modules', 'inference_mode', 'init_lora_weights', 'layers_pattern'),
    *('layers_to_transform', 'loftq_config', 'lora_dropout', 'lora_ga_config', 'megatron_core'),
    *('modules_to_save', 'peft_version', 'qalora_group_size', 'r', 'rank_pattern', 'revision'),
    *('runtime_config', 'target_modules', 'task_type'),
)
READ = ('lora_alpha', 'alpha_pattern', 'use_rslora')
# Initial values of an adapter that leave the base weights as they are.
INIT = (True, False, None, 'gaussian', 'eva', 'orthogonal')


def layers(adapter: Mapping) -> dict[str, dict]:
    """Returns path of each adapted layer -> its leaves `a`, `b` and `alpha`."""
    found: dict[str, dict] = {}
    for path, leaf in conversion.flatten(adapter).items():
        module, _, name = path.rpartition('/')
        found.setdefault(module, {})[name] = leaf
    return found


# --- reading ---------------------------------------------------------------------------------


def read(
    path: str | os.PathLike,
    table: conversion.Table,
    shapes: Mapping,
    component: str = 'transformer',
) -> dict:
    """Reads an adapter from a file, or from its folder, as numpy arrays.

    Layers that are not in the file get zeros; ranks may differ between layers. Alpha comes from an
    `.alpha` tensor, the settings in the file's header (diffusers) or the settings file (peft);
    without any the scale is 1, as in diffusers. As in peft, patterns of alpha are regular
    expressions of the end of a name, and the first that fits counts.

    Args:
      path: file or folder.
      table: weight table of the network.
      shapes: its parameter tree, of arrays or ShapeDtypeStructs.
      component: network of a pipeline, the prefix of the names in the file.

    Raises:
      CheckpointError: no such file, or not a whole safetensors file.
      ConversionError: names, shapes or settings do not fit the network; all faults at once.
    """
    path = _file(Path(path).expanduser())
    metadata, tensors = diffusers_layout.read_file(path)
    try:
        settings = _settings(path, metadata, component)
        parts = _named(tensors, table, component)
        return _to_jax(parts, settings, with_convolutions(table), conversion.flatten(shapes))
    except conversion.ConversionError as error:
        raise conversion.ConversionError(f'{path}: {error}') from error


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
            stored = diffusers_layout.parse_json(metadata[METADATA])
            found = {
                key.removeprefix(f'{component}.'): value
                for key, value in stored.items()  # of a pipeline or of one network
                if '.' not in key or key.startswith(f'{component}.')
            }
        elif path.name == PEFT[0] and path.with_name(PEFT[1]).is_file():
            text = path.with_name(PEFT[1]).read_text(encoding='utf-8-sig')
            found = diffusers_layout.parse_json(text)
        else:
            return {}
        patterns = found.get('alpha_pattern') or {}
        alphas = [found.get('lora_alpha', 1), *patterns.values()]
        for pattern in patterns:
            re.compile(pattern)
    except (ValueError, AttributeError, TypeError, OSError, re.error) as error:
        raise conversion.ConversionError(
            f'the settings of the adapter are not readable ({error})'
        ) from error
    if not all(isinstance(alpha, (int, float)) and math.isfinite(alpha) for alpha in alphas):
        raise conversion.ConversionError(f'lora_alpha: got {alphas}, expected numbers')
    _check_settings(found)
    return found


def _check_settings(found: Mapping[str, Any]) -> None:
    """Raises ConversionError if the update is something else than alpha / r * B A."""
    if found.get('use_dora'):
        raise conversion.ConversionError(
            'use_dora: this adapter rescales its weights (DoRA), which is not implemented'
        )
    if found.get('peft_type', 'LORA') != 'LORA':
        raise conversion.ConversionError(f"peft_type: got {found['peft_type']!r}, expected 'LORA'")
    start = found.get('init_lora_weights')
    if not isinstance(start, (bool, str, type(None))) or start not in INIT:
        raise conversion.ConversionError(
            f'init_lora_weights: got {start!r}, which changes the base weights at its start; save '
            'it with path_initial_model_for_weight_conversion, as peft describes'
        )
    known = (*WITHOUT_EFFECT, *READ, 'peft_type')
    unknown = [key for key, value in found.items() if value and key not in known]
    if unknown:
        raise conversion.ConversionError(
            f'got the settings {", ".join(unknown)}, which are unknown'
        )


def _alpha(name: str, rank: int, settings: Mapping) -> float:
    """Alpha of a module that has no alpha tensor."""
    alpha = settings.get('lora_alpha', rank)
    for pattern, value in (settings.get('alpha_pattern') or {}).items():
        if re.match(rf'(.*\.)?({pattern})$', name):
            alpha = value
            break
    return alpha * math.sqrt(rank) if settings.get('use_rslora') else alpha


def _named(
    tensors: Mapping[str, np.ndarray], table: conversion.Table, component: str
) -> dict[str, dict[str, np.ndarray]]:
    """Torch module -> its tensors 'A', 'B' and 'alpha'."""
    known, faults = lora_names.names(table), []
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for part, kind in OTHER_KINDS.items() if part in key), None)
        if kind:
            raise conversion.ConversionError(f'{key}: this adapter is a {kind}, not a LoRA')
        name, side = lora_names.split(key)
        module = next(
            (known[one] for one in lora_names.without_prefixes(name, component) if one in known), 0
        )
        if not (side and module):
            near = difflib.get_close_matches(
                name.removeprefix(f'{component}.').removeprefix(lora_names.PREFIXES[0]),
                known,
                1,
                0.6,
            )
            faults.append(f'unknown key {key}' + (f' (nearest: {near[0]})' if near else ''))
            continue
        part = parts.setdefault(module, {})
        if side in part:
            faults.append(f'{key}: is there under another prefix as well')
        if not conversion.is_finite(tensor):
            faults.append(f'{key}: has values that are not finite')
        part[side] = tensor
    if not (tensors or faults):
        faults = ['no tensors']
    _raise(faults)
    return parts


def _to_jax(parts: Mapping, settings: Mapping, known: Mapping[str, Module], flat: Mapping) -> dict:
    faults = []
    leaves: dict[str, dict] = {}
    for name, part in parts.items():
        module = known[name]
        shape = flat[f'{module.path}/kernel'].shape[-2:]
        lost = [f'missing key {name}.lora_{side}.weight' for side in 'AB' if side not in part]
        if lost:
            faults += lost
            continue
        try:
            a, b = module.to_ours(part['A'], part['B'], shape)
        except Exception:  # einops raises its own kinds
            (_, *rest), _ = module.groups
            inner = shape[0] if len(rest) == 1 else ', '.join(rest)
            faults.append(
                f'{name}: got A {tuple(part["A"].shape)} and B {tuple(part["B"].shape)}, expected '
                f'(r, {inner}) and ({shape[1]}, r)'
            )
            continue
        if 'alpha' in part and part['alpha'].size != 1:
            faults.append(f'{name}.alpha: got shape {part["alpha"].shape}, expected one number')
            continue
        alpha = part['alpha'].item() if 'alpha' in part else _alpha(name, len(b), settings)
        leaves.setdefault(module.path, {})[module.index] = (a, b, alpha)
    _raise(faults)
    return conversion.unflatten(
        {path: _stacked(found, flat[f'{path}/kernel'].shape) for path, found in leaves.items()}
    )


def _raise(faults: Sequence[str]) -> None:
    """Raises ConversionError with all faults, if there are any."""
    if faults:
        shown = conversion.SHOWN
        more = f'; and {len(faults) - shown} more' if len(faults) > shown else ''
        raise conversion.ConversionError(
            f'{len(faults)} adapter fault(s): ' + '; '.join(faults[:shown]) + more
        )


def _stacked(found: Mapping[int, tuple], shape: Sequence[int]) -> dict:
    """Leaves of a stack; smaller ranks are padded with zeros, and alpha is scaled to match."""
    *stack, inner, outer = shape
    rank = max(a.shape[1] for a, _, _ in found.values())
    made = {
        'a': np.zeros((*stack, inner, rank), np.float32),
        'b': np.zeros((*stack, rank, outer), np.float32),
        'alpha': np.zeros(stack, np.float32),
    }
    for index, (a, b, alpha) in found.items():
        at = index if stack else ()
        made['a'][at][:, : a.shape[1]] = a
        made['b'][at][: a.shape[1]] = b
        made['alpha'][at] = alpha * rank / a.shape[1]
    return made


# --- writing ---------------------------------------------------------------------------------


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
    known = with_convolutions(table)
    names = {(module.path, module.index): name for name, module in known.items()}
    for layer, parts in layers(adapter).items():
        a, b, alpha = (np.asarray(parts[name]) for name in ('a', 'b', 'alpha'))
        for index in range(len(a) if a.ndim == 3 else 1):
            name, at = names[layer, index], index if a.ndim == 3 else ()
            if alpha[at]:
                alphas[name], ranks[name] = float(alpha[at]), a.shape[-1]
                key = f'{component}.{name}.lora_'
                down, up = known[name].to_torch(a[at], b[at])
                tensors |= {f'{key}A.weight': down, f'{key}B.weight': up}
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
    return common, {
        f'^{re.escape(name)}': value for name, value in values.items() if value != common
    }
