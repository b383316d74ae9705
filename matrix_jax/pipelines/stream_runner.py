"""One compiled stream of one player: start it, step it with controls, take frames."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import PyTree
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.worlds.networks import Params
from matrix_jax.worlds.protocols import World


class StreamRunner:
    """One stream of one world, batch 1.

    Args:
      world, params: from `worlds.load` or `worlds.open_run`.
      control_binding: where controls take effect, 'late' or 'early'; the recipe's choice by
        default.
    """

    def __init__(self, world: World, params: Params, control_binding: str | None = None) -> None:
        params, decoder_params = world.split_decoder(params)
        self.world, self.params = world, params
        self._mesh = sharding.mesh_of(params)
        self._condition = compilation.jit(world.condition, fast_compile=True)
        self._pipeline = self._prefill = None
        if decoder_params is None:
            stream = world.stream(control_binding)
            self._init, self._step = compilation.jit(stream.init, fast_compile=True), stream.step
            if stream.prefill is not stream.step:
                self._prefill = compilation.jit(stream.prefill, donate_argnums=1)
        else:
            stages = world.stages(control_binding)
            self._pipeline = Pipeline(**stages, params=(params, decoder_params))
            self._init, self._step = self._pipeline.init, self._pipeline.step
            if stages['decoder_seed'] is None:
                self._prefill = self._pipeline.prefill

    def start(
        self, prompt: str, frames: np.ndarray | None, known: list[str], seed: int
    ) -> tuple[PyTree, str]:
        """Starts a stream.

        Args:
          prompt: text.
          frames: start frames uint8 [F H W 3].
          known: controls of the start, the first result of `world.split_controls`.
          seed: seed of all noise.

        Returns:
          (carry, the end of the prompt that the network does not read).
        """
        inputs, cut = self.world.inputs(prompt, frames, known)
        key = jax.random.split(jax.random.key(seed), 1)
        with sharding.use_mesh(self._mesh):
            condition = self._condition(self.params, *inputs)
            return self._init(self.params, condition, key), cut

    def compile(self, carry: PyTree, steps: list[list[str]]) -> tuple[PyTree, jax.Array | None]:
        """Compiles the step for a carry and the controls of the coming steps, if not yet compiled.

        Returns:
          (carry, frames). A first step that differs from the others is made here; frames are None
          if there is no such step.
        """
        frames = None
        with sharding.use_mesh(self._mesh):
            if self._prefill:
                carry, frames = self._prefill(self.params, carry, self._encode(steps[0]))
                steps = steps[1:]
            if steps and self._pipeline:
                self._pipeline.compile(self.params, carry, self._encode(steps[0]))
            elif steps and not isinstance(self._step, jax.stages.Compiled):
                step = compilation.jit(
                    self._step,
                    donate_argnums=1,
                    out_shardings=(sharding.tree_shardings(carry), None),
                )
                self._step = step.lower(self.params, carry, self._encode(steps[0])).compile()
        return carry, frames

    def step(self, carry: PyTree, controls: list[str]) -> tuple[PyTree, jax.Array]:
        """Makes one step after `compile` -> (carry, frames uint8 [B F H W 3] on the device)."""
        return self._step(self.params, carry, self._encode(controls))

    def _encode(self, controls: list[str]) -> Any:
        return self.world.vocabulary.encode(controls)[None]
