"""One compiled program that steps the streams of several players.

Every slot holds the carry of one stream (batch 1). A step runs over all slots, one after the other
(`jax.lax.map`) or `together` at a time. With `together=1` an inactive slot costs nothing. Every
slot runs the same instructions on its own numbers, so no player can change another player's frames,
not even by one bit.

If the parameters lie on a mesh, the programs are compiled for that mesh. If the decoder has a mesh
of its own, the network and the decoder form a pipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from matrix_jax.config import UsageError
from matrix_jax.parallel import sharding
from matrix_jax.parallel.programs import ProgramSet
from matrix_jax.stream.base import Stream, StreamDecoder, prefilled
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.weights import stored_programs
from matrix_jax.worlds.protocols import TextWorld, World


class BatchedStream:
    """The compiled programs of a world, and one carry per slot.

    `condition`, `init` and `embed_prompt` may be called from any thread; everything else belongs to
    one thread.

    Args:
      world, params: as returned by `worlds.open_run`.
      num_slots: number of slots.
      control_binding: 'early' (the default) shows keys sooner; 'late' is as published.
      together: slots that are computed side by side.

    Attributes:
      steps_ahead: steps that should be submitted before the frames of an earlier step are ready.
      mesh: name of the devices, for users and logs.
      controls_per_step, frames_per_step: controls and pixel frames of a step.
      lag: steps from the one that takes a control to the one that shows it.
      carry_shapes: tree of `jax.ShapeDtypeStruct` of one slot's carry; set by `compile`.
      stored: whether the programs are those stored beside the weights.
      note: line for the user about stored programs that do not fit, or ''.

    Raises:
      UsageError: the world does not stream, or an argument is out of range.
    """

    def __init__(
        self,
        world: World | TextWorld,
        params,
        num_slots: int,
        control_binding: str | None = None,
        together: int = 1,
    ):
        if world.cfg.clip:
            raise UsageError(
                'this model makes whole clips; only a model that streams can be '
                'played (stages 3 and 4)'
            )
        if not 1 <= num_slots <= 1024:
            raise UsageError(f'--players: got {num_slots}, expected 1 to 1024')
        if not 1 <= together <= num_slots:
            raise UsageError(f'--together: got {together}, expected 1 to the players, {num_slots}')
        cfg = world.cfg
        self.control_binding = control_binding or 'early'
        self._weights = params = world.stream_params(params)
        params, decoder_params = world.split_decoder(params)
        self.world: World | TextWorld = world
        self.params = params
        self.mesh = ' | '.join(map(sharding.device_names, filter(None, (params, decoder_params))))
        self.num_slots, self.together = num_slots, together
        try:
            stream_cfg = cfg.stream.with_control_binding(self.control_binding)
        except ValueError as error:
            raise UsageError(f'--entry {self.control_binding}: {error}') from error
        self.controls_per_step, self.lag = stream_cfg.controls_per_step, stream_cfg.lag
        self.frames_per_step = self.controls_per_step * world.vocabulary.frames_per_control
        self.start_frames = world.start_frames
        self.idle = self.encode(world.vocabulary.idle)
        self._frame_shape = (self.frames_per_step, cfg.height, cfg.width, 3)
        self._origin: tuple | None = None  # arguments of `open_stream`, if it made this
        self._pipeline, self.steps_ahead = None, 0
        idle = [world.vocabulary.idle] * world.first_step_controls
        self._first_control = world.vocabulary.encode(idle)[None]
        if decoder_params is None:
            self._stream = prefilled(world.stream(self.control_binding), self._first_control)
            self._programs, self.note = stored_programs.find(
                world.programs_folder, self.key(), params
            )
        else:
            self._pipeline = self._make_pipeline((params, decoder_params))
            self.steps_ahead, self._programs, self.note = 1, {}, ''

    @property
    def stored(self) -> bool:
        return bool(self._programs)

    def compile(self) -> BatchedStream:
        """Compiles or loads every program that a session can need; nothing compiles after this."""
        self._use(self.compile_all(self._programs))
        self._slots = _zeros(jax.tree.map(self._add_slot_axis, self.carry_shapes))
        return self

    def key(self) -> stored_programs.Key:
        """Returns what the programs are compiled for."""
        stream = (
            f'{self.num_slots} players, {self.together} at a time, {self.control_binding} controls'
        )
        folder = self.world.programs_folder
        return stored_programs.make_key(repr(self.world.cfg), stream, self._weights, folder)

    def compile_all(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Returns every program by name, and sets `carry_shapes`; those in `stored` are kept."""
        world = self.world
        programs = ProgramSet(sharding.mesh_of(self.params), stored)
        frames = np.zeros((self.start_frames, world.cfg.height, world.cfg.width, 3), np.uint8)
        inputs, _ = world.inputs('', frames)
        key = _key(0)  # compiles the key program as well
        index = jax.ShapeDtypeStruct((), jnp.int32)
        controls = jax.ShapeDtypeStruct((self.num_slots, *self.idle.shape), self.idle.dtype)
        active = jax.ShapeDtypeStruct((self.num_slots,), jnp.bool_)

        cond = programs.add('condition', world.condition, self.params, *inputs)
        if self._pipeline:
            cond = sharding.output_shapes(programs.finish()['condition'])
            self.carry_shapes = self._pipeline.compile_init(self.params, cond, key)
        else:
            self.carry_shapes = programs.add('init', self._stream.init, self.params, cond, key)
        slots = jax.tree.map(self._add_slot_axis, self.carry_shapes)
        if self._pipeline:
            self._pipeline.compile(self.params, slots, (controls, active))
        else:
            programs.add(
                'step',
                self._map_slots(self._stream.step, self._frame_shape, jnp.uint8),
                self.params,
                slots,
                (controls, active),
                donate=1,
                out_like=(slots, None),
            )
        # The carries of the network and of the decoder may lie on different devices.
        for number, (part, one) in enumerate(zip(slots, self.carry_shapes, strict=True)):
            mesh = sharding.mesh_of(part)
            programs.add(f'read{number}', _read, part, index, out_like=one, mesh=mesh)
            programs.add(
                f'write{number}', _write, part, index, one, donate=0, out_like=part, mesh=mesh
            )
        if world.reads_text:
            ids = jax.ShapeDtypeStruct((1, world.cfg.dit.text_length), jnp.int32)
            text = programs.add('embed', cast(TextWorld, world).embed_ids, self.params, ids)
            with_prompt = world.latents(self.control_binding).with_prompt

            def set_prompt(carries, index, text):
                return _write(carries, index, with_prompt(_read(carries, index), text))

            carries = slots[0]
            programs.add('set_prompt', set_prompt, carries, index, text, donate=0, out_like=carries)
        return programs.finish()

    def _use(self, made: dict[str, Any]) -> None:
        """Calls these programs from now on."""
        self._condition = made['condition']
        if self._pipeline:
            self._init, self._step = self._pipeline.init, self._pipeline.step
        else:
            self._init, self._step = made['init'], made['step']
        parts = range(len(self.carry_shapes))
        self._read = [made[f'read{number}'] for number in parts]
        self._write = [made[f'write{number}'] for number in parts]
        self._embed, self._set_prompt = made.get('embed'), made.get('set_prompt')

    def __deepcopy__(self, _) -> BatchedStream:
        """As `empty_copy`: programs and parameters are shared."""
        return self.empty_copy()

    def __reduce__(self):
        """A pickle holds the recipe; loading it opens the weights and compiles."""
        if self._origin is None:
            raise TypeError('a stream that `open_stream` did not make has no recipe to pickle')
        return _reopen, self._origin

    def empty_copy(self) -> BatchedStream:
        """The same programs with empty slots of their own."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._slots = _zeros(self._slots)
        return other

    def _add_slot_axis(self, leaf):
        """Shape and sharding of a carry's leaf for all slots."""
        place = leaf.sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return jax.ShapeDtypeStruct((self.num_slots, *leaf.shape), leaf.dtype, sharding=place)

    def _map_slots(self, step, shape, dtype):
        """Maps a step of batch 1 over the active slots.

        Returns:
          `(params, slots, (inputs [N ...], active [N])) -> (slots, (output [N *shape], finite
          [N]))`; an inactive slot gives zeros.
        """

        def run(params, slots, inputs):
            nothing = jnp.zeros(shape, dtype), jnp.array(True)

            def step_slot(carry, given):
                carry, output = step(params, carry, given[None])
                finite = [
                    jnp.isfinite(leaf).all()
                    for leaf in jax.tree.leaves(carry)
                    if jnp.issubdtype(leaf.dtype, jnp.floating)
                ]
                return carry, (output[0], jnp.stack(finite).all())

            def run_slot(slot):
                carry, given, active = slot
                return jax.lax.cond(
                    active, step_slot, lambda carry, _: (carry, nothing), carry, given
                )

            size = self.together if self.together > 1 else None
            return jax.lax.map(run_slot, (slots, *inputs), batch_size=size)

        return run

    def _make_pipeline(self, params) -> Pipeline:
        """The slots with the network on one mesh and the decoder on another."""
        stages, cfg = self.world.stages(self.control_binding), self.world.cfg
        scale = cfg.vae.spatial_compression
        latent_shape = (
            cfg.stream.step_frames,
            cfg.height // scale,
            cfg.width // scale,
            cfg.vae.latent_channels,
        )
        denoise_slots = self._map_slots(stages['stream'].step, latent_shape, jnp.float32)
        decode_slots = self._map_slots(stages['decoder'].step, self._frame_shape, jnp.uint8)

        def step(params, slots, inputs):
            slots, (latents, finite) = denoise_slots(params, slots, inputs)
            return slots, (latents, finite, inputs[1])

        def decode(params, slots, inputs):
            latents, finite_latents, active = inputs
            slots, (frames, finite) = decode_slots(params, slots, (latents, active))
            return slots, (frames, finite & finite_latents)

        return Pipeline(
            Stream(stages['stream'].init, stages['stream'].prefill, step),
            StreamDecoder(stages['decoder'].prefill, decode),
            stages['decoder_seed'],
            params,
            first_control=self._first_control,
        )

    # --- one player's stream, from any thread --------------------------------------------------

    def condition(self, prompt: str, frames: np.ndarray):
        """Encodes the start of a stream -> (condition on the device, prompt text that did not fit).

        Args:
          prompt: text.
          frames: start clip uint8 [F H W 3], F = `start_frames`.
        """
        inputs, cut = self.world.inputs(prompt, frames)
        return self._condition(self.params, *inputs), cut

    def init(self, condition, seed: int):
        """The carry of a new stream, batch 1."""
        return self._init(self.params, condition, _key(seed))

    def embed_prompt(self, prompt: str):
        """Encodes a prompt for `set_prompt` -> (text [1 L D], prompt text that did not fit)."""
        ids, cut = self.world.tokenize_and_cut([prompt])
        return self._embed(self.params, np.asarray(ids, np.int32)), cut[0]

    # --- all slots, from one thread ------------------------------------------------------------

    def encode(self, control: str) -> np.ndarray:
        """Encodes a control that is held during a whole step."""
        return self.world.vocabulary.encode([control] * self.controls_per_step)

    def step(self, controls: np.ndarray, active: np.ndarray):
        """Steps the active slots.

        Args:
          controls: the output of `encode` for each slot [N ...].
          active: bool [N].

        Returns:
          (frames uint8 [N F H W 3] on the device, whether all numbers of a slot are finite [N]).
        """
        self._slots, output = self._step(self.params, self._slots, (controls, active))
        return output

    def write(self, index: int, carry):
        """Writes a carry of batch 1, on the host or the device, into a slot."""
        self._slots = tuple(
            write(part, np.int32(index), new)
            for write, part, new in zip(self._write, self._slots, carry, strict=True)
        )

    def read_async(self, index: int):
        """A copy of a slot's carry on the device; does not wait for it."""
        return tuple(
            read(part, np.int32(index)) for read, part in zip(self._read, self._slots, strict=True)
        )

    def read(self, index: int):
        """A copy of a slot's carry on the host."""
        return jax.tree.map(np.array, self.read_async(index))

    def set_prompt(self, index: int, text):
        """Changes the prompt of a slot from its next step on; `text` is from `embed_prompt`."""
        carries, caches = self._slots
        self._slots = self._set_prompt(carries, np.int32(index), text), caches

    def fingerprint(self) -> str:
        """Hash of the world's config and of a sample of every weight; a saved world must match."""
        found = hashlib.sha256(self.world.fingerprint_text().encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._weights):
            sample = np.asarray(leaf.ravel()[:64].astype(jnp.float32))
            found.update(f'{jax.tree_util.keystr(path)} {leaf.shape}'.encode() + sample.tobytes())
        return found.hexdigest()[:16]


def open_stream(
    run,
    num_slots: int,
    control_binding: str | None = None,
    together: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[BatchedStream, Path]:
    """Opens and compiles the world of a recipe -> (stream, weights folder).

    Args:
      run: the recipe.
      num_slots, control_binding, together: as of `BatchedStream`.
      say: called with lines of progress.
    """
    from matrix_jax import worlds
    from matrix_jax.weights import diffusers_layout

    world, params = worlds.open_run(run, split_decoder=True)
    stream = BatchedStream(world, params, num_slots, control_binding, together)
    if stream.note:
        say(f'note: {stream.note}')
    if not stream.stored:
        say(f'compiling {run.name} for {num_slots} players')
    stream.compile()
    stream._origin = run, num_slots, control_binding, together
    return stream, diffusers_layout.resolve(run.weights)


def _reopen(*origin) -> BatchedStream:
    """The stream of `open_stream`."""
    return open_stream(*origin)[0]


def _zeros(slots):
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), slots
    )


def _key(seed: int):
    return jax.random.split(jax.random.key(seed), 1)


def _read(slots, index):
    return jax.tree.map(lambda leaf: leaf[index], slots)


def _write(slots, index, carry):
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new.astype(leaf.dtype)), slots, carry)
