"""An ONNX graph while it is built, without repeated nodes or constants."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

OPSET = 21
IR_VERSION = 10


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Broadcasts wait: an axis that is only repeated has size 1 in the graph until an operator needs
    it whole, because elementwise operators of ONNX repeat it by themselves.

    Attributes:
      name: in the graph.
      shape: its shape in the program.
      held: its shape in the graph, equal to `shape` or 1 on each axis.
      dtype: numpy type.
      constant: its value [held], if it is known.
    """

    name: str
    shape: tuple[int, ...]
    held: tuple[int, ...]
    dtype: np.dtype
    constant: np.ndarray | None = None


class Graph:
    """Nodes, constants, inputs and outputs.

    Attributes:
      nodes: `onnx.NodeProto`s in order.
      constants: name -> array.
      parameters: the same of what lies in a file beside the graph.
      shapes: name of a value -> its shape in the graph.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.parameters: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._reshaped: dict[str, str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._made: dict[Any, list[str]] = {}
        self._count = 0

    # --- values ----------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int], dtype: Any) -> Value:
        """Adds an input."""
        self._inputs.append(_info(name, shape, dtype))
        self.shapes[name] = tuple(shape)
        return Value(name, tuple(shape), tuple(shape), np.dtype(dtype))

    def output(self, name: str, value: Value) -> None:
        """Adds an output."""
        value = self.full(value)
        self.nodes.append(make_node('Identity', [value.name], [name]))
        self._outputs.append(_info(name, value.shape, value.dtype))

    def constant(self, array: Any) -> Value:
        """Adds a constant; axes along which it repeats are held once."""
        array = np.asarray(array)
        shape, held = array.shape, array
        for axis, size in enumerate(shape):
            first = held[(slice(None),) * axis + (slice(0, 1),)]
            # Bits, not numbers: 0 and -0 differ, and NaN equals itself.
            if size > 1 and np.array_equal(_bits(held), _bits(np.broadcast_to(first, held.shape))):
                held = first
        held = np.ascontiguousarray(held).reshape(held.shape)
        key = ('constant', held.dtype.str, held.shape, held.tobytes())
        if key not in self._made:
            self._made[key] = [self.named(held.shape)]
            self.constants[self._made[key][0]] = held
        return Value(self._made[key][0], shape, held.shape, held.dtype, held)

    def parameter(self, name: str, array: np.ndarray) -> Value:
        """Adds a tensor that lies in a file beside the graph."""
        self.parameters[name] = array
        self.shapes[name] = array.shape
        return Value(name, array.shape, array.shape, array.dtype)

    def integers(self, numbers: Sequence[int]) -> str:
        """Adds a list of int64, as operators take axes and shapes; returns its name."""
        return self.constant_name(np.array(list(numbers), np.int64))

    def constant_name(self, array: np.ndarray) -> str:
        """Adds a constant as it is; returns its name."""
        key = ('whole', array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = [self.named(array.shape)]
            self.constants[self._made[key][0]] = array
        return self._made[key][0]

    def full(self, value: Value) -> Value:
        """Returns a value with all its axes repeated."""
        if value.held == value.shape:
            return value
        return self.node('Expand', [value.name, self.integers(value.shape)], value)

    # --- nodes -----------------------------------------------------------------------------------

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        like: Value,
        held: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        **attributes: Any,
    ) -> Value:
        """Adds a node with one output.

        Args:
          operator: of ONNX.
          inputs: names of its inputs.
          like: gives the shape and type of the output where they are not given.
          held: shape of the output in the graph; `shape` by default.
          shape: shape of the output in the program.
          dtype: type of the output.
          attributes: of the node.
        """
        shape = like.shape if shape is None else tuple(shape)
        held = shape if held is None else tuple(held)
        if operator == 'Reshape':
            inputs = [self._reshaped.get(inputs[0], inputs[0]), *inputs[1:]]
            if self.shapes[inputs[0]] == held:
                return Value(inputs[0], shape, held, np.dtype(dtype or like.dtype))
        name = self.nodes_of(operator, inputs, 1, **attributes)[0]
        self.shapes[name] = held
        if operator == 'Reshape':
            self._reshaped[name] = inputs[0]
        return Value(name, shape, held, np.dtype(dtype or like.dtype))

    def nodes_of(
        self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> list[str]:
        """Adds a node, unless there is one like it; returns the names of its outputs."""
        key = operator, tuple(inputs), outputs, repr(sorted(attributes.items()))
        if key not in self._made or operator == 'If':
            self._made[key] = [self._name() for _ in range(outputs)]
            self.nodes.append(make_node(operator, inputs, self._made[key], **attributes))
        return self._made[key]

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[list[Any]]:
        """Collects the nodes of a branch, which sees all values made before it.

        Yields a list that holds the branch, an `onnx.GraphProto`, afterwards; the caller puts the
        outputs into it.
        """
        from onnx import helper

        nodes, made, outputs = self.nodes, dict(self._made), []
        self.nodes = []
        yield outputs
        infos = []
        for index, value in enumerate(outputs):
            value, result = self.full(value), f'{name}_{self._name()}_{index}'
            self.nodes.append(make_node('Identity', [value.name], [result]))
            infos.append(_info(result, value.shape, value.dtype))
        outputs[:] = [helper.make_graph(self.nodes, name, [], infos)]
        # Constants stay: they belong to the whole graph. Nodes of a branch are not seen outside.
        kept = {key: one for key, one in self._made.items() if key[0] in ('constant', 'whole')}
        self.nodes, self._made = nodes, made | kept

    def model(self, parameters: Sequence[Any] = ()) -> Any:
        """Returns the `onnx.ModelProto`.

        Args:
          parameters: an `onnx.TensorProto` for each of `parameters`.
        """
        from onnx import helper, numpy_helper

        read = set(_read(self.nodes))
        constants = [
            numpy_helper.from_array(one, name)
            for name, one in self.constants.items()
            if name in read
        ]
        constants += parameters
        graph = helper.make_graph(
            self.nodes, 'program', self._inputs, self._outputs, initializer=constants
        )
        domains = sorted({'', *(node.domain for node in self.nodes)})
        opset = [helper.make_opsetid(one, 1 if one else OPSET) for one in domains]
        return helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name='matrix_jax'
        )

    def named(self, shape: Sequence[int]) -> str:
        """Returns a new name for a value of this shape."""
        name = self._name()
        self.shapes[name] = tuple(shape)
        return name

    def output_names(self) -> set[str]:
        """Returns the names of the outputs."""
        return {one.name for one in self._outputs}

    def _name(self) -> str:
        self._count += 1
        return f'v{self._count}'


def _read(nodes: Sequence[Any]) -> Iterator[str]:
    """Yields the names that nodes read, in branches too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField('g'):
                yield from _read(attribute.g.node)


def element_type(dtype: Any) -> int:
    """Returns ONNX's number of a numpy type."""
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _bits(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != 'f':
        return array
    return array.view(f'u{array.dtype.itemsize}')


def _info(name: str, shape: Sequence[int], dtype: Any) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, element_type(dtype), list(map(int, shape)))


def make_node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
) -> Any:
    """Returns an `onnx.NodeProto`."""
    from onnx import helper

    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


def size(shape: Sequence[int]) -> int:
    """Returns the number of elements of a shape."""
    return math.prod(shape)
