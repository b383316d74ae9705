"""Distribution matching distillation (DMD2, arXiv 2405.14867): what its stages share.

Two networks score what a student makes, x. The teacher models the distribution of recordings, the
critic, trained alongside, that of the student. Both predict the clean x0 from x with noise added:

    student    1/2 |x - stop(x - d)|^2,   d = (x0_critic - x0_teacher) / mean |x - x0_teacher|
    critic     flow matching on x
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from matrix_jax.train import optim
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.stage import Stage


@dataclasses.dataclass(frozen=True)
class DistributionMatching(Stage):
    """Base of stages with a student, a critic and a teacher.

    Attributes:
      critic: optimizer of the critic.
      ratio: one update in `ratio` trains the student; the others train the critic.
      teacher: weights folder of the teacher, of the student's sizes; None = the start weights of
        the run.
      lowest, highest: range of sigma at which teacher and critic see what the student makes.
    """

    optimizer: Optimizer = Optimizer(learning_rate=2e-6, b1=0.0, b2=0.999, weight_decay=0.01)
    critic: Optimizer = Optimizer(learning_rate=4e-7, b1=0.0, b2=0.999, weight_decay=0.01)
    ema: float = 0.99
    ratio: int = 5
    teacher: str | None = None
    lowest: float = 0.02
    highest: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(ratio=(1, None))
        if not 0 < self.lowest < self.highest <= 1:
            raise ValueError(
                f'stage.lowest: got {self.lowest} to {self.highest}, expected a range within 0 to 1'
            )

    def trainable(self, path):
        return role(path) in ('student', 'critic')

    def transform(self, axes, steps):
        # Each role's schedule ends with the run.
        turns = {'student': -(-steps // self.ratio), 'critic': steps}
        return optim.by_turns(
            {
                name: optim.make(settings, turns[name], axes)
                for name, settings in (('student', self.optimizer), ('critic', self.critic))
            },
            role,
        )

    def draw_sigmas(self, key, batch: int, shift: float):
        """Random sigmas [B 1], shifted towards noise."""
        u = jax.random.uniform(key, (batch, 1))
        return jnp.clip(shift * u / (1 + (shift - 1) * u), self.lowest, self.highest)


def matching_loss(made, real, fake):
    """The student's loss; its gradient moves `made` from `fake` to `real`.

    Args:
      made: what the student made [B ...].
      real: clean estimate of the teacher [B ...].
      fake: clean estimate of the critic [B ...].
    """
    real, fake = jax.lax.stop_gradient((real, fake))
    scale = jnp.abs(made - real).mean(axis=tuple(range(1, made.ndim)), keepdims=True)
    target = jax.lax.stop_gradient(made - (fake - real) / jnp.maximum(scale, 1e-6))
    return 0.5 * jnp.square(made - target).mean()


def role(path: str) -> str:
    """Role of the leaf 'component/path': 'student', 'critic' or 'frozen'."""
    component = path.split('/')[0]
    return {'transformer': 'student', 'critic': 'critic'}.get(component, 'frozen')
