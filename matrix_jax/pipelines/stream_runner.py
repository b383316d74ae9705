"""One compiled stream of one player: start it, step it with controls, take frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from matrix_jax.parallel import sharding
from matrix_jax.parallel.programs import ProgramSet
from matrix_jax.stream.base import PyTree
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.weights import stored_programs
from matrix_jax.worlds.networks import Params
from matrix_jax.worlds.protocols import World


class StreamRunner:
    """One stream of one world, batch 1.

    Args:
      world, params: from `worlds.load` or `worlds.open_run`.
      control_binding: where controls take effect, 'late' or 'early'; the recipe's choice by
        default.
      load_stored: whether programs that are stored beside the weights are used.

    Attributes:
      stored: whether the programs are those stored beside the weights; else `start` and `compile`
        compile.
      note: line for the user about stored programs that do not fit, or ''.
    """

    def __init__(
        self,
        world: World,
        params: Params,
        control_binding: str | None = None,
        load_stored: bool = True,
    ) -> None:
        params, decoder_params = world.split_decoder(world.stream_params(params))
        self.world, self.params = world, params
        self._mesh = sharding.mesh_of(params)
        self._pipeline, self.note, found = None, '', {}
        self._binding = control_binding or world.cfg.stream.control_binding
        if decoder_params is None:
            self._stream = world.stream(control_binding)
            self._prefills = self._stream.prefill is not self._stream.step
            if load_stored:
                found, self.note = stored_programs.find(world.programs_folder, self.key(), params)
        else:
            stages = world.stages(control_binding)
            self._pipeline = Pipeline(**stages, params=(params, decoder_params))
            self._prefills = stages['decoder_seed'] is None
        self.stored = bool(found)
        self._programs = ProgramSet(self._mesh, found)

    def key(self) -> stored_programs.Key:
        """Returns what the programs are compiled for."""
        stream = f'video, {self._binding} controls'
        folder = self.world.programs_folder
        return stored_programs.make_key(repr(self.world.cfg), stream, self.params, folder)

    def start(
        self,
        prompt: str,
        frames: np.ndarray | None,
        known: list[str],
        seed: int,
        steps: Sequence[list[str]] = (),
    ) -> tuple[PyTree, str]:
        """Starts a stream.

        Args:
          prompt: text.
          frames: start frames uint8 [F H W 3].
          known: controls of the start, the first result of `world.split_controls`.
          seed: seed of all noise.
          steps: controls of the coming steps. With them, and without a mesh, the programs of
            `compile` are compiled at the same time as those of the start.

        Returns:
          (carry, the end of the prompt that the network does not read).
        """
        inputs, cut = self.world.inputs(prompt, frames, known)
        key = jax.random.split(jax.random.key(seed), 1)
        made = self.compile_all(inputs, key, steps if self._mesh is None else ())
        with sharding.use_mesh(self._mesh):
            condition = made['condition'](self.params, *inputs)
            init = self._pipeline.init if self._pipeline else made['init']
            return init(self.params, condition, key), cut

    def compile_all(
        self, inputs: tuple, key: jax.Array, steps: Sequence[list[str]]
    ) -> dict[str, Any]:
        """Compiles the programs of the start, and of the given steps -> programs by name.

        Args:
          inputs: of `world.inputs`.
          key: key of the noise [1].
          steps: controls of the coming steps, or none of them.
        """
        programs = self._programs
        condition = programs.add(
            'condition', self.world.condition, self.params, *inputs, fast_compile=True
        )
        if self._pipeline is None:
            carry = programs.add(
                'init', self._stream.init, self.params, condition, key, fast_compile=True
            )
            if steps:
                self._add_steps(carry, steps)
        return programs.finish()

    def _add_steps(self, carry: PyTree, steps: Sequence[list[str]]) -> None:
        if self._prefills:
            controls, steps = self._encode(steps[0]), steps[1:]
            carry, _ = self._programs.add(
                'prefill', self._stream.prefill, self.params, carry, controls, donate=1
            )
        if steps:
            controls = self._encode(steps[0])
            self._programs.add(
                'step',
                self._stream.step,
                self.params,
                carry,
                controls,
                donate=1,
                out_like=(carry, None),
            )

    def compile(self, carry: PyTree, steps: list[list[str]]) -> tuple[PyTree, jax.Array | None]:
        """Compiles the step for a carry and the controls of the coming steps, if not yet compiled.

        Returns:
          (carry, frames). A first step that differs from the others is made here; frames are None
          if there is no such step.
        """
        frames = None
        if self._pipeline is None:
            self._add_steps(carry, steps)
            made = self._programs.finish()
            if self._prefills:
                with sharding.use_mesh(self._mesh):
                    carry, frames = made['prefill'](self.params, carry, self._encode(steps[0]))
            return carry, frames
        with sharding.use_mesh(self._mesh):
            if self._prefills:
                carry, frames = self._pipeline.prefill(self.params, carry, self._encode(steps[0]))
                steps = steps[1:]
            if steps:
                self._pipeline.compile(self.params, carry, self._encode(steps[0]))
        return carry, frames

    def step(self, carry: PyTree, controls: list[str]) -> tuple[PyTree, jax.Array]:
        """Makes one step after `compile` -> (carry, frames uint8 [B F H W 3] on the device)."""
        step = self._pipeline.step if self._pipeline else self._programs.compiled['step']
        return step(self.params, carry, self._encode(controls))

    def _encode(self, controls: list[str]) -> Any:
        return self.world.vocabulary.encode(controls)[None]
