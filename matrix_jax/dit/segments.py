"""Runs of equal layers, each of them one scan, so that thirty layers compile like one.

On a GPU, a scan copies the weights of each layer out of the stacked array before it uses them. So
streams on GPUs hold every layer in arrays of its own (`separate`), and the layers follow each other
in the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax


def segments(layers: int, chosen: Collection[int], name: str) -> dict[str, tuple[int, int]]:
    """Name -> (start, stop) of each run of equal layers, in order.

    Runs of the chosen layers are called `name`, `name_2` and so on; the others are called 'before',
    'after', and 'between', 'between_2' and so on.

    Args:
      layers: number of layers of the network.
      chosen: numbers of the layers that differ.
      name: name of the runs of those layers.
    """
    runs, counts = {}, {name: 0, 'between': 0}
    for differs, run in itertools.groupby(range(layers), key=lambda layer: layer in chosen):
        start, *rest = run
        stop = start + 1 + len(rest)
        key = name if differs else 'between'
        if not differs and start == 0:
            key = 'before'
        elif not differs and stop == layers:
            key = 'after'
        if key in counts:
            counts[key] += 1
            key = key if counts[key] == 1 else f'{key}_{counts[key]}'
        runs[key] = (start, stop)
    return runs


def check_span(field: str, span, layers: int) -> None:
    """Checks that the layers of a span are layers of the network.

    Raises:
      ValueError: they are not.
    """
    if span and not 0 <= span.start < span.end <= layers:
        raise ValueError(
            f'{field}: got layers [{span.start}, {span.end}), expected a range within '
            f'the {layers} layers'
        )


FIRST = 'layers_0'  # first layer of a run that is not stacked


def is_separate(run) -> bool:
    """Whether the parameters of a run of layers are those of `SeparateLayers`."""
    return FIRST in run


def scan_layers(layer: type[nn.Module], cfg, length: int, separate: bool = False, **in_axes):
    """A run of `length` equal layers: a scan, rematerialised as the config says.

    Args:
      layer: the module class.
      cfg: config with `remat` and `scan_unroll`.
      length: number of layers.
      separate: whether the layers are not scanned, as each has parameters of its own.
      in_axes: method name -> scan axis of each input behind the carry.

    Returns:
      Class of the run, with the fields of `layer`.
    """
    if separate:
        return lambda *fields, name=None: SeparateLayers(layer, fields, length, in_axes, name=name)
    if cfg.remat != 'none':
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = nn.remat(layer, prevent_cse=False, policy=dots if cfg.remat == 'dots' else None)
    lifted = dict(
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True},
        length=length,
        unroll=min(cfg.scan_unroll, length),
    )
    return nn.scan(
        layer, methods={name: dict(in_axes=axes, **lifted) for name, axes in in_axes.items()}
    )


class SeparateLayers(nn.Module):
    """Equal layers one after the other. What a scan stacks is a tuple here, one entry per layer.

    Attributes:
      layer: the module class.
      fields: its fields.
      length: number of layers.
      in_axes: method name -> whether each input behind the carry is scanned (0) or broadcast.
    """

    layer: Any
    fields: tuple
    length: int
    in_axes: Any

    def setup(self):
        self.layers = [self.layer(*self.fields) for _ in range(self.length)]

    def __call__(self, carry, *inputs):
        """(carry, inputs) -> (carry, outputs of each layer)."""
        return self._run('__call__', carry, inputs)

    def read_image(self, carry, *inputs):
        """The same with the method `read_image` of the layers."""
        return self._run('read_image', carry, inputs)

    def read_segment(self, carry, *inputs):
        """The same with the method `read_segment` of the layers."""
        return self._run('read_segment', carry, inputs)

    def read_keyboard(self, carry, *inputs):
        """The same with the method `read_keyboard` of the layers."""
        return self._run('read_keyboard', carry, inputs)

    def _run(self, method, carry, inputs):
        axes, outputs = self.in_axes[method], []
        axes = axes if isinstance(axes, tuple) else (axes,) * len(inputs)
        for index, layer in enumerate(self.layers):
            given = [
                one if axis is nn.broadcast or one is None else one[index]
                for one, axis in zip(inputs, axes, strict=True)
            ]
            carry, output = getattr(layer, method)(carry, *given)
            outputs.append(output)
        return carry, tuple(outputs)


def separate(params: dict, runs: Collection[str], change: Callable = lambda layer: layer) -> dict:
    """Parameters of a network with each layer of some runs in arrays of its own.

    Args:
      params: parameter tree of arrays, or of ShapeDtypeStructs.
      runs: names of the runs; those that are separate already stay as they are.
      change: applied to the parameters of each layer.
    """
    return {
        name: _unstack(tree, change) if name in runs and not is_separate(tree) else tree
        for name, tree in params.items()
    }


def _unstack(run, change) -> dict:
    """Stacked parameters of a run -> {'layers_0': those of its first layer, ...}."""
    leaves, structure = jax.tree.flatten(run)
    split = [_split(leaf) for leaf in leaves]
    return {
        f'layers_{index}': change(jax.tree.unflatten(structure, layer))
        for index, layer in enumerate(zip(*split, strict=True))
    }


def _split(leaf) -> list:
    """Stacked layers [layers ...] -> one array per layer."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return list(jax.jit(lambda x: tuple(x))(leaf))
    place = leaf.sharding
    if isinstance(place, jax.sharding.NamedSharding):
        place = place.update(spec=jax.sharding.PartitionSpec(*place.spec[1:]))
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)] * leaf.shape[0]
