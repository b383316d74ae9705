"""What the text of a compiled program says: kernels, products, layouts, bytes, collectives.

The text is HLO after all passes (`compiled.as_text()`). The body of a loop counts once per known
iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {'pred': 1, 'bf16': 2, 'c64': 8} | {
    f'{kind}{bits}': bits // 8
    for kind, sizes in {'s': (8, 16, 32, 64), 'u': (8, 16, 32, 64), 'f': (16, 32, 64)}.items()
    for bits in sizes
}
# Bytes that each of n devices sends per byte of the result, with ring algorithms.
SENT = {
    'all-gather': lambda n: (n - 1) / n,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'reduce-scatter': lambda n: n - 1,
    'all-to-all': lambda n: (n - 1) / n,
    'ragged-all-to-all': lambda n: (n - 1) / n,
    'collective-broadcast': lambda n: 1,
    'collective-permute': lambda n: 1,
}
# Instructions that run no kernel.
FREE = {
    'after-all',
    'bitcast',
    'conditional',
    'constant',
    'get-tuple-element',
    'opt-barrier',
    'parameter',
    'partition-id',
    'replica-id',
    'tuple',
    'while',
}
PRODUCTS = ('__cublas', '__cudnn$conv', '__cudnn$fmha')  # targets of the large custom calls
SOFTMAX = 'attention_softmax'  # scope of the softmax of `nn.attention` outside cuDNN
BACKWARD = 2.5  # FLOPs of an attention's gradient over those of its output


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
      name: its name.
      shape: text of its result's shape.
      op: its operation, such as 'fusion'.
      line: the whole line.
    """

    name: str
    shape: str
    op: str
    line: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        found = re.search(r' [\w-]+\((.*?)\)(, |$)', self.line[self.line.index(' = ') + 2 :])
        return re.findall(r'%([\w.-]+)', found[1]) if found else []

    @property
    def target(self) -> str:
        """Target of a custom call; '' for any other instruction."""
        found = re.search(r'custom_call_target="([^"]*)"', self.line)
        return found[1] if found else ''

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, a convolution or an attention of a library."""
        return self.target.startswith(PRODUCTS)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation, in the order in which they run.
      entry: name of the computation that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions by name."""
        return {one.name: one for body in self.computations.values() for one in body}

    def launches(self) -> Iterator[tuple[Instruction, int]]:
        """Yields (instruction, how often it runs) of all that run on a device.

        Of a condition, the branch counts that is taken when it is true; of an asynchronous pair,
        the start.
        """
        return self._launches(self.entry, 1)

    def _launches(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for one in self.computations.get(name, ()):
            if one.op == 'while':
                yield from self._launches(_called(one, 'body'), times * turns(one))
            elif one.op == 'conditional':
                yield from self._launches(branches(one)[-1], times)
            elif one.op in ('call', 'async-start'):
                yield from self._launches(_called(one, 'to_apply|calls'), times)
            elif one.op not in FREE and not one.op.endswith(('-done', '-update')):
                yield one, times

    def fused(self, one: Instruction) -> list[Instruction]:
        """The instructions inside a fusion."""
        return self.computations.get(_called(one, 'calls'), [])

    def shape(self, name: str) -> str:
        """Text of the shape of a named instruction."""
        return self.instructions[name].shape if name in self.instructions else ''


def parse(text: str) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = '', []
    for line in text.splitlines():
        head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$', line)
        if head:
            body = computations[head[2]] = []
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(', line)
        if found:
            body.append(Instruction(*found.groups(), line))
    return Program(computations, entry)


def turns(loop: Instruction) -> int:
    """Known iterations of a loop; 1 if unknown."""
    found = re.search(r'known_trip_count\D+(\d+)', loop.line)
    return int(found[1]) if found else 1


def branches(condition: Instruction) -> list[str]:
    """Computations of a condition, the one for true last."""
    listed = re.search(r'branch_computations=\{(.*?)\}', condition.line)
    if listed:
        return re.findall(r'[\w.-]+', listed[1])
    return [_called(condition, f'{value}_computation') for value in ('false', 'true')]


def _called(one: Instruction, names: str) -> str:
    found = re.search(rf'(?:{names})=%?([\w.-]+)', one.line)
    return found[1] if found else ''


def size(shape: str) -> int:
    """Bytes of a shape; of a tuple, of all its parts."""
    return sum(
        BYTES.get(kind, 1) * math.prod(map(int, filter(None, dims.split(','))))
        for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', shape)
    )


def dims(shape: str) -> list[int]:
    """Sizes of the axes of a shape; of a tuple, of its first part."""
    found = re.search(r'\w+\[([\d,]*)\]', shape)
    return [int(one) for one in found[1].split(',') if one] if found else []


# --- kernels ---------------------------------------------------------------------------------


def summary(text: str, devices: int = 1) -> dict:
    """What one run of a program consists of, on each device.

    Args:
      text: HLO of the program.
      devices: mesh size.

    Returns:
      'launches': kernels and copies.
      'attention': calls by 'cudnn', of its 'gradient', and 'dense' ones, whose logits are arrays.
      'convolutions': calls by layout and type, such as 'channels last, bf16'.
      'products': matrix products of cuBLAS.
      'collectives': see `collectives`.
      'flops': of products, convolutions and attention.
      'bytes': read and written by all other kernels.
      'transposed_bytes': read and written inside cuDNN to change the layout of convolutions that
        are laid out with channels first.
      'float64', 'callbacks': whether there are any 64-bit floats, and calls of the host.
    """
    program = parse(text)
    found: dict = {
        'launches': 0,
        'attention': {'cudnn': 0, 'gradient': 0, 'dense': 0},
        'convolutions': {},
        'products': 0,
        'flops': 0.0,
        'bytes': 0,
        'transposed_bytes': 0,
    }
    for one, times in program.launches():
        target = one.target
        found['launches'] += times
        found['flops'] += times * flops(program, one)
        if target.startswith('__cudnn$fmha'):
            found['attention']['gradient' if 'Backward' in target else 'cudnn'] += times
        elif target.startswith('__cudnn$conv'):
            layout, moved = _layout(program, one)
            found['convolutions'][layout] = found['convolutions'].get(layout, 0) + times
            found['transposed_bytes'] += times * moved
        elif target.startswith('__cublas'):
            found['products'] += times
        elif not _kind(one):
            found['bytes'] += times * traffic(program, one)
        found['attention']['dense'] += times * _softmaxes(program, one)
    return found | {
        'collectives': collectives(text, devices),
        'float64': 'f64[' in text,
        'callbacks': len(re.findall(r'custom_call_target="[^"]*callback[^"]*"', text)),
    }


def flops(program: Program, one: Instruction) -> float:
    """FLOPs of a product, a convolution or an attention; of a fusion, of the products in it."""
    given = [dims(program.shape(name)) for name in one.operands]
    target, result = one.target, dims(one.shape)
    if target.startswith('__cublas'):
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.line)
        inner = [given[0][int(axis)] for axis in re.findall(r'\d+', axes[1])] if axes else []
        return 2 * math.prod(result) * math.prod(inner)
    if target.startswith('__cudnn$conv'):
        kernel, output = given[1], result
        if 'BackwardFilter' in target:
            kernel, output = result, given[1]
        elif 'BackwardInput' in target:
            output = given[0]
        labels = re.search(r'dim_labels=\w+_(\w+)->', one.line)[1]
        return 2 * math.prod(output) * math.prod(kernel) / kernel[labels.index('o')]
    if target.startswith('__cudnn$fmha'):
        queries, keys = given[:2]  # [B N K E], [B S K E]
        return 4 * math.prod(queries) * keys[1] * (BACKWARD if 'Backward' in target else 1)
    if one.op == 'dot':
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.line)
        inner = [given[0][int(axis)] for axis in re.findall(r'\d+', axes[1])] if axes else []
        return 2 * math.prod(result) * math.prod(inner)
    if one.op == 'fusion':
        return sum(flops(program, part) for part in program.fused(one) if part.op == 'dot')
    return 0.0


def traffic(program: Program, one: Instruction) -> int:
    """Bytes that a kernel reads and writes.

    Of an operand that is only sliced, the slices count; of one that is updated in place, the
    update.
    """
    body = program.fused(one) if one.op == 'fusion' else []
    if not body:
        return size(one.shape) + sum(size(program.shape(name)) for name in one.operands)
    needed, root = _needed(program, body), body[-1]
    in_place = root.op == 'dynamic-update-slice'
    written = size(program.shape(root.operands[1]) if in_place else one.shape)
    return written + sum(
        size(part.shape) * needed.get(part.name, 0) // max(math.prod(dims(part.shape)), 1)
        for part in body
        if part.op == 'parameter'
    )


def _needed(program: Program, body: list[Instruction]) -> dict[str, int]:
    """How many elements of each instruction of a fusion are computed or read."""
    root = body[-1]
    needed = {root.name: math.prod(dims(root.shape))}
    for one in reversed(body):
        own = math.prod(dims(one.shape))
        for index, name in enumerate(one.operands):
            every = math.prod(dims(program.shape(name)))
            used = every
            if index == 0 and one is root and one.op == 'dynamic-update-slice':
                used = 0
            elif index == 0 and one.op in ('slice', 'dynamic-slice') or every == own:
                used = needed.get(one.name, 0)
            needed[name] = min(every, needed.get(name, 0) + used)
    return needed


def _layout(program: Program, one: Instruction) -> tuple[str, int]:
    """('channels last, bf16', bytes that cuDNN moves to change the layout) of a convolution."""
    shape = program.shape(one.operands[0])
    kind = re.match(r'\w+', shape)[0] if shape else 'unknown'
    if 'dim_labels=bf' not in one.line:
        return f'channels last, {kind}', 0
    result = re.search(r'\w+\[[\d,]*\]', one.shape)[0]
    return f'channels first, {kind}', 2 * (size(shape) + size(result))


def _softmaxes(program: Program, one: Instruction) -> int:
    """Softmaxes of dense attention in a kernel, of which each takes one maximum."""
    parts = program.fused(one) if one.op == 'fusion' else [one]
    return sum(f'{SOFTMAX}/reduce_max"' in part.line for part in parts if part.op == 'reduce')


# --- the mesh --------------------------------------------------------------------------------


def collectives(text: str, devices: int) -> dict[str, dict[str, float]]:
    """Collectives of one run of a program, by kind.

    Of the branches of a conditional, the one that sends most counts.

    Args:
      text: HLO of a compiled program.
      devices: mesh size, for collectives without replica groups.

    Returns:
      kind -> 'count', 'bytes' that each device sends, and 'overlapped': how many have a product
      between their start and their end.
    """
    program = parse(text)

    def visit(name):
        found: dict[str, dict[str, float]] = {}

        def add(more, times=1):
            for kind, values in more.items():
                known = found.setdefault(kind, {'count': 0, 'bytes': 0.0, 'overlapped': 0})
                for key, value in values.items():
                    known[key] += times * value

        body = program.computations.get(name, [])
        for index, one in enumerate(body):
            kind = _kind(one)
            if kind and not one.op.endswith('-start'):
                # A start returns its operands too; the end returns the results alone.
                start = program.instructions.get(one.operands[0]) if 'done' in one.op else one
                sent = size(one.shape) * SENT[kind](_group((start or one).line, devices))
                between = body[body.index(start) + 1 : index] if start in body[:index] else []
                overlapped = any(part.is_product for part in between)
                add({kind: {'count': 1, 'bytes': sent, 'overlapped': int(overlapped)}})
            if one.op == 'conditional':
                add(max(map(visit, branches(one)), key=sent_bytes, default={}))
                continue
            for called in re.findall(r'(?:body|calls|to_apply)=%?([\w.-]+)', one.line):
                add(visit(called), turns(one))
        return found

    return visit(program.entry)


def sent_bytes(found: dict[str, dict[str, float]]) -> float:
    """Total bytes that each device sends, from `collectives`."""
    return sum(one['bytes'] for one in found.values())


def _kind(one: Instruction) -> str:
    """Kind of a collective, of its start or its end; '' for any other instruction."""
    kind = re.sub('-(start|done)$', '', one.op)
    return kind if kind in SENT else ''


def _group(line: str, devices: int) -> int:
    """How many devices take part in each group of a collective."""
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
    if listed:
        return listed[1].count(',') + 1
    iota = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
    if iota:
        return int(iota[1])
    named = re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', line)
    if not named:
        return devices
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    # An axis, or a part of one: 'axis_2':(1)4 is 4 devices of it.
    return math.prod(
        int(part or sizes[axis])
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    )
