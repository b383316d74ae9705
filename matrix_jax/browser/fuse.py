"""Operators joined into larger ones: norms, softmax, GELU and rotary embeddings.

jax writes them as a dozen small operators each. A tab starts a world in a time that grows with the
number of operators, and each costs a few microseconds a step. Chains are found from their last
node backwards; whatever does not match exactly stays as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from matrix_jax.browser.graph import Graph, make_node

CONTRIB = 'com.microsoft'  # onnxruntime's own operators


def fuse(graph: Graph) -> None:
    """Joins the operators of a graph, in branches too, and drops those that nothing reads."""
    graph.nodes = _Fusion(graph, graph.nodes).nodes(graph.output_names())


class _Fusion:
    """Joins the operators of a list of nodes."""

    def __init__(self, graph: Graph, nodes: Sequence[Any]) -> None:
        self.graph = graph
        self.made = {name: node for node in nodes for name in node.output}
        self.read: dict[str, list[Any]] = defaultdict(list)
        for node in nodes:
            for name in reads(node):
                self.read[name].append(node)
        self._nodes = nodes
        self._spread: dict[Any, str] = {}  # cosines or sines and places -> one row for each place

    def nodes(self, wanted: set[str]) -> list[Any]:
        """Returns the nodes after all joins that the wanted values depend on."""
        new: list[Any] = []
        replaced: dict[str, list[Any]] = {}
        rules = {
            'Mul': (self._norm, self._gelu),
            'Div': (self._softmax,),
            'Transpose': (self._rotary,),
        }
        for node in self._nodes:
            for rule in rules.get(node.op_type, ()):
                found = rule(node)
                if found:
                    # A norm ends at the last of the nodes that it takes in.
                    replaced[found[-1].output[0]] = found
        for node in self._nodes:
            for attribute in node.attribute:
                if attribute.HasField('g'):
                    branch = attribute.g
                    ends = {one.name for one in branch.output}
                    inside = _Fusion(self.graph, list(branch.node)).nodes(ends)
                    del branch.node[:]
                    branch.node.extend(inside)
            new += replaced.get(node.output[0], [node])
        return used(new, wanted)

    # --- what a node is made of ------------------------------------------------------------------

    def _from(self, name: str, operator: str) -> Any | None:
        """Returns the node that makes a value, if it is of this operator; reshapes do not count."""
        node = self.made.get(name)
        while node is not None and node.op_type == 'Reshape':
            node = self.made.get(node.input[0])
        return node if node is not None and node.op_type == operator else None

    def _number(self, name: str) -> float | None:
        """Returns a constant of one element."""
        value = self.graph.constants.get(name)
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def _operand(self, name: str | None, operator: str, number: float | None = None) -> str | None:
        """Returns x if a value is an operator of x and a number; any number by default."""
        node = self._from(name, operator) if name else None
        for first, second in _both_ways(node) if node else ():
            found = self._number(second)
            if found is not None and (number is None or math.isclose(found, number, rel_tol=1e-5)):
                return first
        return None

    def _axes(self, node: Any) -> tuple[int, ...]:
        return tuple(self.graph.constants[node.input[1]].tolist())

    def _mean(self, name: str | None) -> str | None:
        """Returns x [... D] if a value [... 1] is the mean of x over its last axis."""
        quotient = self._from(name, 'Div') if name else None
        total = quotient and self._from(quotient.input[0], 'ReduceSum')
        if not total:
            return None
        *rest, width = shape = self.graph.shapes[total.input[0]]
        last = self._axes(total) == (len(shape) - 1,)
        fits = last and self.graph.shapes[name] == (*rest, 1)
        return total.input[0] if fits and self._number(quotient.input[1]) == width else None

    def _next(self, name: str, operator: str) -> Any | None:
        """Returns the only reader of a value, if it is of this operator."""
        readers = self.read[name]
        return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None

    def _row(self, name: str, width: int) -> tuple[list[Any], str] | None:
        """Returns (nodes, a value [D]) for a value [1 ... 1 D]."""
        shape = self.graph.shapes[name]
        if shape[-1:] != (width,) or math.prod(shape) != width:
            return None
        while (node := self.made.get(name)) is not None and node.op_type == 'Reshape':
            name = node.input[0]
        if self.graph.shapes[name] == (width,):
            return [], name
        node = self._node('Reshape', [name, self.graph.integers([width])], (width,))
        return [node], node.output[0]

    def _node(self, operator: str, inputs: Sequence[str], shape: Sequence[int], **more: Any) -> Any:
        return make_node(operator, inputs, [self.graph.named(shape)], **more)

    # --- chains ----------------------------------------------------------------------------------

    def _norm(self, node: Any) -> list[Any] | None:
        """x * rsqrt(mean(x^2) + eps), of a centred x as well, with scale and shift."""
        for x, factor in _both_ways(node):
            root, scale = self._from(factor, 'Reciprocal'), None
            if root is None and (product := self._from(factor, 'Mul')) is not None:
                for first, second in _both_ways(product):
                    if (root := self._from(first, 'Reciprocal')) is not None:
                        scale = second
                        break
            root = root and self._from(root.input[0], 'Sqrt')
            mean = root and self._operand(root.input[0], 'Add')
            squares = self._from(self._mean(mean) or '', 'Mul')
            if squares is None or list(squares.input) != [x, x]:
                continue
            epsilon = next(
                number
                for name in self._from(root.input[0], 'Add').input
                if (number := self._number(name)) is not None
            )
            return self._written_norm(x, epsilon, scale, node.output[0])
        return None

    def _written_norm(
        self, x: str, epsilon: float, scale: str | None, end: str
    ) -> list[Any] | None:
        width, centred = self.graph.shapes[x][-1], self._from(x, 'Sub')
        centred = centred if centred and self._mean(centred.input[1]) == centred.input[0] else None
        row = scale and self._row(scale, width)
        if scale and not row:
            return None
        if not scale:
            row, end = self._joined('Mul', end, width)
        before, rows = row or ([], self.graph.constant_name(np.ones(width, np.float32)))
        inputs = [centred.input[0] if centred else x, rows]
        if centred:
            row, end = self._joined('Add', end, width)
            if row:
                before, inputs = before + row[0], [*inputs, row[1]]
        operator = 'LayerNormalization' if centred else 'SimplifiedLayerNormalization'
        return [*before, make_node(operator, inputs, [end], axis=-1, epsilon=epsilon)]

    def _joined(
        self, operator: str, end: str, width: int
    ) -> tuple[tuple[list[Any], str] | None, str]:
        """Returns (the row that the next node joins to a value, or None; the last value)."""
        node = self._next(end, operator)
        others = [name for name in node.input if name != end] if node else []
        row = self._row(others[0], width) if others else None
        return row, node.output[0] if row else end

    def _softmax(self, node: Any) -> list[Any] | None:
        """exp(x - max x) / sum of the same, over the last axis."""
        powers, total = self._from(node.input[0], 'Exp'), self._from(node.input[1], 'ReduceSum')
        if powers is None or total is None or total.input[0] != powers.output[0]:
            return None
        shifted = self._from(powers.input[0], 'Sub')
        largest = shifted and (self._from(shifted.input[1], 'Max') or shifted)
        largest = largest and next(
            (one for name in largest.input if (one := self._from(name, 'ReduceMax'))), None
        )
        if not largest or largest.input[0] != shifted.input[0]:
            return None
        *rest, _ = shape = self.graph.shapes[shifted.input[0]]
        last = (len(shape) - 1,)
        sums = {self.graph.shapes[one] for one in (shifted.input[1], node.input[1])}
        if self._axes(largest) != last or self._axes(total) != last or sums != {(*rest, 1)}:
            return None
        return [make_node('Softmax', [shifted.input[0]], [node.output[0]], axis=-1)]

    def _gelu(self, node: Any) -> list[Any] | None:
        """x * (0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))))."""
        for x, factor in _both_ways(node):
            half = self._operand(self._operand(factor, 'Mul', 0.5), 'Add', 1)
            curve = self._from(half, 'Tanh') if half else None
            total = curve and self._operand(curve.input[0], 'Mul', math.sqrt(2 / math.pi))
            total = self._from(total, 'Add') if total else None
            for first, second in _both_ways(total) if total else ():
                cube = self._from(self._operand(second, 'Mul', 0.044715) or '', 'Mul')
                square = cube and next((self._from(name, 'Mul') for name in cube.input), None)
                if first == x and square and x in cube.input and list(square.input) == [x, x]:
                    return [make_node('Gelu', [x], [node.output[0]], approximate='tanh')]
        return None

    def _rotary(self, node: Any) -> list[Any] | None:
        """Pairs of neighbours (a, b) -> (a cos - b sin, b cos + a sin)."""
        pair = self.made.get(node.input[0])
        if pair is None or pair.op_type != 'Concat' or len(pair.input) != 2:
            return None
        rank = len(self.graph.shapes[pair.output[0]])
        if _ints(node, 'perm') != [*range(1, rank), 0]:
            return None
        first, second = self._from(pair.input[0], 'Sub'), self._from(pair.input[1], 'Add')
        if not first or not second:
            return None
        products = [self._from(name, 'Mul') for name in (*first.input, *second.input)]
        if None in products:
            return None
        [(a, cos), (b, sin), *rest] = [tuple(one.input) for one in products]
        if rest != [(b, cos), (a, sin)]:
            return None
        halves = [self._from(name, 'Slice') for name in (a, b)]
        if None in halves or halves[0].input[0] != halves[1].input[0]:
            return None
        places = [self.graph.constants[one.input[1]].tolist() for one in halves]
        split = self._from(halves[0].input[0], 'Transpose')
        if places != [[0], [1]] or not split:
            return None
        if _ints(split, 'perm') != [rank - 1, *range(rank - 1)]:
            return None
        source = self.made.get(split.input[0])
        if source is None or source.op_type != 'Reshape':
            return None
        return self._written_rotary(source.input[0], cos, sin, self.graph.shapes[a], node)

    def _written_rotary(
        self, x: str, cos: str, sin: str, shape: tuple[int, ...], node: Any
    ) -> list[Any] | None:
        """`shape` is [... heads pairs]; cos and sin are the same for all heads."""
        *places, heads, pairs = shape
        out = self.graph.shapes[node.output[0]]
        if out != (*places, heads, pairs, 2) or not places:
            return None
        count, nodes, tables = math.prod(places), [], []
        for name in (cos, sin):
            held = self.graph.shapes[name]
            held = (1,) * (len(shape) - len(held)) + held
            if held[-2] != 1 or held[-1] != pairs:
                return None
            table = name, *places
            if table not in self._spread:
                whole = self._node(
                    'Expand', [name, self.graph.integers([*places, 1, pairs])], [*places, 1, pairs]
                )
                inputs = [whole.output[0], self.graph.integers([count, pairs])]
                nodes += [whole, self._node('Reshape', inputs, [count, pairs])]
                self._spread[table] = nodes[-1].output[0]
            tables.append(self._spread[table])
        flat = [1, count, heads * 2 * pairs]
        tokens = self._node('Reshape', [x, self.graph.integers(flat)], flat)
        order = self.graph.constant_name(np.arange(count, dtype=np.int64)[None])
        turned = self._node(
            'RotaryEmbedding',
            [tokens.output[0], order, *tables],
            flat,
            domain=CONTRIB,
            interleaved=1,
            num_heads=heads,
        )
        end = [turned.output[0], self.graph.integers(out)]
        return [*nodes, tokens, turned, make_node('Reshape', end, [node.output[0]])]


def reads(node: Any) -> Iterator[str]:
    """Yields the names that a node reads, in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField('g'):
            for inside in attribute.g.node:
                yield from reads(inside)


def used(nodes: Sequence[Any], wanted: set[str]) -> list[Any]:
    """Returns the nodes that the wanted values depend on."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1]


def _both_ways(node: Any) -> list[tuple[str, str]]:
    first, second = node.input
    return [(first, second), (second, first)]


def _ints(node: Any, name: str) -> list[int]:
    return next((list(one.ints) for one in node.attribute if one.name == name), [])
