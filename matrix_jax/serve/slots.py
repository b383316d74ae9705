"""Places of players in one compiled program: their carries side by side, stepped together.

Every slot holds a stream of its own (batch 1). A step runs over all slots, one after the other
(`lax.map`) or `together` at a time; with 1 together a slot that is not active costs nothing, so a
house of eight with one player computes one player. Whatever the others do, a slot goes through the
same instructions with its own numbers: no player can touch the world of another by a single bit.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import controls
from matrix_jax.config import UsageError
from matrix_jax.stream import swin


class Slots:
    """The programs of a house; every method but `condition`, `begin` and `embed` is for one thread.

    Args:
      world, params: from `worlds.open_run`.
      count: slots.
      entry: where keys bind; 'head' by default, where a player soon sees them.
      together: slots that are computed side by side.

    Raises:
      UsageError: the world does not stream, or the counts make no sense.
    """

    def __init__(self, world, params, count: int, entry: str | None = None, together: int = 1):
        if world.cfg.clip:
            raise UsageError('this model makes whole clips; only a model that streams can be '
                             'played (stages 3 and 4)')
        if not 1 <= count <= 1024:
            raise UsageError(f'--players: got {count}, expected 1 to 1024')
        if not 1 <= together <= count:
            raise UsageError(f'--together: got {together}, expected 1 to the players, {count}')
        cfg = world.cfg
        self.entry = entry or 'head'
        self.world, self.params, self.count, self.together = world, params, count, together
        try:
            self.stream_cfg = dataclasses.replace(cfg.stream, entry=self.entry)
        except ValueError as error:
            raise UsageError(f'--entry {self.entry}: {error}') from error
        self.group, self.per = cfg.stream.group_frames, cfg.frames_per_control
        self.frames = self.group * self.per
        # Shifts from the step that takes a key to the one whose frames were bound to it.
        self.lag = (self.stream_cfg.entry_slot - cfg.stream.context) // self.group
        self.start_frames = 1 + (cfg.stream.frames - 1) * self.per
        self._stream = world.stream(self.entry)

    def compile(self):
        """Compiles everything that a session can ask for; nothing compiles after this."""
        cfg, one = self.world.cfg, jax.ShapeDtypeStruct
        ids = one((1, cfg.dit.text_length), jnp.int32)
        frames = one((1, self.start_frames, cfg.height, cfg.width, 3), jnp.uint8)
        symbols = one((1, self.stream_cfg.remembered), jnp.int32)
        key = _key(0)           # this compiles as well, once
        cond = jax.eval_shape(self.world.condition, self.params, ids, frames, symbols)
        self.like = jax.eval_shape(self._stream.init, self.params, cond, key)
        rows = jax.tree.map(lambda leaf: one((self.count, *leaf.shape), leaf.dtype), self.like)
        text, index = jax.eval_shape(self.world.embed_ids, self.params, ids), one((), jnp.int32)

        def ready(function, *given, donate=()):
            return jax.jit(function, donate_argnums=donate).lower(*given).compile()

        self._condition = ready(self.world.condition, self.params, ids, frames, symbols)
        self._begin = ready(self._stream.init, self.params, cond, key)
        self._embed = ready(self.world.embed_ids, self.params, ids)
        self._read = ready(_read, rows, index)
        self._write = ready(_write, rows, index, self.like, donate=0)
        self._retext = ready(_retext, rows, index, text, donate=0)
        self._step = ready(self._run, self.params, rows, one((self.count, self.group), jnp.int32),
                           one((self.count,), jnp.bool_), donate=1)
        self._rows = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rows)
        return self

    def blank(self):
        """The same programs with slots of their own."""
        other = copy.copy(self)
        other._rows = jax.tree.map(jnp.zeros_like, self._rows)
        return other

    def _run(self, params, rows, symbols, active):
        """One shift of the active slots -> (rows, frames uint8 [N F H W 3], finite [N])."""
        cfg = self.world.cfg
        still = jnp.zeros((self.frames, cfg.height, cfg.width, 3), jnp.uint8)

        def shift(carry, symbols):
            carry, frames = self._stream.step(params, carry, symbols[None])
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry)
                      if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return carry, frames[0], jnp.stack(finite).all()

        def slot(row):
            carry, symbols, active = row
            return jax.lax.cond(active, shift, lambda carry, _: (carry, still, jnp.array(True)),
                                carry, symbols)

        size = self.together if self.together > 1 else None
        return jax.lax.map(slot, (rows, symbols, active), batch_size=size)

    # --- a player's stream, from any thread ----------------------------------------------------

    def condition(self, prompt: str, frames: np.ndarray):
        """What a stream starts from -> (condition on device, the text that did not fit).

        Args:
          prompt: text.
          frames: start clip uint8 [F H W 3], F = `start_frames`.
        """
        ids, cut = self.world.tokenize_and_cut([prompt])
        symbols = np.full((1, self.stream_cfg.remembered), controls.SYMBOLS.index('D'), np.int32)
        ids = np.asarray(ids, np.int32)
        return self._condition(self.params, ids, frames[None], symbols), cut[0]

    def begin(self, condition, seed: int):
        """The carry of a new stream, batch 1."""
        return self._begin(self.params, condition, _key(seed))

    def embed(self, prompt: str):
        """A prompt for `retext` -> (text [1 L D], the text that did not fit)."""
        ids, cut = self.world.tokenize_and_cut([prompt])
        return self._embed(self.params, np.asarray(ids, np.int32)), cut[0]

    # --- the slots, from one thread --------------------------------------------------------------

    def step(self, symbols: np.ndarray, active: np.ndarray):
        """One shift of the active slots.

        Args:
          symbols: int32 [N group_frames].
          active: bool [N].

        Returns:
          (frames uint8 [N F H W 3] on device, whether all numbers of a slot are finite [N]).
        """
        self._rows, frames, finite = self._step(self.params, self._rows, symbols, active)
        return frames, finite

    def write(self, index: int, carry):
        """Puts a carry of batch 1, of host or device, into a slot."""
        self._rows = self._write(self._rows, np.int32(index), carry)

    def read(self, index: int):
        """A copy of a slot's carry on the host."""
        return jax.tree.map(np.array, self._read(self._rows, np.int32(index)))

    def retext(self, index: int, text):
        """Another prompt for a slot, from its next shift on."""
        self._rows = self._retext(self._rows, np.int32(index), text)

    def fingerprint(self) -> str:
        """Of the world's sizes and a sample of every weight: what a saved world must fit."""
        found = hashlib.sha256(repr(self.world.cfg).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
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
    carry, cache = rows
    new = swin.with_text(jax.tree.map(lambda leaf: leaf[index], carry), text)
    return carry.replace(text=carry.text.at[index].set(new.text)), cache
