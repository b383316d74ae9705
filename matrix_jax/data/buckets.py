"""Batches of several clip lengths: each batch has one length, chosen at random."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np


class Buckets:
    """Endless batches from several loaders, with `state()` and `restore(state)` as theirs.

    Args:
      loaders: one per length, of the same data and batch size; all are equally likely.
      seed: seed of the choice.
    """

    def __init__(self, loaders: Sequence, seed: int):
        self.loaders, self.seed, self.drawn = list(loaders), seed, 0
        self.names = loaders[0].names

    def share(self, index: int, count: int):
        """See `ResumableBatches.share`."""
        for loader in self.loaders:
            loader.share(index, count)

    def __iter__(self):
        return self

    def __next__(self):
        # The same choice in all processes.
        turn = np.random.default_rng([self.seed, self.drawn]).integers(len(self.loaders))
        self.drawn += 1
        return next(self.loaders[turn])

    def state(self) -> bytes:
        """Position in the data, as JSON."""
        return json.dumps(
            {
                'drawn': self.drawn,
                'seed': self.seed,
                'buckets': [json.loads(loader.state()) for loader in self.loaders],
            }
        ).encode()

    def restore(self, state: bytes):
        """Continues at a saved position.

        Raises:
          ValueError: the state belongs to other data or other lengths.
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
