"""Flow matching on segments with history and retrieved memory (Matrix-Game 3.0).

    x = (1 - sigma) x0 + sigma eps;   v = eps - x0;   loss = |v_net - v|^2 of the new frames

A random segment of recorded clips is denoised. History and memory have level 0.

The authors did not publish their training code. Their report says that a stream is robust to its
own errors if it trains on them: an error buffer keeps residuals

    r = x0_net - x0 = -sigma (v_net - v)

of the network's own predictions, one per latent frame, and replaces the oldest ones. Some of them
are added to history and memory frames; the target stays clean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.diffusion import flow
from matrix_jax.stream import memory
from matrix_jax.train.memory_stage import (
    MemoryClips,
    MemoryStage,
    denoise_new,
    first_carry,
    later_carry,
    new_frames,
)
from matrix_jax.train.stage import latent_size
from matrix_jax.train.state import BUFFERS

ERRORS = 'errors'  # the error buffer among the parameters


@dataclasses.dataclass(frozen=True)
class MemoryFlow(MemoryStage):
    """Trains the network on recorded clips.

    Attributes:
      first_share: share of updates on segment 0, which has no memory.
      null_share: share of updates without memory, actions and prompt, for guidance.
      shift: shift of the drawn sigmas towards noise; None = that of the stream's solver.
      error_frames: residuals in the error buffer, one latent frame each; 0 = no buffer.
      error_sigma: largest sigma of predictions whose residuals are kept.
      history_errors: share of examples whose history gets residuals.
      memory_errors: share of memory frames that get a residual.
      error_scale: residuals are multiplied by a random number up to this.
    """

    first_share: float = 0.1
    null_share: float = 0.0
    shift: float | None = None
    error_frames: int = 512
    error_sigma: float = 0.9
    history_errors: float = 0.5
    memory_errors: float = 0.5
    error_scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        shares = ('first_share', 'null_share', 'history_errors', 'memory_errors', 'error_sigma')
        self.check_fields(
            **dict.fromkeys(shares, (0, 1)), error_frames=(0, None), error_scale=(0, 10)
        )
        if self.first_share + self.null_share > 1:
            raise ValueError(
                f'stage.first_share: got {self.first_share} with null_share {self.null_share}, '
                'expected a sum of at most 1'
            )
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f'stage.shift: got {self.shift}, expected more than 0')

    def start(self, world, params, seed, allow_non_finite=False):
        params = super().start(world, params, seed, allow_non_finite)
        if self.error_frames:
            params[ERRORS] = empty_errors(
                self.error_frames, (*latent_size(world.cfg), world.cfg.dit.channels)
            )
        return params

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key, 3)
        clips = self.clips(world, params, batch)
        shares = {
            self._first: self.first_share,
            self._null: self.null_share,
            self._later: 1 - self.first_share - self.null_share,
        }
        shares = {branch: share for branch, share in shares.items() if share > 0}
        number = jax.random.randint(keys[0], (), 1, self.last_segment(world.cfg.stream) + 1)

        def run(branch):
            return lambda: branch(world, params, clips, number, keys[2])

        # The kinds of segments have different numbers of frames, so an update has one kind.
        drawn = jax.random.choice(keys[1], len(shares), p=jnp.array(list(shares.values())))
        branches = [run(branch) for branch in shares]
        loss, errors = jax.lax.switch(drawn, branches) if len(shares) > 1 else branches[0]()
        metrics: dict[str, Any] = {'segment': number.astype(jnp.float32)}
        if errors:
            metrics[BUFFERS] = {f'{ERRORS}/{name}': leaf for name, leaf in errors.items()}
            metrics['error'] = jnp.sqrt(jnp.square(errors['frames']).mean())
        return loss, metrics

    def finish(self, world, params, loader):
        """Drops the error buffer."""
        return world, {name: part for name, part in params.items() if name != ERRORS}

    def _first(self, world, params, clips: MemoryClips, number, key):
        """(loss, error buffer) of segment 0; some examples have neither actions nor prompt."""
        stream, net = world.cfg.stream, world.network
        carry, control, poses = first_carry(stream, net, clips)
        prepared = memory.prepare_first(stream, net, carry, control, poses)
        null = memory.without_conditions(net, carry, prepared.segment)
        keys = jax.random.split(key)
        dropped = jax.random.uniform(keys[0], (len(control), 1, 1)) < self.null_share
        segment = dataclasses.replace(
            prepared.segment,
            text=jnp.where(dropped, null.text, prepared.segment.text),
            actions=jnp.where(dropped, null.actions, prepared.segment.actions),
        )
        target = clips.latents[:, 1 : stream.first]
        loss, _ = self._flow(world, params, segment, prepared.clean, target, keys[1])
        return loss, params.get(ERRORS)

    def _null(self, world, params, clips: MemoryClips, number, key):
        """(loss, error buffer) of a later segment without conditions."""
        carry, control, poses = later_carry(world.cfg.stream, clips, number)
        prepared = memory.prepare_next(world.cfg.stream, world.network, carry, control, poses)
        segment = memory.without_conditions(world.network, carry, prepared.segment)
        target = new_frames(world.cfg.stream, clips, number)
        loss, _ = self._flow(world, params, segment, prepared.clean, target, key)
        return loss, params.get(ERRORS)

    def _later(self, world, params, clips: MemoryClips, number, key):
        """(loss, error buffer with new residuals) of a later segment."""
        keys = jax.random.split(key)
        carry, control, poses = later_carry(world.cfg.stream, clips, number)
        prepared = memory.prepare_next(world.cfg.stream, world.network, carry, control, poses)
        segment, clean, errors = prepared.segment, prepared.clean, params.get(ERRORS)
        if errors:
            segment, clean = self.with_errors(segment, clean, errors, keys[0])
        target = new_frames(world.cfg.stream, clips, number)
        loss, (sigma, residual) = self._flow(world, params, segment, clean, target, keys[1])
        if errors:
            errors = keep_errors(errors, residual, sigma[:, 0] <= self.error_sigma)
        return loss, errors

    def with_errors(self, segment: memory.Segment, clean, errors, key):
        """Adds residuals to memory frames and to the history [B n H W C]."""
        keys = jax.random.split(key, 6)
        batch, history = clean.shape[:2]

        def drawn(keys, shape, share, count):
            """Residuals [*shape count H W C] of neighbours in the buffer, some of them 0."""
            first = jax.random.randint(keys[0], (*shape, 1), 0, self.error_frames)
            scale = self.error_scale * jax.random.uniform(keys[1], (*shape, 1))
            scale = jnp.where(jax.random.uniform(keys[2], scale.shape) < share, scale, 0.0)
            places = (first + np.arange(count)) % self.error_frames
            return scale[..., None, None, None] * errors['frames'][places]

        clean = clean + drawn(keys[:3], (batch,), self.history_errors, history)
        shape = segment.memory.shape[:2]
        added = drawn(keys[3:], shape, self.memory_errors, 1)[:, :, 0]
        return dataclasses.replace(segment, memory=segment.memory + added), clean

    def _flow(self, world, params, segment: memory.Segment, clean, target, key):
        """(loss, (sigma [B 1], residuals [B T H W C])) of new frames behind clean ones."""
        keys = jax.random.split(key)
        shift = world.cfg.stream.solver.shift if self.shift is None else self.shift
        u = jax.random.uniform(keys[0], (len(target), 1))
        sigma = shift * u / (1 + (shift - 1) * u)
        noise = jax.random.normal(keys[1], target.shape)
        v = denoise_new(
            world.network, params, segment, clean, flow.add_noise(sigma, target, noise), sigma
        )
        error = v - flow.velocity(target, noise)
        residual = jax.lax.stop_gradient(-sigma[..., None, None, None] * error)
        return jnp.square(error).mean(), (sigma, residual)


# --- the error buffer ----------------------------------------------------------------------------


def empty_errors(count: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Error buffer for `count` latent frames of a shape (H, W, C): no errors yet."""
    return {'frames': np.zeros((count, *shape), np.float32), 'next': np.int32(0)}


def keep_errors(errors: dict, residuals, chosen) -> dict:
    """The buffer with residuals [B T H W C] of the chosen examples, bool [B], for its oldest ones.

    Places of examples that are not chosen keep what they have.
    """
    frames = jnp.asarray(errors['frames'])
    chosen = jnp.repeat(chosen, residuals.shape[1])[: len(frames)]
    residuals = rearrange(residuals, 'b t h w c -> (b t) h w c')[: len(frames)]
    places = (errors['next'] + np.arange(len(residuals))) % len(frames)
    kept = jnp.where(chosen[:, None, None, None], residuals, frames[places])
    following = (errors['next'] + len(residuals)) % len(frames)
    return {'frames': frames.at[places].set(kept), 'next': following}
