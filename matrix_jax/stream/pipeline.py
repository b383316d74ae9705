"""A stream on two meshes: one makes latents while the other decodes the latents before.

    network   | shift 3 | shift 4 | shift 5 |
    decoder             | shift 3 | shift 4 | shift 5 |

Both programs are dispatched without waiting for their results. Only latents move between the
meshes, from device to device. The decoder returns frames as uint8.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax

from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import PyTree, Stream, StreamDecoder

AHEAD = 2  # one step in each half


class Pipeline:
    """The stream that `stream.base.chain` makes of the same parts, on two meshes.

    `init`, `prefill` and `step` take and return what those of a stream do, but they are compiled
    programs: nothing compiles after the first step.

    Args:
      stream: makes latents [B T H W C].
      decoder: turns them into frames.
      decoder_seed: `cond -> latents` that the decoder is filled with at the start; None = it
        starts on the first latents made.
      params: parameters of the stream, and of the decoder on a mesh of their own.
      ahead: steps that may be in flight; a further step waits for the frames of the oldest one.
      first_control: without a `decoder_seed`, control of a prefill in `init`, whose frames are
        dropped; None = `prefill` follows `init`.
    """

    def __init__(
        self,
        stream: Stream,
        decoder: StreamDecoder,
        decoder_seed: Callable[[PyTree], jax.Array] | None,
        params: tuple[PyTree, PyTree],
        ahead: int = AHEAD,
        first_control: PyTree = None,
    ) -> None:
        self.stream, self.decoder, self.params, self.ahead = stream, decoder, params[1], ahead
        self._meshes = [jax.tree.leaves(part)[0].sharding.mesh for part in params]
        self._replicated = [sharding.replicated(mesh) for mesh in self._meshes]
        self._fills = decoder_seed is not None or first_control is not None

        def start(params: PyTree, cond: PyTree, key: jax.Array) -> PyTree:
            carry = stream.init(params, cond, key)
            if decoder_seed:
                return carry, decoder_seed(cond)
            return stream.prefill(params, carry, first_control) if self._fills else carry

        self._start: Any = compilation.jit(start, out_shardings=self._replicated[0])
        self._fill: Any = compilation.jit(
            lambda params, latents: decoder.prefill(params, latents)[0]
        )
        self._make_first: Any = compilation.jit(
            stream.prefill, donate_argnums=1, out_shardings=self._replicated[0]
        )
        self._decode_first: Any = compilation.jit(decoder.prefill)
        self._make: Any = None
        self._decode: Any = None
        self._in_flight: collections.deque[PyTree] = collections.deque()

    def init(self, params: PyTree, cond: PyTree, key: jax.Array) -> PyTree:
        """Returns the carry of a new stream, (carry of the network, cache of the decoder).

        If `prefill` follows, it is the carry of the network alone.
        """
        with sharding.use_mesh(self._meshes[0]):
            made = self._start(params, cond, key)
        if not self._fills:
            return made
        carry, latents = made
        with sharding.use_mesh(self._meshes[1]):
            return carry, self._fill(self.params, self._to_decoder(latents))

    def prefill(self, params: PyTree, carry: PyTree, control: PyTree) -> tuple[PyTree, PyTree]:
        """Makes the first output -> ((carry of the network, cache of the decoder), frames).

        The carry given is donated and must not be used again.
        """
        with sharding.use_mesh(self._meshes[0]):
            carry, latents = self._make_first(params, carry, control)
        with sharding.use_mesh(self._meshes[1]):
            cache, frames = self._decode_first(self.params, self._to_decoder(latents))
        return (carry, cache), frames

    def compile_init(self, params: PyTree, cond: PyTree, key: jax.Array) -> PyTree:
        """Compiles `init` -> ShapeDtypeStructs of its carry."""
        with sharding.use_mesh(self._meshes[0]):
            self._start = self._start.lower(params, cond, key).compile()
        carry, latents = sharding.output_shapes(self._start)
        with sharding.use_mesh(self._meshes[1]):
            self._fill = self._fill.lower(self.params, self._decoder_input(latents)).compile()
        return carry, sharding.output_shapes(self._fill)

    def compile(self, params: PyTree, carry: PyTree, control: PyTree) -> None:
        """Compiles both programs of a step, for a carry of `init`."""
        # A step leaves its carry where it was, or the next step would be another program.
        places = [jax.tree.map(lambda leaf: leaf.sharding, part) for part in carry]
        with sharding.use_mesh(self._meshes[0]):
            make = compilation.jit(
                self.stream.step, donate_argnums=1, out_shardings=(places[0], self._replicated[0])
            )
            self._make = make.lower(params, carry[0], control).compile()
        latents = self._decoder_input(sharding.output_shapes(self._make)[1])
        with sharding.use_mesh(self._meshes[1]):
            decode = compilation.jit(
                self.decoder.step, donate_argnums=1, out_shardings=(places[1], None)
            )
            self._decode = decode.lower(self.params, carry[1], latents).compile()

    @property
    def programs(self) -> tuple[Any, Any]:
        """The compiled programs of a step: of the network, and of the decoder."""
        return self._make, self._decode

    def step(self, params: PyTree, carry: PyTree, control: PyTree) -> tuple[PyTree, PyTree]:
        """Dispatches one step -> (carry, frames) that are still being computed.

        The carry given is donated and must not be used again.
        """
        if self._make is None:
            self.compile(params, carry, control)
        while len(self._in_flight) >= self.ahead:
            jax.block_until_ready(self._in_flight.popleft())
        carry, cache = carry
        carry, latents = self._make(params, carry, control)
        cache, frames = self._decode(self.params, cache, self._to_decoder(latents))
        self._in_flight.append(frames)
        return (carry, cache), frames

    def _to_decoder(self, latents: PyTree) -> PyTree:
        """Latents on the decoder's mesh. They are replicated there, because cutting them anew would
        take them through the host."""
        return jax.device_put(latents, self._replicated[1])

    def _decoder_input(self, latents: PyTree) -> PyTree:
        """ShapeDtypeStructs of `_to_decoder`."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated[1]),
            latents,
        )
