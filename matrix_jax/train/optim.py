"""Optimizers and learning-rate schedules.

AdamW (arXiv 1711.05101), or Muon (https://kellerjordan.github.io/posts/muon) for kernels with AdamW
for the other parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of an optimizer; AdamW is the published choice.

    Attributes:
      kind: 'adamw' or 'muon'.
      learning_rate: peak learning rate; with Muon, that of the kernels.
      adam_rate: peak learning rate of the parameters that Muon leaves to AdamW.
      schedule: 'constant', or 'cosine' down to `floor` times the peak at `Train.steps`.
      warmup: steps of linear increase.
      floor: see `schedule`.
      b1, b2, eps, weight_decay: as in optax.
      clip: largest global norm of the gradient.
    """

    kind: Literal['adamw', 'muon'] = 'adamw'
    learning_rate: float = 1e-5
    adam_rate: float = 1e-3
    schedule: Literal['constant', 'cosine'] = 'constant'
    warmup: int = 0
    floor: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-3
    clip: float = 1.0

    def __post_init__(self):
        for name in ('learning_rate', 'adam_rate', 'clip', 'eps'):
            value = getattr(self, name)
            if not 0 < value < float('inf'):
                raise ValueError(f'optimizer.{name}: got {value}, expected a number above 0')
        for name in ('b1', 'b2', 'floor'):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f'optimizer.{name}: got {value}, expected 0 <= {name} < 1')
        if self.warmup < 0:
            raise ValueError(f'optimizer.warmup: got {self.warmup}, expected at least 0')
        if not 0 <= self.weight_decay < float('inf'):
            raise ValueError(f'optimizer.weight_decay: got {self.weight_decay}, expected 0 or more')


def rate(cfg: Optimizer, peak: float, steps: int) -> optax.Schedule:
    """Learning-rate schedule with peak `peak` for a run of `steps`."""
    body = (
        optax.constant_schedule(peak)
        if cfg.schedule == 'constant'
        else optax.cosine_decay_schedule(peak, max(steps - cfg.warmup, 1), alpha=cfg.floor)
    )
    if not cfg.warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, cfg.warmup), body], [cfg.warmup])


def make(cfg: Optimizer, steps: int, axes: Mapping[str, tuple[str, ...]]):
    """Builds the optax transformation of a flat dict of leaves.

    Args:
      cfg: settings.
      steps: length of the run.
      axes: path -> axis letters of the leaf (`conversion.axes`, flattened); for Muon, a leading
        'layers' axis is a batch of matrices.
    """
    peak = rate(cfg, cfg.learning_rate, steps)
    if cfg.kind == 'adamw':
        body = optax.adamw(peak, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    else:

        def dimensions(params):
            # optax also calls this with a tree in which Adam's leaves are masked.
            return {
                path: _matrix(path, getattr(leaf, 'ndim', 0), axes.get(path, ()))
                for path, leaf in params.items()
            }

        body = muon(
            peak,
            beta=cfg.b2,
            weight_decay=cfg.weight_decay,
            adam_b1=cfg.b1,
            adam_b2=0.99,
            adam_learning_rate=rate(cfg, cfg.adam_rate, steps),
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip), body)


def by_turns(members: Mapping[str, optax.GradientTransformation], role):
    """One optimizer per role.

    An optimizer whose gradients are all zero keeps its state, so that its schedule and moments
    count only its own updates.

    Args:
      members: role -> optimizer.
      role: path -> role.
    """

    def skip_zero(inner):
        def update(updates, state, params=None):
            turn = optax.global_norm(updates) != 0
            updated = inner.update(updates, state, params)
            unchanged = jax.tree.map(jnp.zeros_like, updated[0]), state
            return jax.tree.map(lambda new, old: jnp.where(turn, new, old), updated, unchanged)

        return optax.GradientTransformation(inner.init, update)

    return optax.multi_transform(
        {name: skip_zero(inner) for name, inner in members.items()},
        lambda params: {path: role(path) for path in params},
    )


def _matrix(path: str, ndim: int, letters: tuple[str, ...]):
    """Kernels as matrices for Muon, all input axes against the last one; None means Adam."""
    start = 1 if letters[:1] == ('layers',) else 0
    if not path.endswith('kernel') or ndim - start < 2:
        return None
    return MuonDimensionNumbers(tuple(range(start, ndim - 1)), (ndim - 1,))
