"""Trains a reward: a network that reads from frames what the recorder knew.

    loss = binary cross entropy of the outputs and the recorded values in [0, 1]

The frames are true ones with noise and brightness drawn anew, so that the network also reads those
of an autoencoder. The world only gives their size. Afterwards the network is measured on the
held-out clips, and its scores lie beside it in `reward.json`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from matrix_jax.data.loader import Clips, Loader
from matrix_jax.data.records import FRAMES_PER_LATENT
from matrix_jax.rewards import model, tasks
from matrix_jax.train.stage import Stage, example_batch
from matrix_jax.weights import diffusers_layout

SCORES = 'reward.json'


class LabelledFrames(Loader):
    """Batches with `frames` and `truth`, float32 [B K]: the task's outputs at the last frame.

    Args:
      task: key of `tasks.TASKS`.
      others: as of `loader.Loader`.
    """

    def __init__(self, task: str, *args, **settings):
        self.truth = tasks.TASKS[task].truth
        super().__init__(*args, **settings)

    def _example(self, numbered, rng):
        example = super()._example(numbered, rng)
        pose = example['pose'][-1] if 'pose' in example else None
        truth = self.truth(numbered[1].seed, example['telemetry'][-1], pose)
        return {'frames': example['frames'], 'truth': truth, 'clip': example['clip']}


@dataclasses.dataclass(frozen=True)
class Reward(Stage):
    """Trains a reward on recorded frames; no network of the world is read.

    Attributes:
      task: key of `rewards.tasks.TASKS`.
      frames: frames that the network reads.
      shrink: factor by which it reduces them.
      noise: largest deviation of the noise on frames, in steps of 8-bit colours.
      brightness: largest change of the brightness, as a share.
    """

    task: str = 'on_road'
    frames: int = 4
    shrink: int = 2
    noise: float = 4.0
    brightness: float = 0.1

    # A mirrored landmark belongs to a gallery that does not exist.
    mirrored: ClassVar[dict[str, float]] = {'on_road': 0.5, 'landmark': 0.0}

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(frames=(1, FRAMES_PER_LATENT), noise=(0, 255), brightness=(0, 0.9))
        model.Config(task=self.task, shrink=self.shrink)

    def network(self, world) -> model.Config:
        """The network for the frames of a world."""
        cfg = world.cfg
        return model.Config(self.task, cfg.height, cfg.width, self.frames, self.shrink)

    def start(self, world, params, seed, allow_non_finite=False):
        return {model.FOLDER: model.init(self.network(world), seed)}

    def loader(self, world, params, data, batch, seed, cache):
        share = self.mirrored[self.task]
        return LabelledFrames(self.task, data, 1 + FRAMES_PER_LATENT, batch, seed, mirror=share)

    def example(self, world, batch):
        shape = 1 + FRAMES_PER_LATENT, world.cfg.height, world.cfg.width, 3
        outputs = len(tasks.TASKS[self.task].outputs)
        return example_batch(batch, frames=('uint8', *shape), truth=('float32', outputs))

    def loss(self, world, params, batch, key):
        frames = batch['frames'][:, -self.frames :]
        shape = len(frames), 1, 1, 1, 1
        light, level, draw = jax.random.split(key, 3)
        light = 1 + self.brightness * jax.random.uniform(light, shape, minval=-1)
        noise = self.noise * jax.random.uniform(level, shape)
        frames = light * frames + noise * jax.random.normal(draw, (*frames.shape[:-1], 1))
        network = model.RewardNetwork(self.network(world))
        logits = network.apply({'params': params[model.FOLDER]}, jnp.clip(frames, 0, 255))
        loss = optax.sigmoid_binary_cross_entropy(logits, batch['truth']).mean()
        error = jnp.abs(jax.nn.sigmoid(logits) - batch['truth']).mean(axis=0)
        names = tasks.TASKS[self.task].outputs
        return loss, {f'{name}_error': one for name, one in zip(names, error, strict=True)}

    def save(self, world, params, folder, run):
        """Writes the network alone, and its scores on the held-out clips."""
        trained = model.RewardModel(self.network(world), params[model.FOLDER])
        trained.save(folder)
        clips = Clips(run.data, 'heldout', cache=False)
        found = scores(trained, ((clip, clip.frames) for clip in clips))
        print(f'held out: {json.dumps(found)}', file=sys.stderr)
        diffusers_layout.write_json(folder, SCORES, found)


def scores(reward: model.RewardModel, clips) -> dict[str, float]:
    """Scores of a reward on the steps of clips, see `tasks.Task.scores`.

    Args:
      reward: the reward.
      clips: (recording, frames) as of `steps`.
    """
    values = jax.jit(reward.values)
    pairs = [pair for clip, frames in clips for pair in steps(reward.task, clip, frames)]
    seen, truth = [], []
    for first in range(0, len(pairs), 64):
        some = pairs[first : first + 64]
        padded = some + some[-1:] * (64 - len(some))  # one compiled program for all
        seen.append(np.asarray(values(np.stack([frames for frames, _ in padded])))[: len(some)])
        truth += [one for _, one in some]
    return {'steps': len(pairs)} | reward.task.scores(np.concatenate(seen), np.stack(truth))


def steps(task: tasks.Task, clip, frames):
    """Yields (frames uint8 [4 H W 3], outputs [K]) of each latent frame after the first.

    Args:
      task: what to read.
      clip: the recording, for the truth.
      frames: its frames [F H W 3], or what an autoencoder made of them.
    """
    known = clip.knows('pose')
    for end in range(FRAMES_PER_LATENT, len(frames), FRAMES_PER_LATENT):
        truth = task.truth(clip.seed, clip.telemetry[end], clip.pose[end] if known else None)
        yield frames[end + 1 - FRAMES_PER_LATENT : end + 1], truth
