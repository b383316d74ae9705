"""Runs of equal layers, each of them one scan, so that thirty layers compile like one."""

from __future__ import annotations

import flax.linen as nn
import jax


def segments(layers: int, span, name: str) -> dict[str, tuple[int, int]]:
    """Name -> (start, stop) of each run of equal layers; empty runs are left out.

    Args:
      layers: number of layers of the network.
      span: object with the `start` and `end` of the layers that differ, or None.
      name: name of the run of those layers.
    """
    start, end = (span.start, span.end) if span else (layers, layers)
    runs = {'before': (0, start), name: (start, end), 'after': (end, layers)}
    return {name: run for name, run in runs.items() if run[0] < run[1]}


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
