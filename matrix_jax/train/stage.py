"""What a training stage is: a loss, a choice of what trains, and the data it reads.

Stages chain by handing on released-layout folders: `weights` of a run is where it starts, and
`OUT/weights` is what it leaves, ready for `matrix-jax generate --weights` and for the next stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from matrix_jax.train import optim
from matrix_jax.train.optim import Optimizer
from matrix_jax.weights import conversion


@dataclasses.dataclass(frozen=True)
class Stage:
    """Base of all stages; a stage overrides what differs.

    Attributes:
      optimizer: see `optim.Optimizer`.
      ema: decay of the exported average.
      export: type of the exported weights; 'float32' keeps every bit.
    """

    optimizer: Optimizer = Optimizer()
    ema: float = 0.999
    export: Literal['bfloat16', 'float32'] = 'bfloat16'

    components = ()  # parts of the world whose parameters the loss reads

    def __post_init__(self):
        if not 0 <= self.ema < 1:
            raise ValueError(f'stage.ema: got {self.ema}, expected 0 <= ema < 1')

    def start(self, world, params, seed: int) -> dict:
        """The parameters by component that the loss reads, from those of the whole world, which may
        leave out what it has no use for."""
        return {name: params[name] for name in self.components if name in params}

    def axes(self, world) -> dict[str, tuple[str, ...]]:
        """Axis letters of the leaves of `start` by path (`conversion.axes`)."""
        tables = {name: conversion.axes(world.tables[name]) for name in self.components}
        return conversion.flatten(tables)

    def transform(self, axes, steps: int):
        """The optax transformation of the trained leaves, a flat dict.

        Args:
          axes: of `axes`.
          steps: updates of the run.
        """
        return optim.make(self.optimizer, steps, axes)

    def trainable(self, path: str) -> bool:
        """Whether the leaf 'component/path' trains."""
        return True

    def loader(self, world, params, data: str, batch: int, seed: int, cache: str) -> Any:
        """An endless iterator of batches (dicts of numpy arrays), with `state() -> bytes` and
        `restore(state)`. A batch may hold `clip`, int [B]: the clips it was cut from, by number in
        `loader.names`. The loop tells them when an update is not finite; the loss does not see
        them.

        Args:
          world: the World.
          params: start parameters, for stages that pre-encode their data.
          data: folder of recorded clips, or several with commas.
          batch: examples per step.
          seed: order of the examples.
          cache: folder for what is computed once.
        """
        raise NotImplementedError

    def example(self, world, batch: int) -> dict:
        """ShapeDtypeStructs of a batch of `loader`, for a dry run.

        Raises:
          ValueError: the stage says nothing about them.
        """
        raise ValueError(f'stage: {type(self).__name__} has no dry run')

    def loss(self, world, params, batch, key):
        """Scalar loss and a dict of scalar metrics; pure."""
        raise NotImplementedError

    def finish(self, world, params, loader):
        """The world and parameters to export once trained; both unchanged by default."""
        return world, params

    def add_files(self, world, params, folder: str):
        """Writes what the folder of exported weights holds besides the released layout."""
