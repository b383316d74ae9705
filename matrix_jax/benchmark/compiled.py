"""Costs read from a compiled program instead of a clock: FLOPs, memory, bytes over the mesh."""

from __future__ import annotations

import math
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from matrix_jax.benchmark import target as targets
from matrix_jax.train import dry_run

BYTES = {'pred': 1, 'bf16': 2, 'c64': 8} | {
    f'{kind}{bits}': bits // 8
    for kind, sizes in {'s': (8, 16, 32, 64), 'u': (8, 16, 32, 64), 'f': (16, 32, 64)}.items()
    for bits in sizes
}
STABLE = {'i1': 'pred', 'i8': 's8', 'ui8': 'u8', 'i32': 's32', 'ui32': 'u32', 'i64': 's64'}
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


# --- FLOPs -----------------------------------------------------------------------------------


def step_arguments(world):
    """ShapeDtypeStructs (parameters, carry, control) of one step."""
    params, cond = targets.step_params(world), targets.condition_shapes(world)
    params = jax.eval_shape(world.quantize, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = jax.eval_shape(targets.stream(world).init, params, cond, key)
    words = world.vocabulary
    control = words.encode([words.idle] * world.cfg.stream.controls_per_step)[None]
    return params, carry, jax.ShapeDtypeStruct(control.shape, control.dtype)


def flops(world) -> dict[str, float]:
    """FLOPs {'dit', 'vae'} of one step, from XLA's cost analysis before optimisation.

    Computes and allocates nothing. Valid on the CPU only: a GPU attention kernel has no cost that
    XLA knows.
    """
    params, carry, control = step_arguments(world)
    latents = jax.eval_shape(lambda: targets.clip_noise(world, world.cfg.stream.step_frames))
    both = dry_run.flops(world.stream().step, params, carry, control)
    alone = dry_run.flops(world.decoder().step, params, carry[1], latents)
    # The program holds the guidance of every call; at run time some calls skip it.
    stream = world.cfg.stream
    return {'dit': (both - alone) * stream.passes / stream.compiled_passes, 'vae': alone}


def flops_of(cfg) -> dict[str, float]:
    """`flops` of a world's config."""
    return flops(targets.build(cfg))


def costs(cfg) -> tuple[dict[str, float], dict[str, int]]:
    """(`flops`, `weights`) of a world's config."""
    world = targets.build(cfg)
    return flops(world), weights(world)


def weights(world) -> dict[str, int]:
    """Bytes of the parameters that one step reads, by component."""
    params, *given = step_arguments(world)

    def zeros(tree):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    return {
        name: argument_bytes(
            lambda part, name=name: world.stream().step(
                zeros(params) | {name: part}, *zeros(given)
            ),
            params[name],
        )
        for name in params
    }


def argument_bytes(function, *arguments) -> int:
    """Bytes of the arguments that a function reads; lowering drops the unused ones."""
    module = jax.jit(function).lower(*arguments).compiler_ir('stablehlo')
    main = next(one for one in module.body.operations if one.name.value == 'main')
    total = 0
    for argument in main.arguments:
        *dims, kind = re.fullmatch(r'tensor<(.*)>', str(argument.type))[1].split('x')
        total += math.prod(map(int, dims)) * BYTES[STABLE.get(kind, kind)]
    return total


# --- memory ----------------------------------------------------------------------------------


def memory(compiled) -> int:
    """Bytes that a compiled program holds on each device while it runs, according to XLA."""
    return dry_run.program_bytes(compiled.memory_analysis())


# --- the mesh --------------------------------------------------------------------------------


def collectives(text: str, devices: int) -> dict[str, dict[str, float]]:
    """Collectives of one run of a program: kind -> {'count', 'bytes' that each device sends}.

    The body of a loop counts once per known iteration. Of the branches of a conditional, the one
    that sends most counts.

    Args:
      text: HLO of a compiled program (`compiled.as_text()`).
      devices: mesh size, for collectives without replica groups.
    """
    bodies, entry = _computations(text)

    def visit(name):
        found: dict[str, dict[str, float]] = {}

        def add(more, times=1):
            for kind, one in more.items():
                known = found.setdefault(kind, {'count': 0, 'bytes': 0.0})
                for key, value in one.items():
                    known[key] += times * value

        for line in bodies.get(name, ()):
            kind, size = _collective(line, devices)
            add({kind: {'count': 1, 'bytes': size}} if kind else {})
            turns = re.search(r'known_trip_count\D+(\d+)', line)
            for called in re.findall(r'(?:body|calls|to_apply)=%?([\w.-]+)', line):
                add(visit(called), int(turns[1]) if turns else 1)
            branches = re.findall(r'(?:true|false)_computation=%?([\w.-]+)', line)
            listed = re.search(r'branch_computations=\{(.*?)\}', line)
            branches += re.findall(r'[\w.-]+', listed[1]) if listed else []
            add(max(map(visit, branches), key=sent, default={}))
        return found

    return visit(entry)


def sent(found: dict[str, dict[str, float]]) -> float:
    """Total bytes that each device sends, from `collectives`."""
    return sum(one['bytes'] for one in found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, '', []
    for line in text.splitlines():
        head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$', line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif '=' in line:
            lines.append(line)
    return bodies, entry


def _collective(line: str, devices: int) -> tuple[str, float]:
    """(kind, bytes that each device sends) of a line of HLO; ('', 0) if it is not a collective."""
    match = re.match(r'\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+?)(-start)?\(', line)
    if not match or match[2] not in SENT:
        return '', 0.0
    sizes = [
        BYTES.get(kind, 1) * math.prod(map(int, filter(None, dims.split(','))))
        for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', match[1])
    ]
    if match[3] and match[2] in ('all-gather', 'collective-permute') and len(sizes) > 1:
        # An asynchronous start returns its operands, its results and sometimes handles.
        operands = line[match.end() :].split(')')[0].count('%')
        sizes = sizes[operands : 2 * operands]
    return match[2], sum(sizes) * SENT[match[2]](_group(line, devices))


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


# --- compiling -------------------------------------------------------------------------------


def compile_seconds(build) -> tuple[dict[str, float], Any]:
    """Measures compilation with an empty and with a filled cache on disk.

    Args:
      build: compiles and returns a `measure.CompiledProgram`.

    Returns:
      ({'cold', 'cached'} seconds, tracing included, and the program built last).
    """
    from jax.experimental.compilation_cache import compilation_cache

    def configure(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    wanted = {
        'jax_enable_compilation_cache': True,
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': 0,
    }
    names = ('jax_compilation_cache_dir', *wanted)
    before = {name: getattr(jax.config, name) for name in names}
    seconds, built = {}, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            configure(wanted | {names[0]: folder})
            for name in ('cold', 'cached'):
                jax.clear_caches()
                built = build()
                seconds[name] = built.seconds
        finally:
            configure(before)
    return seconds, built
