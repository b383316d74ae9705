"""A stream in two parts on two meshes: one makes latents while the other decodes those before.

    network   | shift 3 | shift 4 | shift 5 |
    decoder             | shift 3 | shift 4 | shift 5 |

Both programs are dispatched without waiting for them. Latents alone cross, from device to device;
frames leave the decoder as it makes them, in uint8.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import jax

from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import Decoder, Stream

AHEAD = 2  # one shift in each part


class Pipeline:
    """What `stream.base.chain` makes of a stream and its decoder, on two meshes.

    `init` and `step` are called like those of a stream and return what they return, but they are
    programs already: nothing compiles after the first step.

    Args:
      stream: makes latents [B T H W C].
      decoder: turns them into frames.
      decoder_seed: `cond -> latents` that the decoder starts on.
      params: of the stream, and of the decoder on a mesh of their own.
      ahead: shifts that may be under way; one more waits until the oldest has its frames.
    """

    def __init__(
        self, stream: Stream, decoder: Decoder, decoder_seed: Callable, params, ahead: int = AHEAD
    ):
        self.stream, self.decoder, self.params, self.ahead = stream, decoder, params[1], ahead
        self._meshes = [jax.tree.leaves(part)[0].sharding.mesh for part in params]
        self._whole = [sharding.replicated(one) for one in self._meshes]
        self._start = compilation.jit(
            lambda *given: (stream.init(*given), decoder_seed(given[1])),
            out_shardings=self._whole[0],
        )
        self._fill = compilation.jit(lambda *given: decoder.prefill(*given)[0])
        self._make = self._decode = None
        self._flying: collections.deque = collections.deque()

    def init(self, params, cond, key):
        """The start of a stream -> carry; see `Stream`."""
        with sharding.within(self._meshes[0]):
            carry, latents = self._start(params, cond, key)
        with sharding.within(self._meshes[1]):
            return carry, self._fill(self.params, self._cross(latents))

    def compile_init(self, params, cond, key):
        """Compiles `init` -> ShapeDtypeStructs of its carry."""
        with sharding.within(self._meshes[0]):
            self._start = self._start.lower(params, cond, key).compile()
        carry, latents = sharding.made(self._start)
        with sharding.within(self._meshes[1]):
            self._fill = self._fill.lower(self.params, self._crossed(latents)).compile()
        return carry, sharding.made(self._fill)

    def compile(self, params, carry, control):
        """Compiles both programs of a step, for a carry of `init`."""
        # A carry lies after a step as before it, or the next step would be another program.
        lies = [jax.tree.map(lambda leaf: leaf.sharding, part) for part in carry]
        with sharding.within(self._meshes[0]):
            make = compilation.jit(
                self.stream.step, donate_argnums=1, out_shardings=(lies[0], self._whole[0])
            )
            self._make = make.lower(params, carry[0], control).compile()
        latents = self._crossed(sharding.made(self._make)[1])
        with sharding.within(self._meshes[1]):
            decode = compilation.jit(
                self.decoder.step, donate_argnums=1, out_shardings=(lies[1], None)
            )
            self._decode = decode.lower(self.params, carry[1], latents).compile()

    @property
    def programs(self) -> tuple:
        """The compiled programs of a step, of the network and of the decoder."""
        return self._make, self._decode

    def step(self, params, carry, control):
        """One shift -> (carry, frames), all of them still to come; the carry given is used up."""
        if self._make is None:
            self.compile(params, carry, control)
        while len(self._flying) >= self.ahead:
            jax.block_until_ready(self._flying.popleft())
        carry, cache = carry
        carry, latents = self._make(params, carry, control)
        cache, frames = self._decode(self.params, cache, self._cross(latents))
        self._flying.append(frames)
        return (carry, cache), frames

    def _crossed(self, latents):
        """Shapes of `_cross`."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole[1]),
            latents,
        )

    def _cross(self, latents):
        """Latents on the decoder's mesh; every device has all of them, so that none takes a detour
        through the host to be cut anew."""
        return jax.device_put(latents, self._whole[1])
