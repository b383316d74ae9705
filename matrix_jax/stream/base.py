"""What a stream is: `init`, `prefill`, `step` over a carry, and how two of them chain.

The same `step` runs under `scan` (offline), `jit` (a player) and `grad` (training).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange


class Stream(NamedTuple):
    """Endless generation.

    Attributes:
      init: `(params, cond, key) -> carry`.
      prefill: `(params, carry, control) -> (carry, first output)`; run once. Its output may be of
        another length than that of `step`, and its carry is what `step` takes and returns.
      step: `(params, carry, control) -> (carry, output)`; every leaf keeps shape and type.
      with_prompt: `(carry, text [B L D]) -> carry` with another prompt from the next step on; None
        where the stream reads no text.
    """

    init: Callable
    prefill: Callable
    step: Callable
    with_prompt: Callable | None = None


class Decoder(NamedTuple):
    """Latents to frames, in chunks.

    Attributes:
      prefill: `(params, latents [B T H W C]) -> (cache, frames [B F H W 3])` for the first chunk.
      step: `(params, cache, latents) -> (cache, frames)`.
    """

    prefill: Callable
    step: Callable


def rollout(stream: Stream, params, carry, controls):
    """Scans `step` over controls [S B T] -> (carry, outputs with a leading axis S)."""
    return jax.lax.scan(partial(stream.step, params), carry, controls)


def join(outputs):
    """Outputs of a rollout [S B T ...] -> one clip [B S*T ...]."""
    return rearrange(outputs, 's b t ... -> b (s t) ...')


def chain(
    stream: Stream, decoder: Decoder, first: int = 1, decoder_seed: Callable | None = None
) -> Stream:
    """A stream of frames: each `step` makes latents and decodes them in one program.

    Args:
      stream: makes latents [B T H W C].
      decoder: turns them into frames.
      first: steps of `stream` whose latents the first decode waits for. `prefill` then takes their
        controls side by side, [B first*T].
      decoder_seed: `cond -> latents` that the decoder starts on in `init`; then `prefill` is `step`, and
        `first` does not count.
    """

    def init(params, cond, key):
        return stream.init(params, cond, key), decoder.prefill(params, decoder_seed(cond))[0]

    def prefill(params, carry, control):
        parts = jnp.split(control, first, axis=1)
        carry, latents = stream.prefill(params, carry, parts[0])
        chunks = [latents]
        for part in parts[1:]:
            carry, latents = stream.step(params, carry, part)
            chunks.append(latents)
        cache, frames = decoder.prefill(params, jnp.concatenate(chunks, axis=1))
        return (carry, cache), frames

    def step(params, carry, control):
        carry, cache = carry
        carry, latents = stream.step(params, carry, control)
        cache, frames = decoder.step(params, cache, latents)
        return (carry, cache), frames

    def with_prompt(carry, text):
        return stream.with_prompt(carry[0], text), carry[1]

    changed = with_prompt if stream.with_prompt else None
    if decoder_seed:
        return Stream(init, step, step, changed)
    return Stream(stream.init, prefill, step, changed)


def prefilled(stream: Stream, control) -> Stream:
    """The stream with its first output made by `init` and dropped, so that every step is alike.

    Args:
      stream: a stream; one whose `prefill` is `step` stays as it is.
      control: of the first output, [1 T ...].
    """
    if stream.prefill is stream.step:
        return stream

    def init(params, cond, key):
        return stream.prefill(params, stream.init(params, cond, key), control)[0]

    return stream._replace(init=init, prefill=stream.step)


# --- randomness of players -----------------------------------------------------------------------


def player_keys(key, batch: int):
    """One typed key per player, from one key (typed or raw) or from [B]."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = jax.random.split(key, batch) if key.ndim == 0 else key
    if keys.shape != (batch,):
        raise ValueError(f'key: got {keys.shape} keys, expected one or [{batch}]')
    return keys


def fold(keys, numbers):
    """Keys [B] with one number [B] folded into each."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def normal(keys, shape):
    """Noise [B *shape], each player's from its own key."""
    # Drawn flat: with many axes the counters of the generator take XLA seconds to fold.
    flat = jax.vmap(lambda key: jax.random.normal(key, [math.prod(shape)], jnp.float32))(keys)
    return flat.reshape(-1, *shape)
