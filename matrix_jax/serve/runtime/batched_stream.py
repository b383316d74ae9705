"""Places of players in one compiled program: their carries side by side, stepped together.

Every slot holds a stream of its own (batch 1). A step runs over all slots, one after the other
(`lax.map`) or `together` at a time; with 1 together a slot that is not active costs nothing, so a
house of eight with one player computes one player. Whatever the others do, a slot goes through the
same instructions with its own numbers: no player can touch the world of another by a single bit.

Where the parameters lie on a mesh, the programs are for that mesh; where those of the decoder lie
on a mesh of their own, both halves of a step are a pipeline.
"""

from __future__ import annotations

import copy
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from matrix_jax.config import UsageError
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream import swin
from matrix_jax.stream.base import Decoder, Stream, started
from matrix_jax.stream.pipeline import Pipeline


class Slots:
    """The programs of a house; every method but `condition`, `begin` and `embed` is for one thread.

    Args:
      world, params: from `worlds.open_run`.
      count: slots.
      entry: where keys bind; 'head' by default, where a player soon sees them.
      together: slots that are computed side by side.

    Attributes:
      ahead: steps that it pays to hand in before the frames of an earlier one are there.
      mesh: the devices, for people and for logs.

    Raises:
      UsageError: the world does not stream, or the counts make no sense.
    """

    def __init__(self, world, params, count: int, entry: str | None = None, together: int = 1):
        if world.cfg.clip:
            raise UsageError(
                'this model makes whole clips; only a model that streams can be '
                'played (stages 3 and 4)'
            )
        if not 1 <= count <= 1024:
            raise UsageError(f'--players: got {count}, expected 1 to 1024')
        if not 1 <= together <= count:
            raise UsageError(f'--together: got {together}, expected 1 to the players, {count}')
        cfg = world.cfg
        self.entry = entry or 'head'
        self._weights = params
        params, decoder = world.apart(params)
        params = world.ready(params)
        self.world, self.params = world, params
        self.mesh = ' | '.join(map(sharding.named, filter(None, (params, decoder))))
        self.count, self.together = count, together
        try:
            stream = cfg.stream.entered(self.entry)
        except ValueError as error:
            raise UsageError(f'--entry {self.entry}: {error}') from error
        self.group, self.lag = stream.taken, stream.lag
        self.frames = self.group * world.vocabulary.frames
        self.start_frames = world.start_frames
        self.rest = self.encode(world.vocabulary.rest)
        self._frames = (self.frames, cfg.height, cfg.width, 3), jnp.uint8
        self._pipeline, self.ahead = None, 0
        if decoder is None:
            first = [world.vocabulary.rest] * world.first_controls
            self._stream = started(world.stream(self.entry), world.vocabulary.encode(first)[None])
        else:
            self._pipeline, self.ahead = self._in_parts((params, decoder)), 1

    def compile(self):
        """Compiles everything that a session can ask for; nothing compiles after this."""
        world, one = self.world, jax.ShapeDtypeStruct
        frames = np.zeros((self.start_frames, world.cfg.height, world.cfg.width, 3), np.uint8)
        inputs, _ = world.inputs('', frames)
        key = _key(0)  # this compiles as well, once
        index = one((), jnp.int32)
        keys = (one((self.count, *self.rest.shape), self.rest.dtype), one((self.count,), jnp.bool_))

        def ready(function, *given, donate=(), like=None):
            """`like`: what is given back lies as it does."""
            lies = jax.tree.map(lambda leaf: leaf.sharding, like) if like is not None else None
            with sharding.within(sharding.mesh_of(given[0])):
                return (
                    compilation.jit(function, donate_argnums=donate, out_shardings=lies)
                    .lower(*given)
                    .compile()
                )

        self._condition = ready(world.condition, self.params, *inputs)
        cond = sharding.made(self._condition)
        if self._pipeline:
            self.like = self._pipeline.compile_init(self.params, cond, key)
            self._begin, self._step = self._pipeline.init, self._pipeline.step
        else:
            self._begin = ready(self._stream.init, self.params, cond, key)
            self.like = sharding.made(self._begin)
        rows = jax.tree.map(self._many, self.like)
        if self._pipeline:
            self._pipeline.compile(self.params, rows, keys)
        else:
            self._step = ready(
                self._each(self._stream.step, *self._frames),
                self.params,
                rows,
                keys,
                donate=1,
                like=(rows, None),
            )
        # The carry of the network and that of the decoder may lie on devices of their own.
        self._read = [
            ready(_read, part, index, like=like) for part, like in zip(rows, self.like, strict=True)
        ]
        self._write = [
            ready(_write, part, index, like, donate=0, like=part)
            for part, like in zip(rows, self.like, strict=True)
        ]
        if world.reads_text:
            ids = one((1, world.cfg.dit.text_length), jnp.int32)
            self._embed = ready(world.embed_ids, self.params, ids)
            self._retext = ready(
                _retext, rows[0], index, sharding.made(self._embed), donate=0, like=rows[0]
            )
        self._rows = self._zeros(rows)
        return self

    def _many(self, leaf):
        """Shape of a leaf of a carry for all slots, and where it lies."""
        place = leaf.sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return jax.ShapeDtypeStruct((self.count, *leaf.shape), leaf.dtype, sharding=place)

    def _zeros(self, rows):
        return jax.tree.map(
            lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), rows
        )

    def blank(self):
        """The same programs with slots of their own."""
        other = copy.copy(self)
        other._rows = self._zeros(self._rows)
        return other

    def _each(self, step, shape, dtype):
        """A step of batch 1 for all active slots: `(params, rows, (given [N ...], active [N])) ->
        (rows, (output [N *shape], finite [N]))`; a slot that rests gives zeros."""

        def run(params, rows, given):
            still = jnp.zeros(shape, dtype), jnp.array(True)

            def shift(carry, given):
                carry, output = step(params, carry, given[None])
                finite = [
                    jnp.isfinite(leaf).all()
                    for leaf in jax.tree.leaves(carry)
                    if jnp.issubdtype(leaf.dtype, jnp.floating)
                ]
                return carry, (output[0], jnp.stack(finite).all())

            def slot(row):
                carry, given, active = row
                return jax.lax.cond(active, shift, lambda carry, _: (carry, still), carry, given)

            size = self.together if self.together > 1 else None
            return jax.lax.map(slot, (rows, *given), batch_size=size)

        return run

    def _in_parts(self, params) -> Pipeline:
        """The slots with their network on one mesh and their decoder on another."""
        halves, cfg = self.world.halves(self.entry), self.world.cfg
        scale = cfg.vae.spatial_compression
        latents = self.group, cfg.height // scale, cfg.width // scale, cfg.vae.latent_channels
        make = self._each(halves['stream'].step, latents, jnp.float32)
        decode = self._each(halves['decoder'].step, *self._frames)

        def step(params, rows, given):
            rows, (latents, finite) = make(params, rows, given)
            return rows, (latents, finite, given[1])

        def show(params, rows, given):
            latents, fine, active = given
            rows, (frames, finite) = decode(params, rows, (latents, active))
            return rows, (frames, finite & fine)

        return Pipeline(
            Stream(halves['stream'].init, step, step),
            Decoder(halves['decoder'].prefill, show),
            halves['warm'],
            params,
        )

    # --- a player's stream, from any thread ----------------------------------------------------

    def condition(self, prompt: str, frames: np.ndarray):
        """What a stream starts from -> (condition on device, the text that did not fit).

        Args:
          prompt: text.
          frames: start clip uint8 [F H W 3], F = `start_frames`.
        """
        inputs, cut = self.world.inputs(prompt, frames)
        return self._condition(self.params, *inputs), cut

    def begin(self, condition, seed: int):
        """The carry of a new stream, batch 1."""
        return self._begin(self.params, condition, _key(seed))

    def embed(self, prompt: str):
        """A prompt for `retext` -> (text [1 L D], the text that did not fit)."""
        ids, cut = self.world.tokenize_and_cut([prompt])
        return self._embed(self.params, np.asarray(ids, np.int32)), cut[0]

    # --- the slots, from one thread --------------------------------------------------------------

    def encode(self, control: str) -> np.ndarray:
        """What a slot's step takes of a control that is held throughout."""
        return self.world.vocabulary.encode([control] * self.group)

    def step(self, symbols: np.ndarray, active: np.ndarray):
        """One shift of the active slots.

        Args:
          symbols: of each slot what `encode` gives [N ...].
          active: bool [N].

        Returns:
          (frames uint8 [N F H W 3] on device, whether all numbers of a slot are finite [N]).
        """
        self._rows, made = self._step(self.params, self._rows, (symbols, active))
        return made

    def write(self, index: int, carry):
        """Puts a carry of batch 1, of host or device, into a slot."""
        self._rows = tuple(
            write(part, np.int32(index), new)
            for write, part, new in zip(self._write, self._rows, carry, strict=True)
        )

    def peek(self, index: int):
        """A copy of a slot's carry, still to come."""
        return tuple(
            read(part, np.int32(index)) for read, part in zip(self._read, self._rows, strict=True)
        )

    def read(self, index: int):
        """A copy of a slot's carry on the host."""
        return jax.tree.map(np.array, self.peek(index))

    def retext(self, index: int, text):
        """Another prompt for a slot, from its next shift on."""
        carry, cache = self._rows
        self._rows = self._retext(carry, np.int32(index), text), cache

    def fingerprint(self) -> str:
        """Of the world's sizes and a sample of every weight: what a saved world must fit."""
        found = hashlib.sha256(repr(self.world.cfg).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._weights):
            sample = np.asarray(leaf.ravel()[:64].astype(jnp.float32))
            found.update(f'{jax.tree_util.keystr(path)} {leaf.shape}'.encode() + sample.tobytes())
        return found.hexdigest()[:16]


def _key(seed: int):
    return jax.random.split(jax.random.key(seed), 1)


def _read(rows, index):
    return jax.tree.map(lambda leaf: leaf[index], rows)


def _write(rows, index, carry):
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new.astype(leaf.dtype)), rows, carry)


def _retext(rows, index, text):
    new = swin.with_text(jax.tree.map(lambda leaf: leaf[index], rows), text)
    return rows.replace(text=rows.text.at[index].set(new.text))
