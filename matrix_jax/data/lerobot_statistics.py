"""Statistics of the features of a LeRobot data set, which its trainings normalize by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


class Statistics:
    """Statistics of every feature, of episodes and of all of them.

    Args:
      camera: the feature with the pictures.
    """

    def __init__(self, camera: str):
        self.camera = camera
        self.columns: dict[str, list[np.ndarray]] = {}
        self.levels = np.zeros((3, 256), np.int64)  # how often each level occurs in each channel
        self.pictures = 0

    def add(self, columns: Mapping[str, np.ndarray], shown: np.ndarray) -> dict[str, Any]:
        """Adds an episode and returns its own statistics, by 'stats/FEATURE/NAME'.

        Args:
          columns: feature -> values [N] or [N D].
          shown: some of its frames, uint8 [F H W 3].
        """
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values)
        levels = np.stack([np.bincount(shown[..., one].ravel(), minlength=256) for one in range(3)])
        self.levels += levels
        self.pictures += len(shown)
        found = {name: of_values(values) for name, values in columns.items()}
        found[self.camera] = of_pictures(levels, len(shown))
        return {
            f'stats/{feature}/{name}': value
            for feature, stats in found.items()
            for name, value in stats.items()
        }

    def all(self) -> dict[str, Any]:
        """Statistics of all episodes, by feature."""
        found = {name: of_values(np.concatenate(parts)) for name, parts in self.columns.items()}
        return {self.camera: of_pictures(self.levels, self.pictures)} | found


def of_values(values: np.ndarray) -> dict[str, list]:
    """Statistics of numbers [N] or [N D]: a list of D for each, and the count N."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(rows, QUANTILES, axis=0)
    return _named(rows.min(0), rows.max(0), rows.mean(0), rows.std(0), quantiles) | {
        'count': [len(rows)]
    }


def of_pictures(levels: np.ndarray, count: int) -> dict[str, list]:
    """Statistics of pictures with levels from 0 to 1: [[[x]]] of each channel for each.

    Args:
      levels: how often each of 256 levels occurs in each channel, [3 256].
      count: number of pictures.
    """
    scale, total = np.arange(256) / 255, levels.sum(1, keepdims=True)
    share = levels / total
    mean = share @ scale
    deviation = np.sqrt(np.maximum(share @ scale**2 - mean**2, 0))
    below = np.cumsum(share, 1)
    quantiles = np.array([scale[(below < one - 1e-12).sum(1)] for one in QUANTILES])
    lowest = scale[(levels > 0).argmax(1)]
    highest = scale[255 - (levels[:, ::-1] > 0).argmax(1)]
    found = _named(lowest, highest, mean, deviation, quantiles)
    return {name: [[[one]] for one in value] for name, value in found.items()} | {'count': [count]}


def _named(lowest, highest, mean, deviation, quantiles) -> dict[str, list]:
    named = {'min': lowest, 'max': highest, 'mean': mean, 'std': deviation}
    named |= {f'q{round(100 * q):02d}': one for q, one in zip(QUANTILES, quantiles, strict=True)}
    return {name: value.tolist() for name, value in named.items()}
