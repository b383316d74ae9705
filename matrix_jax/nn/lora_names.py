"""Names of the layers of low-rank adapters in files of diffusers, peft, kohya and ComfyUI.

One and the same layer has these names:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight         diffusers, with its header
    base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight    peft, with adapter_config.json
    lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight        kohya, musubi
    diffusion_model.transformer_blocks.0.attn1.to_q.lora_down.weight  ComfyUI
    transformer.transformer_blocks.0.attn1.to_q.lora.down.weight      diffusers before peft

The weight table of the network, with its renamed layers, maps the names to kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from einops import rearrange

from matrix_jax.weights import conversion

PREFIXES = ('base_model.model.', 'model.diffusion_model.', 'diffusion_model.', 'model.', 'module.')
FLAT = ('lora_unet_', 'lora_transformer_', 'lycoris_')  # dots of the layer are underscores
KEYS = tuple(
    re.compile(rf'(?P<module>.+){ending}')
    for ending in (
        r'\.lora_(?P<side>[AB])(?:\.\w+)?\.weight',
        r'\.lora_(?P<side>down|up)\.weight',
        r'\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight',
        r'_lora\.(?P<side>down|up)\.weight',
        r'\.(?P<side>alpha)',
    )
)
SIDES = {'A': 'A', 'down': 'A', 'B': 'B', 'up': 'B', 'alpha': 'alpha'}


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer, or a convolution of patches: its parameters and its place in the stack.

    Attributes:
      path: path of its parameters.
      row: row of its kernel in the weight table.
      index: its index in the stack of layers.
    """

    path: str
    row: conversion.Row
    index: int

    @property
    def groups(self) -> tuple[list[str], list[str]]:
        """Axes of the torch weight and of our kernel [in out], as texts of einops."""
        left, right = self.row.layout.split('->')
        return _groups(left), _groups(right)

    def to_ours(self, a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> tuple:
        """A and B of torch, [r in...] and [out r ...] -> ours, [in r] and [r out].

        Args:
          a, b: the tensors.
          shape: of our kernel [in out].

        Raises:
          ValueError: they do not fit the kernel.
        """
        (out, *rest), (inner, outer) = self.groups
        sizes = conversion.merged_sizes(self.row, shape)
        if b.ndim > 2 and b.shape[2:] == (1,) * (b.ndim - 2):  # a convolution of single pixels
            b = b.reshape(b.shape[:2])
        ours = (
            _rearrange(a, f'rank {" ".join(rest)} -> {inner} rank', sizes),
            _rearrange(b, f'{out} rank -> rank {outer}', sizes),
        )
        rank = ours[1].shape[0]
        if not rank or [one.shape for one in ours] != [(shape[0], rank), (rank, shape[1])]:
            raise ValueError('other sizes')
        return ours

    def to_torch(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_ours`."""
        (out, *rest), (inner, outer) = self.groups
        sizes = conversion.merged_sizes(self.row, (len(a), b.shape[1]))
        down = _rearrange(a, f'{inner} rank -> rank {" ".join(rest)}', sizes)
        up = _rearrange(b, f'rank {outer} -> {out} rank', sizes)
        return down, up.reshape(*up.shape, *(1,) * (down.ndim - 2))


def _groups(text: str) -> list[str]:
    """Axes of one side of an einops pattern."""
    return re.findall(r'\([^)]*\)|\S+', text)


def _rearrange(tensor: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    used = set(re.findall(r'\w+', pattern))
    known = {letter: size for letter, size in sizes.items() if letter in used}
    return np.ascontiguousarray(rearrange(tensor, pattern, **known))


def modules(table: conversion.Table) -> dict[str, Module]:
    """Torch module name -> `Module` of all linear layers of a weight table."""
    every = with_convolutions(table).items()
    return {name: module for name, module in every if len(module.groups[0]) == 2}


def with_convolutions(table: conversion.Table) -> dict[str, Module]:
    """Torch module name -> `Module` of all linear layers, and of the convolutions of patches."""
    found = {}
    for row in table:
        if not isinstance(row, conversion.Row) or not row.path.endswith('kernel'):
            continue
        left, right = map(_groups, row.layout.split('->'))
        letters = [sorted(re.findall(r'\w+', text)) for text in (left[0], right[-1])]
        if len(left) >= 2 == len(right) and letters[0] == letters[1]:
            path = row.path.removesuffix('/kernel')
            for index, key in enumerate(row.keys()):
                found[key.removesuffix('.weight')] = Module(path, row, index)
    return found


def names(table: conversion.Table) -> dict[str, str]:
    """Every name of an adapted module -> its name in the table."""
    renames = [
        conversion.Rename(one.known, one.torch)
        for one in table
        if isinstance(one, conversion.Rename)
    ]
    found = {}
    for module in with_convolutions(table):
        others = (rename.name(f'{module}.weight') for rename in renames)
        for name in (module, *(one.removesuffix('.weight') for one in others if one)):
            found[name] = module
            found[name.replace('.', '_')] = module
    return found


def split(key: str) -> tuple[str, str | None]:
    """(name of the module, 'A', 'B' or 'alpha') of a key; None if it is no key of a LoRA."""
    for pattern in KEYS:
        if match := pattern.fullmatch(key):
            name = match['module']
            if pattern is KEYS[3]:  # processors of older diffusers hold the layers of an attention
                name = name.replace('.processor', '')
                name += '.0' if name.endswith('to_out') else ''
            return name, SIDES[match['side']]
    return key, None


def without_prefixes(name: str, component: str) -> Iterator[str]:
    """Yields a name without the prefixes of wrappers, one after the other."""
    prefixes = (*PREFIXES, *FLAT, f'{component}.')
    yield name
    while prefix := next((one for one in prefixes if name.startswith(one)), None):
        name = name.removeprefix(prefix)
        yield name
