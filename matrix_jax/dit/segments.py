"""Runs of equal layers, each of them one scan, so that thirty layers compile like one."""

from __future__ import annotations

import itertools
from collections.abc import Collection

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


def scan_layers(layer: type[nn.Module], cfg, length: int, **in_axes):
    """A scan of `length` equal layers, rematerialised as the config says.

    Args:
      layer: the module class.
      cfg: config with `remat` and `scan_unroll`.
      length: number of layers.
      in_axes: method name -> scan axis of each input behind the carry.
    """
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
