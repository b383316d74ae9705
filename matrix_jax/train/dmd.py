"""Self-forcing with distribution matching: a stream learns from clips that it makes itself.

The student makes a clip on its own caches (Self-Forcing, arXiv 2506.08009), by the very `step` that
a player runs. Two networks that see clips whole say how it should change: the teacher knows the
distribution of recorded clips, the critic is trained on that of the student's. Both name the clean
clip x0 behind the student's clip x with noise on it, and x moves by their difference (DMD2, arXiv
2405.14867):

    student    1/2 (x - stop(x - d))^2,  d = (x0_critic - x0_teacher) / mean |x - x0_teacher|
    critic     flow matching on x

Nothing is compared with the recorded clip, of which pictures and actions are used. Of the calls on
a block, those up to a drawn one count, and the gradient goes through that one alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.diffusion import flow
from matrix_jax.stream import base as streams
from matrix_jax.stream import causal
from matrix_jax.train import optim
from matrix_jax.train.flow_matching import FlowMatching, flow_loss
from matrix_jax.train.optim import Optimizer
from matrix_jax.weights import conversion

TOWER = 'judges_image'  # what teacher and critic see a picture with, if it is not the student's


@dataclasses.dataclass(frozen=True)
class SelfForcing(FlowMatching):
    """Distribution matching on the student's own clips.

    Attributes:
      critic: optimizer of the critic.
      ratio: the student has one update in so many; all others are the critic's.
      teacher: weights folder of a network that sees clips whole, with the image tower that it was
        trained with, of the student's sizes; None = the weights that training starts from.
      action_guidance: how far the teacher goes from what it would make of a clip in which nothing
        is pressed to what it makes under the clip's actions; 1 is no further, as published.
      causal: whether teacher and critic see blocks and what came before them, as the student does.
      random_exit: draw the call whose clean estimate is the block; else it is the last one.
      lowest, highest: shares of noise at which teacher and critic are asked.
    """

    optimizer: Optimizer = Optimizer(learning_rate=2e-6, b1=0.0, b2=0.999, weight_decay=0.01)
    critic: Optimizer = Optimizer(learning_rate=4e-7, b1=0.0, b2=0.999, weight_decay=0.01)
    ema: float = 0.99
    ratio: int = 5
    teacher: str | None = None
    action_guidance: float = 1.0
    causal: bool = False
    random_exit: bool = True
    lowest: float = 0.02
    highest: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        if self.ratio < 1:
            raise ValueError(f'stage.ratio: got {self.ratio}, expected at least 1')
        if self.action_guidance < 1:
            raise ValueError(
                f'stage.action_guidance: got {self.action_guidance:g}, expected at least 1'
            )
        if not 0 < self.lowest < self.highest <= 1:
            raise ValueError(
                f'stage.lowest: got {self.lowest} to {self.highest}, expected a range within 0 to 1'
            )
        if self.train_encoders:
            raise ValueError(
                'stage.train_encoders: got True, expected False: the student reads '
                'what its teacher reads'
            )

    def start(self, world, params, seed):
        params = super().start(world, params, seed)
        judges, tower = params['transformer'], 'image_encoder'
        if self.teacher:
            only = ('transformer', *[tower] * world.has_part(self.teacher, tower))
            found = world.load(self.teacher, only=only)
            judges = found['transformer']
            if tower in found and not _equal(found[tower], params[tower]):
                params[TOWER] = found[tower]
        return {**params, 'teacher': judges, 'critic': judges}

    def axes(self, world):
        network, tower = (
            conversion.axes(world.tables[name]) for name in ('transformer', 'image_encoder')
        )
        return super().axes(world) | conversion.flatten(
            {'teacher': network, 'critic': network, TOWER: tower}
        )

    def trainable(self, path):
        return _role(path) in ('student', 'critic')

    def transform(self, axes, steps):
        # Each role's schedule ends with the run.
        turns = {'student': -(-steps // self.ratio), 'critic': steps}
        return optim.by_turns(
            {
                name: optim.make(settings, turns[name], axes)
                for name, settings in (('student', self.optimizer), ('critic', self.critic))
            },
            _role,
        )

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key, 3)
        turn = jax.random.uniform(keys[0]) * self.ratio < 1
        given = judged = self.given(world, params, batch)
        if TOWER in params:
            judged = self.given(world, {**params, 'image_encoder': params[TOWER]}, batch)

        def clip(params):
            return self.rollout(world, params, given, batch['actions'], keys[1])

        # In the critic's turn the clip has no gradient, and nothing of it is kept for one.
        loss = jax.lax.cond(
            turn,
            lambda: self.matching(world, params, clip(params), judged, batch['actions'], keys[2]),
            lambda: self.criticism(
                world,
                params,
                clip(jax.lax.stop_gradient(params)),
                judged,
                batch['actions'],
                keys[2],
            ),
        )
        return loss, {'student': turn.astype(jnp.float32)}

    def rollout(self, world, params, given, actions, key):
        """The student's clip [B T H W C] from pictures, under actions [B F A]."""
        stream, keys = world.cfg.stream, jax.random.split(key)
        table = causal.step_table(stream, world.cfg.flow)
        last = len(stream.steps) - 1
        end = jax.random.randint(keys[0], (), 0, last + 1) if self.random_exit else last
        made = world.latents(
            change=lambda net: truncated(net, jnp.asarray(table.level)[end]),
            table=ended(table, end),
        )
        carry = made.init(params, given, keys[1])
        carry, head = made.prefill(params, carry, actions[:, : stream.first_actions])
        self.blocks(world)  # a clip is whole blocks
        controls = rearrange(
            actions[:, stream.first_actions :], 'b (s f) a -> s b f a', f=stream.block_actions
        )
        _, tail = streams.rollout(made, params, carry, controls)
        return jnp.concatenate([head, streams.join(tail)], axis=1)

    def matching(self, world, params, clip, given, actions, key):
        """The student's loss on its clip."""
        keys = jax.random.split(key)
        given = self._told(world, given, clip)
        sigma = self._drawn(world, keys[0], clip)
        noisy = flow.add_noise(sigma, clip, jax.random.normal(keys[1], clip.shape))

        def clean(role, actions):
            v = world.denoise(
                {**params, 'transformer': params[role]},
                noisy,
                1000 * sigma,
                given,
                actions,
                self._block(world),
            )
            return flow.x0_from_v(sigma, noisy, v)

        real, fake = clean('teacher', actions), clean('critic', actions)
        if self.action_guidance != 1:
            words = world.vocabulary
            still = jnp.broadcast_to(words.encode([words.idle])[0], actions.shape)
            rest = clean('teacher', still)
            real = rest + self.action_guidance * (real - rest)
        real, fake = jax.lax.stop_gradient((real, fake))
        apart = jnp.abs(clip - real).mean(axis=(1, 2, 3, 4), keepdims=True)
        target = jax.lax.stop_gradient(clip - (fake - real) / jnp.maximum(apart, 1e-6))
        return 0.5 * jnp.square(clip - target).mean()

    def criticism(self, world, params, clip, given, actions, key):
        """The critic's loss on the student's clip."""
        keys = jax.random.split(key)
        given = self._told(world, given, clip)
        sigma = self._drawn(world, keys[0], clip)
        entry = flow.nearest(flow.table(world.cfg.flow), 1000 * sigma)
        return flow_loss(
            world,
            {**params, 'transformer': params['critic']},
            clip,
            given,
            actions,
            entry,
            keys[1],
            self._block(world),
        )

    def finish(self, world, params, loader):
        """Drops teacher and critic, and what they see with."""
        return world, {
            name: part for name, part in params.items() if name not in ('teacher', 'critic', TOWER)
        }

    def _drawn(self, world, key, clip):
        """Shares of noise [B T], one for a clip."""
        u = jax.random.uniform(key, (len(clip), 1))
        shift = world.cfg.flow.shift
        sigma = jnp.clip(shift * u / (1 + (shift - 1) * u), self.lowest, self.highest)
        return jnp.broadcast_to(sigma, clip.shape[:2])

    def _told(self, world, given, clip):
        return self.told(world, given, jax.lax.stop_gradient(clip)) if self.causal else given

    def _block(self, world):
        return world.cfg.stream.frames if self.causal else None


def truncated(net: causal.Network, level) -> causal.Network:
    """The same network, with a gradient through the call at one level, and of its answer alone:
    not through what it is given, nor through what the caches keep."""

    def denoise(params, caches, x, levels, cond, actions):
        caches, x, cond = jax.lax.stop_gradient((caches, x, cond))

        def call(params):
            v, kept = net.denoise(params, caches, x, levels, cond, actions)
            return v, jax.lax.stop_gradient(kept)

        # Where the branch has no gradient, nothing is computed backwards.
        return jax.lax.cond(
            levels.reshape(-1)[0] == level,
            call,
            lambda params: call(jax.lax.stop_gradient(params)),
            params,
        )

    return net._replace(denoise=denoise)


def ended(table: causal.StepTable, end) -> causal.StepTable:
    """The calls of a block whose clean estimate of call `end` is the block: all behind it read the
    clean block, as the last one does, and change nothing."""
    call = jnp.arange(len(table.level))
    return causal.StepTable(
        jnp.where(call <= end, table.level, table.level[-1]),
        jnp.where(call <= end, table.sigma, 0.0),
        jnp.where(call < end, table.following, 0.0),
    )


def _equal(some, others) -> bool:
    """Whether two trees hold the same numbers; shapes alone do not."""
    return all(
        not isinstance(b, jax.ShapeDtypeStruct) and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    )


def _role(path: str) -> str:
    """Who a leaf belongs to."""
    component = path.split('/')[0]
    return {'transformer': 'student', 'critic': 'critic'}.get(component, 'frozen')
