"""A reward as two pure functions of frames: a small network and the rule of its task.

    values = sigmoid(dense(gelu(dense(gelu(convolutions(newest frame, movement))))))

The network reads decoded frames, so it fits every world that makes frames of its size, whatever the
autoencoder. A folder of it holds `reward/config.json` and its weights beside it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from matrix_jax.config import UsageError
from matrix_jax.rewards.tasks import TASKS, Task
from matrix_jax.weights import conversion, diffusers_layout
from matrix_jax.weights.schema import check_fields

FOLDER = 'reward'
KIND = 'RewardModel'


@dataclasses.dataclass(frozen=True)
class Config:
    """The network.

    Attributes:
      task: key of `tasks.TASKS`.
      height, width: size of the frames in pixels.
      frames: frames that it reads, the last ones of a step.
      shrink: factor by which frames are reduced first.
      widths: channels of the convolutions, each of stride 2.
      hidden: units of the hidden layer.

    Raises:
      ValueError: a field is out of range.
    """

    task: str = 'on_road'
    height: int = 64
    width: int = 96
    frames: int = 4
    shrink: int = 2
    widths: tuple[int, ...] = (24, 32, 48)
    hidden: int = 48

    def __post_init__(self):
        object.__setattr__(self, 'widths', tuple(self.widths))
        check_fields(self, 'reward.')
        if self.task not in TASKS:
            raise ValueError(f'reward.task: got {self.task!r}, expected one of {", ".join(TASKS)}')
        if self.height % self.shrink or self.width % self.shrink:
            raise ValueError(
                f'reward.shrink: got {self.shrink}, expected a divisor of '
                f'{self.height}x{self.width}'
            )


class RewardNetwork(nn.Module):
    """Frames uint8 [B F H W 3] -> logits of the task's outputs, float32 [B K]."""

    cfg: Config

    @nn.compact
    def __call__(self, frames):
        cfg = self.cfg
        x = frames[:, -cfg.frames :].astype(jnp.float32) / 255 - 0.5
        x = reduce(x, 'b f (h p) (w q) c -> b h w f c', 'mean', p=cfg.shrink, q=cfg.shrink)
        grey = x.mean(axis=-1)
        # What moved, in units of the contrast: small beside the colours, but the speed is there.
        moved = grey[..., :-1] - grey[..., -1:]
        contrast = grey[..., -1:].std(axis=(1, 2), keepdims=True) + 0.02
        x = jnp.concatenate([4 * x[..., -1, :], moved / contrast], axis=-1)
        for width in cfg.widths:
            x = nn.gelu(nn.Conv(width, (3, 3), (2, 2))(x))
        x = nn.gelu(nn.Dense(cfg.hidden)(rearrange(x, 'b h w c -> b (h w c)')))
        return nn.Dense(len(TASKS[cfg.task].outputs))(x)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """`init(frames) -> state` and `step(state, frames) -> (state, reward, terminated)`, pure.

    Both take the frames of one step, uint8 [F H W 3], the newest last.

    Attributes:
      cfg: the network.
      params: its parameters.
    """

    cfg: Config
    params: dict[str, Any]

    @property
    def task(self) -> Task:
        """What it reads, and what follows."""
        return TASKS[self.cfg.task]

    def values(self, frames) -> jax.Array:
        """Outputs of the network in [0, 1]: frames uint8 [B F H W 3] -> float32 [B K]."""
        return nn.sigmoid(RewardNetwork(self.cfg).apply({'params': self.params}, frames))

    def init(self, frames) -> Any:
        """State at the start of an episode."""
        return self.task.init(self.values(frames[None])[0])

    def step(self, state: Any, frames) -> tuple[Any, jax.Array, jax.Array]:
        """-> (state, reward float32 [], terminated bool [])."""
        return self.task.step(state, self.values(frames[None])[0])

    def check(self, height: int, width: int, frames: int):
        """Checks that it reads the frames of a world.

        Args:
          height, width: of the world's frames in pixels.
          frames: pixel frames of a step.

        Raises:
          UsageError: it was trained on frames of another size, or on more frames.
        """
        cfg = self.cfg
        if (height, width) != (cfg.height, cfg.width) or frames < cfg.frames:
            raise UsageError(
                f'reward: got one for {cfg.frames} frames of {cfg.height}x{cfg.width}, expected '
                f'at most {frames} frames of {height}x{width}, as this world makes them'
            )

    def save(self, folder: str | Path):
        """Writes the network to `folder/reward`."""
        tensors = {
            name.replace('/', '.'): leaf for name, leaf in conversion.flatten(self.params).items()
        }
        config = {'_class_name': KIND, **dataclasses.asdict(self.cfg)}
        diffusers_layout.write_component(folder, FOLDER, config, tensors, dtype='float32')


def init(cfg: Config, seed: int) -> dict[str, Any]:
    """Initial parameters of the network, float32."""
    frames = jnp.zeros((1, cfg.frames, cfg.height, cfg.width, 3), jnp.uint8)
    return jax.jit(RewardNetwork(cfg).init)(jax.random.key(seed), frames)['params']


def load(weights: str | Path) -> RewardModel:
    """Opens the reward of a folder, a bundled name or a hub repository.

    Raises:
      CheckpointError: there is none, or its files describe another network.
    """
    folder = diffusers_layout.resolve(str(weights))
    config, tensors = diffusers_layout.read_component(folder, FOLDER)
    names = {field.name for field in dataclasses.fields(Config)}
    unknown = set(config) - names - {'_class_name'}
    try:
        if unknown or config.get('_class_name') != KIND:
            raise ValueError(f'got {", ".join(sorted(unknown)) or config.get("_class_name")}')
        lists = {name: tuple(one) for name, one in config.items() if isinstance(one, list)}
        given = {name: one for name, one in config.items() if name in names}
        cfg = Config(**given | lists)
    except (TypeError, ValueError) as error:
        raise diffusers_layout.CheckpointError(
            f'{folder}/{FOLDER}/config.json: {error}, expected a {KIND}'
        ) from error
    wanted = conversion.flatten(jax.eval_shape(partial(init, cfg), 0))
    shapes = {name.replace('/', '.'): leaf.shape for name, leaf in wanted.items()}
    found = {name: np.asarray(tensors[name], np.float32) for name in tensors}
    if {name: one.shape for name, one in found.items()} != shapes:
        raise diffusers_layout.CheckpointError(
            f'{folder}/{FOLDER}: its tensors do not fit its config.json'
        )
    flat = {name.replace('.', '/'): leaf for name, leaf in found.items()}
    return RewardModel(cfg, conversion.unflatten(flat))
