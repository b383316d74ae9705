"""Streams: endless generation as the functions `init`, `prefill` and `step` over a carry.

The same `step` runs under `scan` (offline), `jit` (a live player) and `grad` (training). The carry
is a pytree of arrays whose shapes never change, so saving the carry saves the stream. `chain`
appends a video decoder to a stream of latents.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange

PyTree = Any


class StreamConfig(Protocol):
    """What the rest of the package reads of the config of any stream.

    Attributes:
      frames: latent frames T that a network call sees (the window or the block).
      context: latent frames of the start that the stream continues from.
      step_frames: latent frames that a step makes.
      controls_per_step: controls that a step takes.
      control_binding: where a new control takes effect.
      lag: steps between the step that takes a control and the step that shows it.
      passes: network passes of a step, guidance included.
      compiled_passes: network passes in the compiled program of a step; more than `passes` where
        the program holds a pass that only runs on a condition.
    """

    @property
    def frames(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def step_frames(self) -> int: ...
    @property
    def controls_per_step(self) -> int: ...
    @property
    def control_binding(self) -> str: ...
    @property
    def lag(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def compiled_passes(self) -> int: ...

    def with_control_binding(self, control_binding: str) -> StreamConfig:
        """Returns the same config with another control binding, where the stream has a choice."""
        ...


class Stream(NamedTuple):
    """Endless generation.

    Attributes:
      init: `(params, cond, key) -> carry`.
      prefill: `(params, carry, control) -> (carry, first output)`, called once. Its output may
        have another length than the output of `step`. The same function as `step` if the first
        step is like any other.
      step: `(params, carry, control) -> (carry, output)`. Every leaf of the carry keeps its shape
        and type.
      with_prompt: `(carry, text [B L D]) -> carry` with another prompt from the next step on; None
        if the stream reads no text.
    """

    init: Callable[..., PyTree]
    prefill: Callable[..., tuple[PyTree, PyTree]]
    step: Callable[..., tuple[PyTree, PyTree]]
    with_prompt: Callable[[PyTree, jax.Array], PyTree] | None = None


class StreamDecoder(NamedTuple):
    """Streaming decoder from latents to frames.

    Attributes:
      prefill: `(params, latents [B T H W C]) -> (cache, frames [B F H W 3])` for the first chunk.
      step: `(params, cache, latents) -> (cache, frames)` for every later chunk.
    """

    prefill: Callable[..., tuple[PyTree, jax.Array]]
    step: Callable[..., tuple[PyTree, PyTree]]


def rollout(
    stream: Stream, params: PyTree, carry: PyTree, controls: jax.Array
) -> tuple[PyTree, PyTree]:
    """Scans `step` over controls [S B T] -> (carry, outputs with a leading axis S)."""
    return jax.lax.scan(partial(stream.step, params), carry, controls)


def join(outputs: jax.Array) -> jax.Array:
    """Outputs of a rollout [S B T ...] -> one clip [B S*T ...]."""
    return rearrange(outputs, 's b t ... -> b (s t) ...')


def chain(
    stream: Stream,
    decoder: StreamDecoder,
    decoder_seed: Callable[[PyTree], jax.Array] | None = None,
) -> Stream:
    """Returns a stream of frames: each `step` makes latents and decodes them in one program.

    Args:
      stream: makes latents [B T H W C].
      decoder: turns them into frames.
      decoder_seed: `cond -> latents` that the decoder is filled with in `init`. `prefill` is then
        the same function as `step`. Without it, the decoder starts on the first latents made.
    """

    def init(params: PyTree, cond: PyTree, key: jax.Array) -> PyTree:
        carry = stream.init(params, cond, key)
        return (carry, decoder.prefill(params, decoder_seed(cond))[0]) if decoder_seed else carry

    def prefill(params: PyTree, carry: PyTree, control: jax.Array) -> tuple[PyTree, PyTree]:
        carry, latents = stream.prefill(params, carry, control)
        cache, frames = decoder.prefill(params, latents)
        return (carry, cache), frames

    def step(params: PyTree, carry: PyTree, control: jax.Array) -> tuple[PyTree, PyTree]:
        carry, cache = carry
        carry, latents = stream.step(params, carry, control)
        cache, frames = decoder.step(params, cache, latents)
        return (carry, cache), frames

    change = stream.with_prompt
    with_prompt = change and (lambda carry, text: (change(carry[0], text), carry[1]))
    return Stream(init, step if decoder_seed else prefill, step, with_prompt)


def prefilled(stream: Stream, control: jax.Array) -> Stream:
    """Returns the stream with `prefill` done by `init` and its output dropped: all steps are alike.

    Args:
      stream: a stream; returned as it is if its `prefill` is `step`.
      control: control of the prefill, [1 T ...].
    """
    if stream.prefill is stream.step:
        return stream

    def init(params: PyTree, cond: PyTree, key: jax.Array) -> PyTree:
        return stream.prefill(params, stream.init(params, cond, key), control)[0]

    return stream._replace(init=init, prefill=stream.step)


# --- random numbers of each player ---------------------------------------------------------------


def player_keys(key: jax.Array, batch: int) -> jax.Array:
    """Returns one typed key per player [B], from one key (typed or raw) or from [B] keys.

    Raises:
      ValueError: there are neither one nor `batch` keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = jax.random.split(key, batch) if key.ndim == 0 else key
    if keys.shape != (batch,):
        raise ValueError(f'key: got {keys.shape} keys, expected one or [{batch}]')
    return keys


def fold(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Folds one number [B] into each key [B]."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)


_draw: contextvars.ContextVar[Callable[[tuple[int, ...]], jax.Array] | None] = (
    contextvars.ContextVar('draw', default=None)
)


@contextlib.contextmanager
def noise_from(draw: Callable[[tuple[int, ...]], jax.Array]) -> Iterator[None]:
    """Traces programs whose noise of a shape [B ...] is `draw(shape)`, such as an input of them."""
    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws noise [B *shape], each player's from its own key, or as `noise_from` says."""
    if draw := _draw.get():
        return draw((*keys.shape, *shape))
    # Drawn flat, because XLA takes seconds to fold the generator's counters over many axes.
    flat = jax.vmap(lambda key: jax.random.normal(key, [math.prod(shape)], jnp.float32))(keys)
    return flat.reshape(-1, *shape)
