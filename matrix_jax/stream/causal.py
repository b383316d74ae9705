"""Block autoregression on caches: a few steps from noise to a clean block, then the next block.

Matrix-Game 2.0, after Self-Forcing (arXiv 2506.08009). A network with caches denoises `frames`
latent frames at a time. Its last call on each block is told that the block is clean, so that what
the caches keep of it is clean as well; every call of a block writes the same cache slots.

Actions are per pixel frame. With R = 4 pixel frames to a latent frame and blocks of n = 3, block 0
is 1 + R(n-1) = 9 of them and every other block R*n = 12. The network is given those of the block
and of the `window` latent frames before it; before frame 0 everything was as at frame 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from matrix_jax.diffusion import flow
from matrix_jax.stream.base import Stream, fold, normal, player_keys


@dataclasses.dataclass(frozen=True)
class Config:
    """Geometry and sampler; the defaults are Matrix-Game 2.0 universal.

    Attributes:
      frames: latent frames of a block.
      steps: denoising steps of a block before the shift of the schedule moves them, descending.
      context_level: noise level that the network is told when it reads a clean block.
      window: latent frames before a block whose actions the block is given.
      ratio: pixel frames of a latent frame.
      condition_on_last_frame: tell each block the last latent frame before it, where published networks are told
        the same as ever. Ours, for small networks: beside their noise they then have what the next
        frames are mostly made of, and need not find it in the caches first.
      action_guidance: how far a call goes from what it would make of a block at rest to what it
        makes under the block's actions; 1 is no further, as published. Any other doubles the calls.
    """

    frames: int = 3
    steps: tuple[int, ...] = (1000, 666, 333)
    context_level: float = 0.0
    window: int = 3
    ratio: int = 4
    condition_on_last_frame: bool = False
    action_guidance: float = 1.0

    def __post_init__(self):
        for name in ('frames', 'window', 'ratio'):
            if getattr(self, name) < 1:
                raise ValueError(f'stream.{name}: got {getattr(self, name)}, expected at least 1')
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:]))
        if not self.steps or not falling or self.steps[-1] <= 0:
            raise ValueError(f'stream.steps: got {self.steps}, expected descending steps above 0')
        if self.context_level < 0:
            raise ValueError(f'stream.context_level: got {self.context_level}, expected >= 0')
        if self.action_guidance < 1:
            raise ValueError(
                f'stream.action_guidance: got {self.action_guidance:g}, expected at least 1'
            )

    context = 1  # latent frames of the start that a stream goes on from: the picture
    lag = 0  # steps from the one that takes an action to the one that shows it
    control_binding = 'block'  # where actions bind: in the block that takes them; there is no queue

    @property
    def passes(self) -> int:
        """Blocks that go through the network in a step, those of the guidance included."""
        return len(self.steps) * (1 + (self.action_guidance > 1)) + 1

    @property
    def compiled_passes(self) -> int:
        """The same, were every call guided: a program has one form for all of them."""
        return (len(self.steps) + 1) * (1 + (self.action_guidance > 1))

    @property
    def controls_per_step(self) -> int:
        """Actions that a step takes."""
        return self.block_actions

    @property
    def step_frames(self) -> int:
        """Latent frames that a step makes."""
        return self.frames

    def with_control_binding(self, control_binding: str) -> Config:
        """The same stream: actions bind at once, wherever those of a queue would."""
        return self

    @property
    def first_actions(self) -> int:
        """Pixel frames of block 0."""
        return 1 + self.ratio * (self.frames - 1)

    @property
    def block_actions(self) -> int:
        """Pixel frames of any other block."""
        return self.ratio * self.frames

    @property
    def remembered(self) -> int:
        """Pixel frames before a block whose actions the block is given."""
        return self.ratio * self.window


@struct.dataclass
class Cond:
    """What a stream starts from.

    Attributes:
      latents: what each latent frame from 0 on is given beside its noise [B T H W C]; the last of
        them stands for all that follow.
      image: features of the start picture [B L D], which the caches read once.
    """

    latents: jax.Array
    image: jax.Array


@struct.dataclass
class Carry:
    """All that a block hands to the next; arrays only, so that saving it is saving the stream.

    Attributes:
      caches: of the network.
      condition: [B T H W C].
      past: float32 [B remembered A], actions of the pixel frames before the next block.
      key: uint32 [B 2], raw key data of each player.
      block: int32 [B], blocks made so far.
    """

    caches: Any
    condition: jax.Array
    past: jax.Array
    key: jax.Array
    block: jax.Array


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Host table of the calls on a block, float32 [calls]: the level that the network is told, the
    sigma at which its answer is read, and the sigma that the clean estimate is noised to."""

    level: np.ndarray
    sigma: np.ndarray
    following: np.ndarray

    def __getitem__(self, part) -> StepTable:
        return StepTable(self.level[part], self.sigma[part], self.following[part])


def step_table(cfg: Config, schedule: flow.Config) -> StepTable:
    """The calls of one block: the denoising steps, and last the reading of the clean block."""
    levels = flow.warp(schedule, cfg.steps)
    sigmas = levels / np.float32(1000)
    # The last call changes nothing in the block: at sigma 0 the clean estimate is the block.
    return StepTable(
        np.append(levels, np.float32(cfg.context_level)),
        np.append(sigmas, np.float32(0)),
        np.append(sigmas[1:], np.float32([0, 0])),
    )


class Network(NamedTuple):
    """What a stream asks of a network.

    Attributes:
      denoise: `(params, caches, x [B T H W C], level [B T], cond [B T H W C'],
        actions [B remembered+block_actions A]) -> (v, caches)`; calls for one block overwrite what
        the caches hold of it.
      read: `(params, cond) -> caches` that are empty but for the start picture.
      advance: `(caches, frames) -> caches` for the next block.
      channels: width C of latents.
      actions: width A of an action.
    """

    denoise: Callable
    read: Callable
    advance: Callable
    channels: int
    actions: int


def make(
    cfg: Config, schedule: flow.Config, net: Network, table: StepTable | None = None
) -> Stream:
    """The stream of a network, with the calls of `step_table` or of another table of as many.

    `init(params, cond, key)`: `cond` is a `Cond`, `key` one key, or one per player [B].
    `prefill(params, carry, control)`: control float32 [B first_actions A]; makes block 0.
    `step(params, carry, control)`: control float32 [B block_actions A]; makes the next block.
    Both give latents [B frames H W C].
    """
    table = step_table(cfg, schedule) if table is None else table

    def init(params, cond: Cond, key) -> Carry:
        keys = player_keys(key, len(cond.latents))
        return initial_carry(cfg, net, params, cond, keys)

    def prefill(params, carry: Carry, control):
        _fits(control, (len(carry.key), cfg.first_actions, net.actions))
        return next_block(params, *pad_first_block(cfg, carry, control))

    def step(params, carry: Carry, control):
        _fits(control, (len(carry.key), cfg.block_actions, net.actions))
        return next_block(params, carry, control)

    def next_block(params, carry: Carry, control):
        shape = (cfg.frames, *carry.condition.shape[2:4], net.channels)
        drawn = normal(
            fold(jax.random.wrap_key_data(carry.key), carry.block), (len(cfg.steps), *shape)
        )
        drawn = jnp.moveaxis(drawn, 1, 0)
        return make_block(cfg, table, net, params, carry, control, drawn[0], drawn[1:])

    return Stream(init, prefill, step)


def with_action_guidance(cfg: Config, net: Network, rest) -> Network:
    """The same network, guided by actions (classifier-free guidance, arXiv 2207.12598, with rest in
    place of no condition: it needs no training of its own).

    Args:
      rest: float32 [A], the action of who holds nothing.
    """
    if cfg.action_guidance == 1:
        return net

    def denoise(params, caches, x, level, cond, actions):
        v, kept = net.denoise(params, caches, x, level, cond, actions)

        def push(v):
            still, _ = net.denoise(
                params, caches, x, level, cond, actions.at[:, -cfg.block_actions :].set(rest)
            )
            return still + cfg.action_guidance * (v - still)

        # Who reads a clean block asks for no velocity.
        return jax.lax.cond(level.reshape(-1)[0] > cfg.context_level, push, lambda v: v, v), kept

    return net._replace(denoise=denoise)


def initial_carry(cfg: Config, net: Network, params, cond: Cond, keys) -> Carry:
    """Carry of a new stream."""
    batch, condition = len(cond.latents), jnp.asarray(cond.latents)
    if cfg.condition_on_last_frame:
        condition = replace_latents(condition, condition[:, :1, ..., -net.channels :])
    return Carry(
        caches=net.read(params, cond),
        condition=condition,
        past=jnp.zeros([batch, cfg.remembered, net.actions], jnp.float32),
        key=jax.random.key_data(keys),
        block=jnp.zeros([batch], jnp.int32),
    )


def pad_first_block(cfg: Config, carry: Carry, control):
    """(carry, control of a whole block) from the actions of block 0 [B first_actions A]: before
    its first frame everything was as at its first frame."""
    control = jnp.asarray(control, jnp.float32)
    still = jnp.broadcast_to(control[:, :1], carry.past.shape)
    missing = cfg.block_actions - cfg.first_actions
    return (
        carry.replace(past=still),
        jnp.concatenate([still[:, :1].repeat(missing, axis=1), control], axis=1),
    )


def make_block(
    cfg: Config, table: StepTable, net: Network, params, carry: Carry, control, noise, renoise
):
    """One block with its noise given; `make(...).step` draws the noise and calls this.

    Args:
      table: from `step_table`.
      control: float32 [B block_actions A].
      noise: where to start [B T H W C].
      renoise: [steps-1 B T H W C], one draw for each step but the last.

    Returns:
      (carry, clean latents [B T H W C]).
    """
    zeros = jnp.zeros((2, *noise.shape), noise.dtype)
    return _advance(
        cfg, table, net, params, carry, control, noise, jnp.concatenate([renoise, zeros])
    )


def read_block(cfg: Config, table: StepTable, net: Network, params, carry: Carry, control, latents):
    """The carry after reading a clean block [B T H W C] that was made elsewhere; see `make_block`."""
    return _advance(
        cfg,
        table[-1:],
        net,
        params,
        carry,
        control,
        latents,
        jnp.zeros((1, *latents.shape), latents.dtype),
    )[0]


def _advance(cfg, table, net, params, carry, control, x, noises):
    actions = jnp.concatenate([carry.past, jnp.asarray(control, jnp.float32)], axis=1)
    caches, x = run_calls(
        table, net, params, carry.caches, x, noises, _condition(cfg, carry), actions
    )
    condition = carry.condition
    if cfg.condition_on_last_frame:
        condition = replace_latents(condition, x[:, -1:])
    return carry.replace(
        caches=net.advance(caches, cfg.frames),
        past=actions[:, -cfg.remembered :],
        condition=condition,
        block=carry.block + 1,
    ), x


def run_calls(table: StepTable, net: Network, params, caches, x, noises, cond, actions):
    """The calls of `table` on one block.

    Args:
      x: [B T H W C], float32.
      noises: [calls B T H W C], added after each call at its `following` sigma.
      cond, actions: see `Network`.

    Returns:
      (caches, x).
    """

    def call(state, now):
        caches, x = state
        level, sigma, following, noise = now
        level = jnp.broadcast_to(level, x.shape[:2])
        v, caches = net.denoise(params, caches, x, level, cond, actions)
        x0 = flow.x0_from_v(sigma, x, v.astype(jnp.float32))
        return (caches, flow.add_noise(following, x0, noise)), None

    columns = table.level, table.sigma, table.following, noises
    return jax.lax.scan(call, (caches, jnp.asarray(x, jnp.float32)), columns)[0]


def replace_latents(condition, latents):
    """Conditions [B T H W C'] with other latents, their last C channels: of each frame [B T H W C],
    or one for all."""
    latents = jnp.broadcast_to(latents, (*condition.shape[:-1], latents.shape[-1]))
    return jnp.concatenate([condition[..., : -latents.shape[-1]], latents], axis=-1)


def condition_blocks(cfg: Config, condition, clean):
    """Conditions [B T H W C'] of a clip as its blocks are told them in a stream.

    Args:
      condition: as from the start on, beside the first picture.
      clean: latents of the clip [B T H W C], whole blocks.
    """
    if not cfg.condition_on_last_frame:
        return condition
    first = condition[:, :1, ..., -clean.shape[-1] :]
    last = jnp.concatenate([first, clean[:, cfg.frames - 1 : -1 : cfg.frames]], axis=1)
    return replace_latents(condition, jnp.repeat(last, cfg.frames, axis=1))


def _condition(cfg, carry):
    """Condition of the next block [B T H W C]."""
    frames = carry.block[:, None] * cfg.frames + jnp.arange(cfg.frames)
    frames = jnp.minimum(frames, carry.condition.shape[1] - 1)
    return jnp.take_along_axis(carry.condition, frames[:, :, None, None, None], axis=1)


def _fits(control, shape):
    if control.shape != shape:
        raise ValueError(f'control: got {control.shape}, expected [B N A] = {shape}')
