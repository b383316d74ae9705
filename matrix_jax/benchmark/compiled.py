"""Costs read from a compiled program instead of a clock: FLOPs, memory, weights, compile time."""

from __future__ import annotations

import math
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from matrix_jax.benchmark import target as targets
from matrix_jax.benchmark.hlo import BYTES
from matrix_jax.train import dry_run

STABLE = {'i1': 'pred', 'i8': 's8', 'ui8': 'u8', 'i32': 's32', 'ui32': 'u32', 'i64': 's64'}


# --- FLOPs -----------------------------------------------------------------------------------


def step_arguments(world):
    """ShapeDtypeStructs (parameters, carry, control) of one step."""
    params, cond = targets.step_params(world), targets.condition_shapes(world)
    params = jax.eval_shape(world.quantize, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = jax.eval_shape(targets.stream(world).init, world.stream_params(params), cond, key)
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
