"""The two programs of a world in a browser tab: `start` and `step`, as ONNX.

    start: frames uint8 [1 F H W 3], noise             -> carry
    step:  control [1 N ...], noise, carry             -> frames uint8 [1 F H W 3], carry

`step` is network and streaming decoder in one graph. The carry is flat: each leaf has its name in
the carry of `World.stream`, such as '0.window'; what a step returns has `next.` in front. Leaves
that no step reads, such as the key, are left out, and a step returns only those that it changes.
Noise is an input of each program, because the generator of jax stays here: a tab that draws its own
noise shows other frames than jax with the same seed, and the same frames with the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from matrix_jax.browser import flatten, fuse, primitives, weights
from matrix_jax.browser.graph import Graph
from matrix_jax.stream import base
from matrix_jax.stream.base import PyTree
from matrix_jax.worlds.networks import Params
from matrix_jax.worlds.protocols import World

CONTROL_BINDING = 'early'  # as in the player: a key is seen soonest
FRAMES, CONTROL = 'frames', 'control'


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of a program.

    Attributes:
      name: in the program.
      shape: its shape.
      dtype: name of its numpy type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program as ONNX.

    Attributes:
      model: `onnx.ModelProto`, whose parameters lie in the file `weights`.
      noise: its inputs of standard normal numbers.
      carry: leaves of the carry that it reads (step) or makes (start).
      changed: names of the leaves that a step changes.
    """

    model: Any
    noise: tuple[Tensor, ...]
    carry: tuple[Tensor, ...]
    changed: tuple[str, ...]


class WebWorld:
    """What is exported of a world, traced once.

    Args:
      world, params: from `worlds.open_run`.

    Attributes:
      stream: the stream whose steps are all alike.
      idle: control of a step while no key is pressed [1 N ...].
      carry: shapes of the stream's carry.
      static: leaves of the condition that do not depend on the start frames, by index.
    """

    def __init__(self, world: World, params: Params) -> None:
        self.world, self.params = world, params
        words = world.vocabulary
        first = words.encode([words.idle] * world.first_step_controls)[None]
        self.idle = words.encode([words.idle] * world.cfg.stream.controls_per_step)[None]
        self.stream = base.prefilled(world.stream(CONTROL_BINDING), first)
        self._shapes = jax.tree.map(_shape, params)
        size = world.start_frames, world.cfg.height, world.cfg.width, 3
        self.frames = jax.ShapeDtypeStruct((1, *size), np.uint8)
        inputs, _ = world.inputs('', np.zeros(size, np.uint8))
        # The frames are the only input of this shape; the others are ids and symbols.
        self._place = [np.shape(one) for one in inputs].index(self.frames.shape)
        self._inputs = tuple(inputs)
        self.static = self._static_condition()
        key = jax.ShapeDtypeStruct((1, 2), jnp.uint32)
        cond = jax.eval_shape(self._condition, self._shapes, self.frames)
        self.carry = jax.eval_shape(self.stream.init, self._shapes, cond, key)

    def _condition(self, params: Params, frames: Any) -> Any:
        inputs = list(self._inputs)
        inputs[self._place] = frames
        return self.world.condition(params, *inputs)

    def _static_condition(self) -> dict[int, np.ndarray]:
        """Encoded text and the like, which stays out of the programs: it is computed here."""
        closed = jax.make_jaxpr(self._condition)(self._shapes, self.frames)
        reached = {closed.jaxpr.invars[-1]}
        for eqn in closed.jaxpr.eqns:
            if any(one in reached for one in eqn.invars if not isinstance(one, core.Literal)):
                reached |= set(eqn.outvars)
        outputs = closed.jaxpr.outvars
        fixed = [
            index
            for index, one in enumerate(outputs)
            if isinstance(one, core.Literal) or one not in reached
        ]

        def compute(params: Params) -> list[Any]:
            leaves = jax.tree.leaves(self._condition(params, jnp.zeros(self.frames.shape, 'uint8')))
            return [leaves[index] for index in fixed]

        made = jax.jit(compute)(self.params) if fixed else []
        return {index: np.asarray(one) for index, one in zip(fixed, made, strict=True)}

    # --- the functions, with noise as an input ---------------------------------------------------

    def start(self, params: Params, frames: Any, noise: tuple[Any, ...]) -> PyTree:
        """Returns the carry of a stream that continues start frames uint8 [1 F H W 3]."""
        leaves, tree = jax.tree.flatten(self._condition(params, frames))
        given = [self.static.get(index, one) for index, one in enumerate(leaves)]
        cond = jax.tree.unflatten(tree, given)
        with base.noise_from(_Given(noise)):
            return self.stream.init(params, cond, np.zeros((1, 2), np.uint32))

    def step(
        self, params: Params, carry: PyTree, control: Any, noise: tuple[Any, ...]
    ) -> tuple[PyTree, jax.Array]:
        """Makes a step with its noise given -> (carry, frames uint8 [1 F H W 3])."""
        with base.noise_from(_Given(noise)):
            return self.stream.step(params, carry, control)

    def noise_shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of the noise of 'start' or 'step', in the order of their use."""
        found = _Found()
        with base.noise_from(found):
            if name == 'start':
                cond = jax.eval_shape(self._condition, self._shapes, self.frames)
                key = jax.ShapeDtypeStruct((1, 2), jnp.uint32)
                jax.eval_shape(lambda *args: self.stream.init(*args), self._shapes, cond, key)
            else:
                args = self._shapes, self.carry, _shape(self.idle)
                jax.eval_shape(lambda *args: self.stream.step(*args), *args)
        return tuple(found.shapes)

    def carry_names(self) -> list[str]:
        """Returns the names of the carry's leaves."""
        return names(self.carry)

    # --- ONNX ------------------------------------------------------------------------------------

    def export(
        self, bits: int, store: weights.Store, file: str, names: Sequence[str] = ('start', 'step')
    ) -> dict[str, Exported]:
        """Returns programs by name.

        Args:
          bits: of the weights, 32, 16 or 8.
          store: gets the weights of all.
          file: name of the file with the weights, beside the programs.
          names: which programs; 'step' is among them.

        Raises:
          UsageError: a program uses what has no ONNX form.
        """
        carry = list(zip(self.carry_names(), jax.tree.leaves(self.carry), strict=True))
        made = {'step': _Export(self, bits, store, file).step(carry)}
        if 'start' in names:
            wanted = [one.name for one in made['step'].carry]
            made['start'] = _Export(self, bits, store, file).start(wanted)
        return made


class _Export:
    """One program on its way to ONNX."""

    def __init__(self, web: WebWorld, bits: int, store: weights.Store, file: str) -> None:
        self.web, self.bits, self.store, self.file = web, bits, store, file
        self.graph = Graph()

    def step(self, carry: list[tuple[str, Any]]) -> Exported:
        web, graph = self.web, self.graph
        tree = jax.tree.structure(web.carry)

        def call(params: Params, leaves: Any, control: Any, noise: Any) -> Any:
            new, frames = web.step(params, jax.tree.unflatten(tree, leaves), control, noise)
            return jax.tree.leaves(new), frames

        noise = self._noise('step')
        leaves = [one for _, one in carry]
        args = web._shapes, leaves, _shape(web.idle), [_struct(one) for one in noise]
        program = flatten.flatten(call, *args)
        used = program.used()
        count = len(jax.tree.leaves(web._shapes))
        variables = program.inputs[count : count + len(carry)]
        changed = [out is not var for out, var in zip(program.outputs, variables)]
        kept = [
            _tensor(name, shape)
            for (name, shape), var, moved in zip(carry, variables, changed)
            if shape.size and (moved or _reads(program, var))
        ]
        inputs = self._parameters(program, used)
        inputs += [
            graph.input(name, shape.shape, shape.dtype)
            if any(name == one.name for one in kept)
            else graph.constant(np.zeros(shape.shape if not shape.size else (), shape.dtype))
            for name, shape in carry
        ]
        inputs.append(graph.input(CONTROL, web.idle.shape, web.idle.dtype))
        inputs += [graph.input(one.name, one.shape, one.dtype) for one in noise]
        *outputs, frames = primitives.write(graph, program, inputs)
        graph.output(FRAMES, frames)
        moved = []
        for (name, _), value, one in zip(carry, outputs, changed, strict=True):
            if one and any(name == tensor.name for tensor in kept):
                graph.output(f'next.{name}', value)
                moved.append(name)
        return Exported(self._model(), tuple(noise), tuple(kept), tuple(moved))

    def start(self, wanted: list[str]) -> Exported:
        web, graph = self.web, self.graph
        places = [web.carry_names().index(name) for name in wanted]

        def call(params: Params, frames: Any, noise: Any) -> Any:
            leaves = jax.tree.leaves(web.start(params, frames, noise))
            return [leaves[place] for place in places]

        noise = self._noise('start')
        program = flatten.flatten(call, web._shapes, web.frames, [_struct(one) for one in noise])
        inputs = self._parameters(program, program.used())
        inputs.append(graph.input(FRAMES, web.frames.shape, web.frames.dtype))
        inputs += [graph.input(one.name, one.shape, one.dtype) for one in noise]
        shapes = jax.tree.leaves(web.carry)
        outputs = primitives.write(graph, program, inputs)
        for name, value in zip(wanted, outputs, strict=True):
            graph.output(name, value)
        carry = tuple(_tensor(name, shapes[place]) for name, place in zip(wanted, places))
        return Exported(self._model(), tuple(noise), carry, ())

    def _noise(self, name: str) -> list[Tensor]:
        shapes = self.web.noise_shapes(name)
        return [Tensor(f'noise.{index}', one, 'float32') for index, one in enumerate(shapes)]

    def _parameters(self, program: flatten.FlatProgram, used: set[Any]) -> list[Any]:
        """Values of all parameters; those that the program does not read are empty."""
        values = []
        leaves = jax.tree.leaves(self.web.params)
        for var, name, leaf in zip(program.inputs, names(self.web.params), leaves):
            if var not in used:
                values.append(self.graph.constant(np.zeros((), np.float32)))
                continue
            packed = weights.pack(np.asarray(leaf), self.bits)
            values.append(weights.read(self.graph, name, packed))
        return values

    def _model(self) -> Any:
        fuse.fuse(self.graph)
        tensors = [
            weights.tensor(name, one, self.file, self.store.add(name, one))
            for name, one in self.graph.parameters.items()
        ]
        return self.graph.model(tensors)


class _Found:
    """Notes the shapes of all noise."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> jax.Array:
        self.shapes.append(tuple(map(int, shape)))
        return jnp.zeros(shape, jnp.float32)


class _Given:
    """Hands out noise that is given, in order."""

    def __init__(self, noise: Any) -> None:
        self._rest = iter(noise)

    def __call__(self, shape: tuple[int, ...]) -> Any:
        return next(self._rest)


def names(tree: PyTree) -> list[str]:
    """Returns the names of a tree's leaves, such as '0.window'."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator='.') for path in paths]


def text_leaf(web: WebWorld) -> str | None:
    """Returns the name of the carry's leaf that holds the encoded prompt, if there is one."""
    change = web.stream.with_prompt
    if change is None:
        return None
    found = names(web.carry)
    numbered = jax.tree.unflatten(
        jax.tree.structure(web.carry),
        [
            np.full(one.shape, index, np.int32)
            for index, one in enumerate(jax.tree.leaves(web.carry))
        ],
    )
    for name, shape in zip(found, jax.tree.leaves(web.carry), strict=True):
        if not name.endswith('.text'):
            continue
        changed = change(numbered, np.full(shape.shape, -1, np.int32))
        [place] = [
            index
            for index, one in enumerate(jax.tree.leaves(changed))
            if np.any(np.asarray(one) == -1)
        ]
        return found[place]
    return None


def _reads(program: flatten.FlatProgram, var: Any) -> bool:
    """Whether an equation reads a variable."""
    return any(var is one for eqn in program.equations for one in eqn.invars)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def _struct(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def _tensor(name: str, shape: Any) -> Tensor:
    return Tensor(name, tuple(shape.shape), np.dtype(shape.dtype).name)
