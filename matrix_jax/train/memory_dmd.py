"""Self-forcing with memory: a stream learns from segments on a memory that it filled itself.

The state of a stream is built from a recorded clip at a random segment. From there the student
plays some segments as in play, in few solver steps: its own frames become history and refill the
memory bank, and the recorded actions move the camera. The last of these segments is scored by a
teacher and a critic (`distribution_matching`), which read the same history, memory, rays and
actions as the student. With a rollout of one segment, history and memory are recorded frames; this
is where the published training begins, too.

A segment ends at a random solver step, and only the prediction of this step has a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from matrix_jax.config import UsageError
from matrix_jax.diffusion import flow, unipc
from matrix_jax.stream import memory
from matrix_jax.train import memory_stage
from matrix_jax.train.distribution_matching import DistributionMatching, matching_loss
from matrix_jax.train.memory_stage import MemoryStage
from matrix_jax.weights import conversion


class Played(NamedTuple):
    """A segment that the student made.

    Attributes:
      segment: inputs of the network.
      null: the same without prompt, actions and memory.
      clean: frames that the segment starts with [B n H W C].
      latents: latents before each solver step [steps B n+T H W C].
    """

    segment: memory.Segment
    null: memory.Segment
    clean: jax.Array
    latents: jax.Array


@dataclasses.dataclass(frozen=True)
class MemorySelfForcing(DistributionMatching, MemoryStage):
    """Distribution matching on the student's own segments.

    Attributes:
      rollout: largest number of segments that the student plays, the scored one included.
      first_share: share of updates on segment 0, which has no memory.
      guidance: classifier-free guidance of the teacher against no prompt, actions and memory; 1 is
        none.
      random_exit: whether a segment ends at a random step; otherwise at the last one.
    """

    rollout: int = 4
    first_share: float = 0.1
    guidance: float = 1.0
    random_exit: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(rollout=(1, 1000), first_share=(0, 1), guidance=(1, None))
        if self.train_encoders:
            raise ValueError(
                'stage.train_encoders: got True, expected False: the student reads '
                'what its teacher reads'
            )

    def check_world(self, world):
        super().check_world(world)
        stream = world.cfg.stream
        if stream.guidance != 1:
            raise UsageError(
                f'stream.guidance: got {stream.guidance:g}, expected 1: the student learns the '
                'guidance of its teacher (stage.guidance)'
            )
        if self.last_segment(stream) < self.rollout:
            raise UsageError(
                f'stage.rollout: got {self.rollout}, expected at most the '
                f'{self.last_segment(stream)} segments of a clip after the first one'
            )

    def start(self, world, params, seed, allow_non_finite=False):
        params = super().start(world, params, seed, allow_non_finite)
        judges = params['transformer']
        if self.teacher:
            found = world.load(self.teacher, ('transformer',), allow_non_finite)
            judges = found['transformer']
        return {**params, 'teacher': judges, 'critic': judges}

    def axes(self, world):
        network = conversion.axes(world.tables['transformer'])
        return super().axes(world) | conversion.flatten({'teacher': network, 'critic': network})

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key, 3)
        clips = self.clips(world, params, batch)
        turn = jax.random.uniform(keys[0]) * self.ratio < 1
        branches = [
            lambda play=play: self._scored(world, params, clips, turn, keys[1], play)
            for play in (self._first, self._later)
        ]
        if self.first_share in (0, 1):
            loss = branches[not self.first_share]()
        else:
            first = jax.random.uniform(keys[2]) < self.first_share
            loss = jax.lax.cond(first, *branches)
        return loss, {'student': turn.astype(jnp.float32)}

    def finish(self, world, params, loader):
        """Drops teacher and critic."""
        return world, {
            name: part for name, part in params.items() if name not in ('teacher', 'critic')
        }

    # --- what the student makes ------------------------------------------------------------------

    def _first(self, world, params, clips, key) -> Played:
        """Segment 0."""
        stream, net = world.cfg.stream, world.network
        carry, control, _ = memory_stage.first_carry(stream, net, clips)
        noise = jax.random.normal(key, clips.latents[:, : stream.first].shape)
        _, _, trace = memory.first_segment(stream, net, params, carry, control, noise)
        return self._played(net, carry, trace, carry.history[:, -1:])

    def _later(self, world, params, clips, key) -> Played:
        """The last segment of a rollout of random length."""
        stream, net, keys = world.cfg.stream, world.network, jax.random.split(key, 4)
        count = jax.random.randint(keys[0], (), 1, self.rollout + 1)
        last = self.last_segment(stream) - count + 1
        begin = jax.random.randint(keys[1], (), 1, last + 1)
        carry, _, _ = memory_stage.later_carry(stream, clips, begin)
        shape = clips.latents[:, : stream.overlap + stream.new].shape

        def control(segment):
            at = stream.ratio * (memory.first_latent(stream, segment) + stream.overlap)
            return jax.lax.dynamic_slice_in_dim(clips.actions, at, stream.segment_actions, axis=1)

        def advance(index, carry):
            noise = jax.random.normal(jax.random.fold_in(keys[2], index), shape)
            given = control(begin + index)
            return memory.next_segment(stream, net, params, carry, given, noise)[0]

        carry = jax.lax.fori_loop(0, count - 1, advance, carry)
        given = control(begin + count - 1)
        noise = jax.random.normal(keys[3], shape)
        _, _, trace = memory.next_segment(stream, net, params, carry, given, noise)
        return self._played(net, carry, trace, carry.history)

    def _played(self, net, carry, trace, clean) -> Played:
        null = memory.without_conditions(net, carry, trace.segment)
        return Played(trace.segment, null, clean, trace.latents)

    # --- what is learned from it -----------------------------------------------------------------

    def _scored(self, world, params, clips, turn, key, play):
        """Loss of the student or the critic on a segment that `play` makes."""
        stream, keys = world.cfg.stream, jax.random.split(key, 3)
        # The rollout has no gradient, so no activations are kept.
        played = jax.lax.stop_gradient(play(world, jax.lax.stop_gradient(params), clips, keys[0]))
        table, last = unipc.step_table(stream.solver), stream.solver.steps - 1
        end = jax.random.randint(keys[1], (), 0, last + 1) if self.random_exit else last
        sigma = jnp.broadcast_to(jnp.asarray(table.sigma)[end], (len(played.clean), 1))
        noisy = played.latents[end][:, played.clean.shape[1] :]

        def made(params):
            v = memory_stage.denoise_new(
                world.network, params, played.segment, played.clean, noisy, sigma
            )
            return flow.x0_from_v(sigma, noisy, v)

        return jax.lax.cond(
            turn,
            lambda: self._student_loss(world, params, made(params), played, keys[2]),
            lambda: self._critic_loss(
                world, params, made(jax.lax.stop_gradient(params)), played, keys[2]
            ),
        )

    def _student_loss(self, world, params, made, played, key):
        """Distribution-matching loss of new frames [B T H W C]."""
        keys = jax.random.split(key)
        sigma = self.draw_sigmas(keys[0], len(made), world.cfg.stream.solver.shift)
        noisy = flow.add_noise(sigma, made, jax.random.normal(keys[1], made.shape))

        def clean(name, segment):
            v = memory_stage.denoise_new(
                world.network,
                {**params, 'transformer': params[name]},
                segment,
                played.clean,
                noisy,
                sigma,
            )
            return flow.x0_from_v(sigma, noisy, v)

        real, fake = (clean(name, played.segment) for name in ('teacher', 'critic'))
        if self.guidance != 1:
            unguided = clean('teacher', played.null)
            real = unguided + self.guidance * (real - unguided)
        return matching_loss(made, real, fake)

    def _critic_loss(self, world, params, made, played, key):
        """Flow-matching loss of the critic on new frames [B T H W C]."""
        keys = jax.random.split(key)
        sigma = self.draw_sigmas(keys[0], len(made), world.cfg.stream.solver.shift)
        noise = jax.random.normal(keys[1], made.shape)
        v = memory_stage.denoise_new(
            world.network,
            {**params, 'transformer': params['critic']},
            played.segment,
            played.clean,
            flow.add_noise(sigma, made, noise),
            sigma,
        )
        return jnp.square(v - flow.velocity(made, noise)).mean()
