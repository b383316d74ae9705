"""Block autoregression on caches: a few steps from noise to a clean block, then the next block.

Matrix-Game 2.0 (arXiv 2508.13009), after Self-Forcing (arXiv 2506.08009). A network with key and
value caches denoises `frames` latent frames at a time. Its last call on a block gets the clean
block, so that the caches keep clean frames. All calls on a block write the same cache slots.

Actions are per pixel frame. With R = 4 pixel frames per latent frame and blocks of n = 3 latent
frames, block 0 has 1 + R(n-1) = 9 actions and every other block has R*n = 12. The network gets the
actions of the block and of the `window` latent frames before it. Before frame 0, every action is
that of frame 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.diffusion import flow
from matrix_jax.stream.base import PyTree, Stream, fold, normal, player_keys
from matrix_jax.stream.causal_blocks import Config, StepTable, step_table

__all__ = ['Config', 'StepTable', 'step_table']


@struct.dataclass
class Cond:
    """What a stream starts from.

    Attributes:
      latents: condition of each latent frame from 0 on [B T H W C']; the last one stands for all
        later frames.
      image: features of the start picture [B L D], written to the caches once.
    """

    latents: jax.Array
    image: jax.Array


@struct.dataclass
class Carry:
    """State between blocks. It only holds arrays, so saving it saves the stream.

    Attributes:
      caches: caches of the network.
      condition: [B T H W C'].
      past: float32 [B past_actions A], actions of the pixel frames before the next block.
      key: uint32 [B 2], raw key data of each player.
      block: int32 [B], blocks made so far.
    """

    caches: PyTree
    condition: jax.Array
    past: jax.Array
    key: jax.Array
    block: jax.Array


class CachedNetwork(NamedTuple):
    """A network with caches, as the functions that a stream calls.

    Attributes:
      denoise: `(params, caches, x [B T H W C], level [B T], cond [B T H W C'],
        actions [B past_actions+block_actions A]) -> (v, caches)`. Calls on one block overwrite the
        same cache slots.
      read: `(params, cond) -> caches`, empty but for the start picture.
      advance: `(caches, frames) -> caches` for the next block.
      channels: width C of latents.
      actions: width A of an action.
      begin: `(params, caches, actions) -> (caches, actions)` before the first call on a block: what
        all calls on it have in common. Later calls take the second result as their actions.
    """

    denoise: Callable[..., tuple[jax.Array, PyTree]]
    read: Callable[[PyTree, Cond], PyTree]
    advance: Callable[[PyTree, int], PyTree]
    channels: int
    actions: int
    begin: Callable[..., tuple[PyTree, PyTree]] = lambda params, caches, actions: (caches, actions)


def make(
    cfg: Config, schedule: flow.Config, net: CachedNetwork, table: StepTable | None = None
) -> Stream:
    """Returns the stream of a network.

    `init(params, cond, key)`: `cond` is a `Cond`, `key` one key or one per player [B].
    `prefill(params, carry, control)`: control float32 [B first_actions A]; makes block 0.
    `step(params, carry, control)`: control float32 [B block_actions A]; makes the next block.
    Both return latents [B frames H W C].

    Args:
      cfg: the blocks.
      schedule: the noise schedule.
      net: the network.
      table: calls on a block, as many as `step_table` has, which is the default.

    Raises:
      ValueError: a control has a wrong shape.
    """
    table = step_table(cfg, schedule) if table is None else table

    def init(params: PyTree, cond: Cond, key: jax.Array) -> Carry:
        return initial_carry(cfg, net, params, cond, player_keys(key, len(cond.latents)))

    def prefill(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
        check_control(control, (len(carry.key), cfg.first_actions, net.actions))
        return next_block(params, *pad_first_block(cfg, carry, control))

    def step(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
        check_control(control, (len(carry.key), cfg.block_actions, net.actions))
        return next_block(params, carry, control)

    def next_block(params: PyTree, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
        shape = (cfg.frames, *carry.condition.shape[2:4], net.channels)
        keys = fold(jax.random.wrap_key_data(carry.key), carry.block)
        noise = jnp.moveaxis(normal(keys, (len(cfg.steps), *shape)), 1, 0)
        return make_block(cfg, table, net, params, carry, control, noise[0], noise[1:])

    return Stream(init, prefill, step)


def with_action_guidance(cfg: Config, net: CachedNetwork, idle: jax.Array) -> CachedNetwork:
    """Returns the network with its velocity guided by actions, v_idle + s (v - v_idle).

    Classifier-free guidance (arXiv 2207.12598) with the idle action as the null condition. It needs
    no training of its own.

    Args:
      idle: float32 [A], the idle action.
    """
    if cfg.action_guidance == 1:
        return net

    def begin(params: PyTree, caches: PyTree, actions: jax.Array) -> tuple[PyTree, PyTree]:
        idle_actions = jnp.asarray(actions).at[:, -cfg.block_actions :].set(idle)
        _, idle_actions = net.begin(params, caches, idle_actions)
        caches, actions = net.begin(params, caches, actions)
        return caches, (actions, idle_actions)

    def denoise(
        params: PyTree,
        caches: PyTree,
        x: jax.Array,
        level: jax.Array,
        cond: jax.Array,
        both: PyTree,
    ) -> tuple[jax.Array, PyTree]:
        actions, idle_actions = both
        v, new_caches = net.denoise(params, caches, x, level, cond, actions)

        def guide(v: jax.Array) -> jax.Array:
            idle_v, _ = net.denoise(params, caches, x, level, cond, idle_actions)
            return idle_v + cfg.action_guidance * (v - idle_v)

        # The call on the clean block uses no velocity.
        noisy = level.reshape(-1)[0] > cfg.context_level
        return jax.lax.cond(noisy, guide, lambda v: v, v), new_caches

    return net._replace(denoise=denoise, begin=begin)


def initial_carry(
    cfg: Config, net: CachedNetwork, params: PyTree, cond: Cond, keys: jax.Array
) -> Carry:
    """Returns the carry of a new stream."""
    batch, condition = len(cond.latents), jnp.asarray(cond.latents)
    if cfg.condition_on_last_frame:
        condition = replace_latents(condition, condition[:, :1, ..., -net.channels :])
    return Carry(
        caches=net.read(params, cond),
        condition=condition,
        past=jnp.zeros([batch, cfg.past_actions, net.actions], jnp.float32),
        key=jax.random.key_data(keys),
        block=jnp.zeros([batch], jnp.int32),
    )


def pad_first_block(cfg: Config, carry: Carry, control: jax.Array) -> tuple[Carry, jax.Array]:
    """Repeats the first action of block 0 into the past, and to the length of other blocks.

    Args:
      control: float32 [B first_actions A].

    Returns:
      (carry, control [B block_actions A]).
    """
    control = jnp.asarray(control, jnp.float32)
    past = jnp.broadcast_to(control[:, :1], carry.past.shape)
    missing = cfg.block_actions - cfg.first_actions
    return (
        dataclasses.replace(carry, past=past),
        jnp.concatenate([past[:, :1].repeat(missing, axis=1), control], axis=1),
    )


def make_block(
    cfg: Config,
    table: StepTable,
    net: CachedNetwork,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    noise: jax.Array,
    renoise: jax.Array,
) -> tuple[Carry, jax.Array]:
    """Makes one block with its noise given; `make(...).step` draws the noise and calls this.

    Args:
      table: from `step_table`.
      control: float32 [B block_actions A].
      noise: noise to start from [B T H W C].
      renoise: [steps-1 B T H W C], noise for each step but the last.

    Returns:
      (carry, clean latents [B T H W C]).
    """
    zeros = jnp.zeros((2, *noise.shape), noise.dtype)
    noises = jnp.concatenate([renoise, zeros])
    return _advance(cfg, table, net, params, carry, control, noise, noises)


def read_block(
    cfg: Config,
    table: StepTable,
    net: CachedNetwork,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    latents: jax.Array,
) -> Carry:
    """Returns the carry after a given clean block [B T H W C], in place of one that was made."""
    noises = jnp.zeros((1, *latents.shape), latents.dtype)
    return _advance(cfg, table[-1:], net, params, carry, control, latents, noises)[0]


def _advance(
    cfg: Config,
    table: StepTable,
    net: CachedNetwork,
    params: PyTree,
    carry: Carry,
    control: jax.Array,
    x: jax.Array,
    noises: jax.Array,
) -> tuple[Carry, jax.Array]:
    """Runs the calls of `table` on the next block -> (carry, clean latents)."""
    actions = jnp.concatenate([carry.past, jnp.asarray(control, jnp.float32)], axis=1)
    condition, given = carry.condition, _block_condition(cfg, carry)
    caches, x = run_calls(table, net, params, carry.caches, x, noises, given, actions)
    if cfg.condition_on_last_frame:
        condition = replace_latents(condition, x[:, -1:])
    carry = dataclasses.replace(
        carry,
        caches=net.advance(caches, cfg.frames),
        past=actions[:, -cfg.past_actions :],
        condition=condition,
        block=carry.block + 1,
    )
    return carry, x


def run_calls(
    table: StepTable,
    net: CachedNetwork,
    params: PyTree,
    caches: PyTree,
    x: jax.Array,
    noises: jax.Array,
    cond: jax.Array,
    actions: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """Runs the calls of `table` on one block: x <- (1 - s') x0 + s' noise, x0 = x - s v.

    Args:
      x: float32 [B T H W C].
      noises: [calls B T H W C], added after each call at its `following` sigma s'.
      cond, actions: see `CachedNetwork`.

    Returns:
      (caches, x).
    """

    def call(state: PyTree, now: PyTree) -> tuple[PyTree, None]:
        caches, x = state
        level, sigma, following, noise = now
        level = jnp.broadcast_to(level, x.shape[:2])
        v, caches = net.denoise(params, caches, x, level, cond, actions)
        x0 = flow.x0_from_v(sigma, x, v.astype(jnp.float32))
        return (caches, flow.add_noise(following, x0, noise)), None

    caches, actions = net.begin(params, caches, actions)
    columns = table.level, table.sigma, table.following, noises
    (caches, x), _ = jax.lax.scan(call, (caches, jnp.asarray(x, jnp.float32)), columns)
    return caches, x


# --- conditions ----------------------------------------------------------------------------------


def replace_latents(condition: jax.Array, latents: jax.Array) -> jax.Array:
    """Conditions [B T H W C'] with their last C channels replaced by latents [B T or 1 H W C]."""
    latents = jnp.broadcast_to(latents, (*condition.shape[:-1], latents.shape[-1]))
    return jnp.concatenate([condition[..., : -latents.shape[-1]], latents], axis=-1)


def condition_blocks(cfg: Config, condition: jax.Array, clean: jax.Array) -> jax.Array:
    """Returns the conditions [B T H W C'] of a clip as a stream would give them to its blocks.

    Args:
      condition: conditions from the start picture alone [B T H W C'].
      clean: latents of the clip [B T H W C], whole blocks.
    """
    if not cfg.condition_on_last_frame:
        return condition
    first = condition[:, :1, ..., -clean.shape[-1] :]
    last = jnp.concatenate([first, clean[:, cfg.frames - 1 : -1 : cfg.frames]], axis=1)
    return replace_latents(condition, jnp.repeat(last, cfg.frames, axis=1))


def _block_condition(cfg: Config, carry: Carry) -> jax.Array:
    """Condition of the next block [B T H W C']."""
    frames = carry.block[:, None] * cfg.frames + jnp.arange(cfg.frames)
    frames = jnp.minimum(frames, carry.condition.shape[1] - 1)
    return jnp.take_along_axis(carry.condition, frames[:, :, None, None, None], axis=1)


def check_control(control: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a control has this shape."""
    if control.shape != shape:
        raise ValueError(f'control: got {control.shape}, expected [B N A] = {shape}')
