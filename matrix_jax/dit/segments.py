"""Networks whose layers differ in one span: runs of equal layers, each scanned in one go."""

from __future__ import annotations


def segments(layers: int, span, name: str) -> dict[str, tuple[int, int]]:
    """Name -> (start, stop) of each run of equal layers; empty runs are absent.

    Args:
      layers: of the network.
      span: what has the `start` and `end` of the layers that differ, or None.
      name: of the run of these.
    """
    start, end = (span.start, span.end) if span else (layers, layers)
    runs = {'before': (0, start), name: (start, end), 'after': (end, layers)}
    return {name: run for name, run in runs.items() if run[0] < run[1]}


def check_span(field: str, span, layers: int) -> None:
    """ValueError if the layers that differ, if any do, are not layers of the network."""
    if span and not 0 <= span.start < span.end <= layers:
        raise ValueError(
            f'{field}: got layers [{span.start}, {span.end}), expected a range within '
            f'the {layers} layers'
        )
