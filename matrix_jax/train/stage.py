"""A training stage: a loss, the parameters that train, and the data that it reads.

Stages chain by folders of weights in the diffusers layout: a run starts from its `weights` and
leaves `OUT/weights`, ready for `matrix-jax generate --weights` and for the next stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from matrix_jax.config import UsageError
from matrix_jax.train import optim
from matrix_jax.train.optim import Optimizer
from matrix_jax.weights import conversion


@dataclasses.dataclass(frozen=True)
class Stage:
    """Base of all stages; a stage overrides what differs.

    Attributes:
      optimizer: see `optim.Optimizer`.
      ema: decay of the exported average.
      export: dtype of the exported weights; 'float32' keeps every bit.
    """

    optimizer: Optimizer = Optimizer()
    ema: float = 0.999
    export: Literal['bfloat16', 'float32'] = 'bfloat16'

    # What the network of a world must predict for this stage to train it; None = any world.
    prediction: ClassVar[str | None] = None
    components: ClassVar[tuple[str, ...]] = ()  # components whose parameters the loss reads

    def __post_init__(self):
        if not 0 <= self.ema < 1:
            raise ValueError(f'stage.ema: got {self.ema}, expected 0 <= ema < 1')

    def check_world(self, world):
        """Raises UsageError unless the stage trains this kind of world."""
        if self.prediction not in (None, world.prediction):
            raise UsageError(
                f'stage: {type(self).__name__} trains worlds of {self.prediction}, '
                f'got {world.cfg.name} of {world.prediction}'
            )

    def check_fields(self, **ranges: tuple[float, float | None]):
        """Raises ValueError unless each field lies in its range (low, high); high None = no limit.

        A field that is None is not checked.
        """
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= (float('inf') if high is None else high):
                wanted = f'at least {low}' if high is None else f'{low} to {high}'
                raise ValueError(f'stage.{name}: got {value}, expected {wanted}')

    def start(self, world, params, seed: int, allow_non_finite: bool = False) -> dict:
        """Parameters by component that the loss reads.

        Args:
          params: parameters of the whole world; components that no stage needs may be missing.
          seed: seed of new parameters.
          allow_non_finite: whether further weights that the stage reads may have values that are
            infinite or not a number.
        """
        return {name: params[name] for name in self.components if name in params}

    def axes(self, world) -> dict[str, tuple[str, ...]]:
        """Path -> axis letters of the leaves of `start` (`conversion.axes`)."""
        tables = {name: conversion.axes(world.tables[name]) for name in self.components}
        return conversion.flatten(tables)

    def transform(self, axes, steps: int):
        """Optax transformation of the trained leaves, a flat dict.

        Args:
          axes: from `axes`.
          steps: updates of the run.
        """
        return optim.make(self.optimizer, steps, axes)

    def trainable(self, path: str) -> bool:
        """Whether the leaf 'component/path' trains."""
        return True

    def loader(self, world, params, data: str, batch: int, seed: int, cache: str) -> Any:
        """Endless iterator of batches (dicts of numpy arrays) with `state() -> bytes` and
        `restore(state)`.

        A batch may hold `clip`, int [B]: the clips it was cut from, as indices into
        `loader.names`. The loop names them when an update is not finite; the loss never sees them.

        Args:
          world: the world.
          params: start parameters, for stages that encode their data in advance.
          data: folder of recorded clips, or several separated by commas.
          batch: examples per step.
          seed: seed of the order of the examples.
          cache: folder for encoded data.
        """
        raise NotImplementedError

    def example(self, world, batch: int) -> dict:
        """ShapeDtypeStructs of a batch of `loader`, for a dry run.

        Raises:
          ValueError: the stage has no dry run.
        """
        raise ValueError(f'stage: {type(self).__name__} has no dry run')

    def loss(self, world, params, batch, key):
        """Scalar loss and a dict of scalar metrics; pure.

        The metrics may also hold `state.BUFFERS`, new values of leaves that do not train.
        """
        raise NotImplementedError

    def finish(self, world, params, loader):
        """The world and the parameters to export after training; unchanged by default."""
        return world, params

    def save(self, world, params, folder: str, run):
        """Writes the folder of weights that training leaves.

        Args:
          world, params: from `finish`.
          folder: where to write.
          run: the recipe (`config.Run`).
        """
        world.save(folder, params, start=run.weights, dtype=self.export)


def check_clip_frames(frames: int):
    """Raises ValueError unless a clip of `frames` pixel frames is whole latent frames."""
    if frames < 5 or (frames - 1) % 4:
        raise ValueError(
            f'stage.clip_frames: got {frames}, expected 1 + 4k with k of at least 1 '
            '(whole latent frames)'
        )


def latent_size(cfg) -> tuple[int, int]:
    """Latent height and width of a world's config."""
    return cfg.height // cfg.vae.spatial_compression, cfg.width // cfg.vae.spatial_compression


def example_batch(batch: int, **arrays: tuple) -> dict:
    """ShapeDtypeStructs [batch, *shape] of arrays given as name=(dtype, *shape)."""
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype)
        for name, (dtype, *shape) in arrays.items()
    }
