"""Self-forcing with distribution matching: a stream learns from clips that it makes itself.

The student makes a clip x on its own caches (Self-Forcing, arXiv 2506.08009) with the same `step`
that a player runs. Teacher and critic score it (`distribution_matching`).

Recorded clips provide only pictures and actions. A block ends at a random one of its calls, and
only that call has a gradient.
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
from matrix_jax.train.distribution_matching import DistributionMatching, matching_loss
from matrix_jax.train.flow_matching import FlowMatching, flow_loss
from matrix_jax.weights import conversion

TOWER = 'judges_image'  # image encoder of teacher and critic, if it is not the student's


@dataclasses.dataclass(frozen=True)
class SelfForcing(DistributionMatching, FlowMatching):
    """Distribution matching on the student's own clips.

    Attributes:
      action_guidance: classifier-free guidance of the teacher against idle actions; 1 (published)
        is none.
      causal: whether teacher and critic are block-causal, as the student is.
      random_exit: whether a block ends at a random call; otherwise at the last one.

    The folder of `teacher` may hold an image encoder of its own.
    """

    action_guidance: float = 1.0
    causal: bool = False
    random_exit: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(action_guidance=(1, None))
        if self.train_encoders:
            raise ValueError(
                'stage.train_encoders: got True, expected False: the student reads '
                'what its teacher reads'
            )

    def start(self, world, params, seed, allow_non_finite=False):
        params = super().start(world, params, seed, allow_non_finite)
        judges, tower = params['transformer'], 'image_encoder'
        if self.teacher:
            only = ('transformer', *[tower] * world.has_part(self.teacher, tower))
            found = world.load(self.teacher, only, allow_non_finite)
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

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key, 3)
        turn = jax.random.uniform(keys[0]) * self.ratio < 1
        cond = judges = self.condition(world, params, batch)
        if TOWER in params:
            judges = self.condition(world, {**params, 'image_encoder': params[TOWER]}, batch)

        def clip(params):
            return self.rollout(world, params, cond, batch['actions'], keys[1])

        # In the critic's turn the clip needs no gradient, so no activations are kept.
        loss = jax.lax.cond(
            turn,
            lambda: self.student_loss(
                world, params, clip(params), judges, batch['actions'], keys[2]
            ),
            lambda: self.critic_loss(
                world,
                params,
                clip(jax.lax.stop_gradient(params)),
                judges,
                batch['actions'],
                keys[2],
            ),
        )
        return loss, {'student': turn.astype(jnp.float32)}

    def rollout(self, world, params, cond, actions, key):
        """Clip [B T H W C] that the student makes from a condition under actions [B F A]."""
        stream, keys = world.cfg.stream, jax.random.split(key)
        table = causal.step_table(stream, world.cfg.flow)
        last = len(stream.steps) - 1
        end = jax.random.randint(keys[0], (), 0, last + 1) if self.random_exit else last
        made = world.latents(
            change=lambda net: truncated(net, jnp.asarray(table.level)[end]),
            table=ended(table, end),
        )
        carry = made.init(params, cond, keys[1])
        carry, head = made.prefill(params, carry, actions[:, : stream.first_actions])
        self.blocks(world)  # raises unless the clip is whole blocks
        controls = rearrange(
            actions[:, stream.first_actions :], 'b (s f) a -> s b f a', f=stream.block_actions
        )
        _, tail = streams.rollout(made, params, carry, controls)
        return jnp.concatenate([head, streams.join(tail)], axis=1)

    def student_loss(self, world, params, clip, cond, actions, key):
        """Distribution-matching loss of the student's clip [B T H W C]."""
        keys = jax.random.split(key)
        cond = self._judges_condition(world, cond, clip)
        sigma = self._drawn(world, keys[0], clip)
        noisy = flow.add_noise(sigma, clip, jax.random.normal(keys[1], clip.shape))

        def clean(role, actions):
            v = world.denoise(
                {**params, 'transformer': params[role]},
                noisy,
                1000 * sigma,
                cond,
                actions,
                self._block(world),
            )
            return flow.x0_from_v(sigma, noisy, v)

        real, fake = clean('teacher', actions), clean('critic', actions)
        if self.action_guidance != 1:
            vocabulary = world.vocabulary
            idle = jnp.broadcast_to(vocabulary.encode([vocabulary.idle])[0], actions.shape)
            unguided = clean('teacher', idle)
            real = unguided + self.action_guidance * (real - unguided)
        return matching_loss(clip, real, fake)

    def critic_loss(self, world, params, clip, cond, actions, key):
        """Flow-matching loss of the critic on the student's clip [B T H W C]."""
        keys = jax.random.split(key)
        cond = self._judges_condition(world, cond, clip)
        sigma = self._drawn(world, keys[0], clip)
        entry = flow.nearest(flow.table(world.cfg.flow), 1000 * sigma)
        return flow_loss(
            world,
            {**params, 'transformer': params['critic']},
            clip,
            cond,
            actions,
            entry,
            keys[1],
            self._block(world),
        )

    def finish(self, world, params, loader):
        """Drops teacher and critic, and their image encoder."""
        return world, {
            name: part for name, part in params.items() if name not in ('teacher', 'critic', TOWER)
        }

    def _drawn(self, world, key, clip):
        """Random sigmas [B T], one per clip."""
        sigma = self.draw_sigmas(key, len(clip), world.cfg.flow.shift)
        return jnp.broadcast_to(sigma, clip.shape[:2])

    def _judges_condition(self, world, cond, clip):
        if not self.causal:
            return cond
        return self.block_condition(world, cond, jax.lax.stop_gradient(clip))

    def _block(self, world):
        return world.cfg.stream.frames if self.causal else None


def truncated(net: causal.CachedNetwork, level) -> causal.CachedNetwork:
    """The same network with a gradient only through the call at one level.

    The gradient reaches the parameters through the prediction; inputs, conditions and caches have
    none.
    """

    def denoise(params, caches, x, levels, cond, actions):
        caches, x, cond = jax.lax.stop_gradient((caches, x, cond))

        def call(params):
            v, kept = net.denoise(params, caches, x, levels, cond, actions)
            return v, jax.lax.stop_gradient(kept)

        # A branch without a gradient costs no backward pass.
        return jax.lax.cond(
            levels.reshape(-1)[0] == level,
            call,
            lambda params: call(jax.lax.stop_gradient(params)),
            params,
        )

    return net._replace(denoise=denoise)


def ended(table: causal.StepTable, end) -> causal.StepTable:
    """Table of a block that ends at call `end`.

    Later calls read the clean block and change nothing, as the last call of any table does.
    """
    call = jnp.arange(len(table.level))
    return causal.StepTable(
        jnp.where(call <= end, table.level, table.level[-1]),
        jnp.where(call <= end, table.sigma, 0.0),
        jnp.where(call < end, table.following, 0.0),
    )


def _equal(some, others) -> bool:
    """Whether two trees of arrays are equal; False for ShapeDtypeStructs."""
    return all(
        not isinstance(b, jax.ShapeDtypeStruct) and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    )
