"""Configs of networks with fewer layers, to measure parts of a large network."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from matrix_jax.config import UsageError


def check_layers(option: str, layers: int, whole: int) -> None:
    """Raises UsageError unless a network of `whole` layers can be shortened to `layers`."""
    if not 1 <= layers <= whole:
        raise UsageError(f'{option}: got {layers}, expected 1 to {whole}, the layers of the recipe')


def fewer_text_layers(cfg: Any, layers: int | None, text_layers: int | None) -> Any:
    """Returns a text encoder's config with `text_layers`, by default at most `layers`.

    Raises:
      UsageError: the config has fewer layers than `text_layers`.
    """
    if text_layers is not None:
        check_layers('--text-layers', text_layers, cfg.layers)
        return dataclasses.replace(cfg, layers=text_layers)
    return cfg if layers is None else dataclasses.replace(cfg, layers=min(layers, cfg.layers))


def fewer_layers(cfg: Any, layers: int, span_field: str) -> Any:
    """Returns a transformer's config with fewer layers.

    The field `span_field` says which layers (`start` to `end`, or the numbers in `blocks`) have
    additional blocks, if any do; they keep their share of the layers.

    Raises:
      UsageError: the config has fewer layers.
    """
    check_layers('--layers', layers, cfg.layers)
    span, whole = getattr(cfg, span_field), cfg.layers
    if blocks := getattr(span, 'blocks', None):
        kept = tuple(sorted({block * layers // whole for block in blocks}))
        span = dataclasses.replace(span, start=kept[0], end=kept[-1] + 1, blocks=kept)
    elif span:
        start, end = span.start * layers // whole, math.ceil(span.end * layers / whole)
        span = dataclasses.replace(span, start=start, end=end)
    return dataclasses.replace(cfg, layers=layers, **{span_field: span})
