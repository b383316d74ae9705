"""Batches of several clip lengths: each batch has one, and the lengths take turns at random."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np


class Buckets:
    """Endless batches of several loaders; `state()` and `restore(state)` as theirs.

    Args:
      loaders: one for each length, of the same data and the same batch size.
      seed: order of the turns; every length has as many in the long run.
    """

    def __init__(self, loaders: Sequence, seed: int):
        self.loaders, self.seed, self.drawn = list(loaders), seed, 0
        self.names = loaders[0].names

    def share(self, index: int, count: int):
        """From the first batch on, reads part `index` of `count` equal parts of each batch."""
        for loader in self.loaders:
            loader.share(index, count)

    def __iter__(self):
        return self

    def __next__(self):
        # All processes draw the same length.
        turn = np.random.default_rng([self.seed, self.drawn]).integers(len(self.loaders))
        self.drawn += 1
        return next(self.loaders[turn])

    def state(self) -> bytes:
        """The place in the data, as JSON bytes."""
        return json.dumps(
            {
                'drawn': self.drawn,
                'seed': self.seed,
                'buckets': [json.loads(loader.state()) for loader in self.loaders],
            }
        ).encode()

    def restore(self, state: bytes):
        """Goes on where `state` was taken.

        Raises:
          ValueError: the state is of other data or other lengths.
        """
        saved = json.loads(state)
        count, seed = len(saved.get('buckets', [0])), saved.get('seed')
        if (count, seed) != (len(self.loaders), self.seed):
            raise ValueError(
                f'buckets.restore: the state has {count} lengths and seed {seed}, '
                f'here are {len(self.loaders)} and seed {self.seed}'
            )
        for loader, part in zip(self.loaders, saved['buckets']):
            loader.restore(json.dumps(part).encode())
        self.drawn = saved['drawn']
