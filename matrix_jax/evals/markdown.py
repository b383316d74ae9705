"""Markdown of results: tables, and how a curve begins and ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def table(head: Sequence, rows: Sequence[Sequence]) -> list[str]:
    """Lines of a Markdown table, followed by an empty line."""
    lines = [head, ['---'] * len(head), *rows]
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in lines] + ['']


def ends(values) -> str:
    """'A to B': means of the first and of the last third of the values."""
    third = max(len(values) // 3, 1)
    return f'{np.mean(values[:third]):.2f} to {np.mean(values[-third:]):.2f}'


def by_minute(long: dict, columns: dict[str, str]) -> list[str]:
    """Table of the section `long` of an evaluation, a row per minute.

    Args:
      long: name -> value of each minute.
      columns: name -> heading.
    """
    count = len(long[next(iter(columns))])
    rows = [
        [minute + 1, *(f'{long[name][minute]:.2f}' for name in columns)] for minute in range(count)
    ]
    return table(['minute', *columns.values()], rows)
