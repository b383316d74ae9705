"""Obedience: an inverse-dynamics probe that reads turn rate and speed from frames.

The probe trains on recorded clips with their telemetry and then judges generated ones. A turn rate
changes its sign under a mirror and a speed does not. The probe has exactly these symmetries, which
halves the data it needs and rules out a bias to one side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange, reduce
from flax import serialization

from matrix_jax.controls.driving import FRAMES_PER_CONTROL, SYMBOLS
from matrix_jax.data.records import TELEMETRY

# Left is positive, as in the telemetry.
STEER = np.array([('L' in symbol) - ('R' in symbol) for symbol in SYMBOLS])
MOTION = tuple(TELEMETRY.index(name) for name in ('yaw_rate', 'speed'))
SIDES = {1: 'left', 0: 'straight', -1: 'right'}


@dataclasses.dataclass(frozen=True)
class Config:
    """The probe and its training.

    Attributes:
      frames: grey frames of a window; the probe judges the last `FRAMES_PER_CONTROL`.
      shrink: factor by which frames are reduced.
      widths: channels of the convolutions, each of stride 2.
      hidden: units of the hidden layer.
      scale: unit of each output; here rad/s and units/s.
      parity: sign of each output under a mirror, 1 or -1.
      steps, batch, learning_rate, seed: settings of the training.
    """

    frames: int = 9
    shrink: int = 2
    widths: tuple[int, ...] = (24, 48, 64)
    hidden: int = 64
    scale: tuple[float, float] = (1.5, 30.0)
    steps: int = 1200
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    parity: ClassVar[tuple[int, ...]] = (-1, 1)


class Probe(nn.Module):
    """Grey windows [B H W F] in [0, 1] -> outputs such as (turn rate, speed) [B 2], in units of
    `cfg.scale`."""

    cfg: Config

    def setup(self):
        self.convs = [nn.Conv(width, (3, 3), (2, 2)) for width in self.cfg.widths]
        self.hidden = nn.Dense(self.cfg.hidden)
        self.out = nn.Dense(len(self.cfg.scale))

    def __call__(self, x):
        both = self.out(self.features(jnp.concatenate([x, x[:, :, ::-1]])))
        plain, mirrored = jnp.split(both, 2)
        return (plain + mirrored * jnp.array(self.cfg.parity)) / 2

    def features(self, x):
        """Hidden layer [B hidden] of windows [B H W F]."""
        x = x - x.mean((1, 2, 3), keepdims=True)
        x = x / (x.std((1, 2, 3), keepdims=True) + 0.02)
        for conv in self.convs:
            x = nn.gelu(conv(x))
        return nn.gelu(self.hidden(x.reshape(len(x), -1)))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Windows of grey clips.

    Attributes:
      grey: frames of all clips, uint8 [N h w].
      ends: index in `grey` of the last frame of each window, int [M].
      controls: control of the last latent frame of each window, [M ...].
      truth: targets of the probe over that latent frame, float32 [M 2], here mean turn rate and
        speed; NaN if unknown.
    """

    grey: np.ndarray
    ends: np.ndarray
    controls: np.ndarray
    truth: np.ndarray


def shrink(frames, factor: int) -> np.ndarray:
    """Frames uint8 [F H W 3] -> grey uint8 [F h w], averaged over `factor` x `factor` pixels."""
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = reduce(grey, 'f (h a) (w b) -> f h w', 'mean', a=factor, b=factor)
    return np.round(grey).astype(np.uint8)


def examples(
    cfg: Config, clips: Iterable, skip: int = 0, columns: Sequence[int] = MOTION
) -> Examples:
    """Windows that end at each latent frame of the clips, as far as they have `cfg.frames` frames.

    Args:
      cfg: the probe.
      clips: (frames uint8 [F H W 3], controls [T ...] or [F ...], telemetry [F 6] or None) each,
        F = 1 + 4 (T-1).
      skip: latent frames at the start of each clip that are not judged.
      columns: columns of the telemetry that the probe reads.

    Raises:
      ValueError: a clip has too few frames for its controls.
    """
    per = FRAMES_PER_CONTROL
    grey, ends, keys, truth, start = [], [], [], [], 0
    for frames, controls, telemetry in clips:
        controls = controls[::per] if len(controls) == len(frames) else controls
        first = max(-(-(cfg.frames - 1) // per), skip, 1)
        last = per * np.arange(first, len(controls))
        if len(frames) < 1 + per * (len(controls) - 1):
            raise ValueError(
                f'examples: got {len(frames)} frames for {len(controls)} controls, '
                f'expected {1 + per * (len(controls) - 1)}'
            )
        grey.append(shrink(frames, cfg.shrink))
        ends.append(start + last)
        keys.append(controls[first:])
        if telemetry is None:
            truth.append(np.full((len(last), len(columns)), np.nan, np.float32))
        else:
            window = telemetry[last[:, None] - np.arange(per)][..., list(columns)]
            truth.append(window.mean(axis=1).astype(np.float32))
        start += len(frames)
    return Examples(*map(np.concatenate, (grey, ends, keys, truth)))


def windows(cfg: Config, data: Examples, index) -> np.ndarray:
    """Windows `index` [B] of the examples, float32 [B h w F] in [0, 1]."""
    frames = data.grey[data.ends[index][:, None] + np.arange(1 - cfg.frames, 1)]
    return rearrange(frames, 'b f h w -> b h w f').astype(np.float32) / 255


def sample(data: Examples, count: int, seed: int = 0) -> Examples:
    """At most `count` random windows."""
    some = np.random.default_rng(seed).permutation(len(data.ends))[:count]
    return Examples(data.grey, data.ends[some], data.controls[some], data.truth[some])


def train(cfg: Config, data: Examples, progress: Callable = lambda steps: steps) -> dict:
    """Trains the probe on examples with known truth -> parameters.

    Args:
      progress: wraps the range of steps, such as `tqdm`.
    """
    net, rng = Probe(cfg), np.random.default_rng(cfg.seed)
    rate = optax.cosine_decay_schedule(cfg.learning_rate, cfg.steps)
    optimizer = optax.adamw(rate, weight_decay=1e-3)
    first = windows(cfg, data, np.arange(1))
    params = jax.jit(net.init)(jax.random.key(cfg.seed), first)['params']

    @jax.jit
    def step(params, state, x, target):
        def loss(params):
            found = net.apply({'params': params}, x)
            return optax.huber_loss(found, target, delta=0.3).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in progress(range(cfg.steps)):
        index = rng.integers(len(data.ends), size=cfg.batch)
        target = data.truth[index] / np.array(cfg.scale, np.float32)
        params, state, _ = step(params, state, windows(cfg, data, index), target)
    return params


def read(cfg: Config, params, data: Examples, batch: int = 256) -> np.ndarray:
    """Outputs of the probe float32 [M 2]: turn rate (left positive) and speed."""
    return _each(_outputs, cfg, params, data, batch) * np.array(cfg.scale, np.float32)


def features(cfg: Config, params, data: Examples, batch: int = 256) -> np.ndarray:
    """Features of the probe float32 [M hidden]."""
    return _each(_features, cfg, params, data, batch)


def _each(apply: Callable, cfg: Config, params, data: Examples, batch: int) -> np.ndarray:
    count, found = len(data.ends), []
    for start in range(0, count, batch):
        # The last batch is padded, so that one compilation serves all.
        index = np.minimum(np.arange(start, start + batch), count - 1)
        found.append(np.asarray(apply(cfg, params, windows(cfg, data, index))))
    return np.concatenate(found)[:count]


@partial(jax.jit, static_argnums=0)
def _outputs(cfg: Config, params, x):
    return Probe(cfg).apply({'params': params}, x)


@partial(jax.jit, static_argnums=0)
def _features(cfg: Config, params, x):
    return Probe(cfg).apply({'params': params}, x, method='features')


def threshold(turn, side) -> float:
    """Turn rate that separates held steering keys from none with the best balanced accuracy.

    Args:
      turn: turn rates read by the probe, float [M].
      side: sides that the controls ask for, int [M] of 1, 0 or -1, such as `STEER[controls]`.
    """
    return max(np.linspace(0.1, 1.2, 23), key=lambda t: balanced(steers(turn, t), side))


def steers(turn, limit: float) -> np.ndarray:
    """Turn rates [M] -> sides int [M]: 1 left, 0 none, -1 right."""
    return np.where(np.abs(turn) < limit, 0, np.sign(turn)).astype(int)


def balanced(found, side) -> float:
    """Balanced accuracy: mean recall over left, none and right."""
    return float(np.mean([np.mean(found[side == one] == one) for one in np.unique(side)]))


def shuffled(found, side, seed: int = 0) -> float:
    """Balanced accuracy against controls in random order: the score of chance."""
    rng = np.random.default_rng(seed)
    return float(np.mean([balanced(found, rng.permutation(side)) for _ in range(20)]))


def score(turn, side, limit: float, names: dict[int, str] = SIDES) -> dict[str, float]:
    """Obedience of turn rates [M] to the sides [M] that controls ask for, and the floor.

    Args:
      turn, side, limit: see `threshold`.
      names: names of the sides in the result.
    """
    found = steers(turn, limit)
    sides = {names[one]: float(np.mean(found[side == one] == one)) for one in np.unique(side)}
    return {
        'accuracy': float(np.mean(found == side)),
        'balanced': balanced(found, side),
        'shuffled': shuffled(found, side),
        **sides,
    }


def gain(turn, reference, side) -> dict[str, float]:
    """Compares turn rates with a reference under the same controls.

    Args:
      turn, reference: turn rates float [M].
      side: sides that the controls ask for, int [M].

    Returns:
      gain: mean turn to the side of a held key over that of the reference.
      bias: mean turn without a steering key minus that of the reference (left positive, rad/s).
    """
    held, free = side != 0, side == 0
    result = {}
    if held.any():
        result['gain'] = float(np.mean((turn * side)[held]) / np.mean((reference * side)[held]))
    if free.any():
        result['bias'] = float(np.mean(turn[free]) - np.mean(reference[free]))
    return result


def save(path, cfg: Config, params, limit):
    """Writes a trained probe to one file; `limit` is a threshold or a list of thresholds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        'config': repr(cfg),
        'threshold': np.asarray(limit, float).tolist(),
        'params': jax.tree.map(np.asarray, params),
    }
    part = path.with_suffix('.part')
    part.write_bytes(serialization.msgpack_serialize(state))
    part.replace(path)


def load(path, cfg: Config):
    """(params, threshold) of a saved probe; None if there is none with this config."""
    path = Path(path)
    if not path.is_file():
        return None
    state = serialization.msgpack_restore(path.read_bytes())
    if state['config'] != repr(cfg):
        return None
    return state['params'], state['threshold']


def trained(path, cfg: Config, train: Callable):
    """(params, threshold) of the probe saved at `path`; `train()` makes them if there is none."""
    found = load(path, cfg)
    if found is None:
        found = train()
        save(path, cfg, *found)
    return found
