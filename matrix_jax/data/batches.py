"""Endless batches through grain whose position can be saved and restored exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

# Large enough to be endless; grain's own endless repetition overflows with batches of one.
EPOCHS = 2**32


class ResumableBatches:
    """Base of endless iterators of batches.

    Every process draws the same batches and reads its own `rows` of each. A subclass makes a grain
    dataset of batches and passes it to `start`.

    Args:
      batch: examples per batch over all processes.
      process: (index, count) of this process.
      source: what the batches depend on; a state restores only where it agrees.

    Attributes:
      rows: slice of each batch that this process reads.
      names: origin of each clip, for messages.
    """

    missing: ClassVar[dict] = {}  # entries of `source` that old states lack
    names: Sequence[str]

    def __init__(self, batch: int, process: tuple[int, int], source: dict):
        self.batch, self.source = batch, source
        self.share(*process)

    def start(self, dataset, prefetch: int):
        """Begins to read a grain MapDataset of batches; one thread prepares `prefetch` of them."""
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self.iterator = iter(dataset.to_iter_dataset(options))

    def share(self, index: int, count: int):
        """Restricts this process to part `index` of `count` equal parts of each batch.

        Must be called before the first batch.

        Raises:
          ValueError: the batch does not divide by `count`.
        """
        if self.batch % count:
            raise ValueError(
                f'train.batch: got {self.batch}, expected a multiple of {count} processes'
            )
        self.rows = slice(index * self.batch // count, (index + 1) * self.batch // count)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        return next(self.iterator)

    def state(self) -> bytes:
        """Position in the data, as JSON."""
        return json.dumps({**self.source, 'grain': self.iterator.get_state()}).encode()

    def restore(self, state: bytes):
        """Continues at a saved position.

        Raises:
          ValueError: the state belongs to other data or settings.
        """
        saved = {**self.missing, **json.loads(state)}
        for name, ours in self.source.items():
            if saved.get(name) != ours:
                raise ValueError(
                    f'{type(self).__name__}.restore: the state has {name} {saved.get(name)}, '
                    f'expected {ours}: the batches would differ'
                )
        self.iterator.set_state(saved['grain'])


def shuffled(pools: Sequence[tuple[Any, float]], seed: int, batch: int, draw: Callable):
    """Grain dataset of batches that mixes shuffled, endlessly repeated pools.

    Args:
      pools: (sequence to draw from, weight) of each pool.
      seed: seed of the order.
      batch: elements per batch.
      draw: elements -> batch.
    """
    import grain

    mixed = [
        (grain.MapDataset.source(pool).seed(seed).shuffle().repeat(EPOCHS), weight)
        for pool, weight in pools
    ]
    data = grain.MapDataset.mix(*zip(*mixed)) if len(mixed) > 1 else mixed[0][0]
    return data.batch(batch).map(draw)
