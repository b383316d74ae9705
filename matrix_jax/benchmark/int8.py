"""Errors of 8-bit layers in a network's prediction and a stream's latents, against float32 and
bfloat16."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import worlds
from matrix_jax.benchmark import pages
from matrix_jax.benchmark import target as targets
from matrix_jax.config import UsageError
from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import rollout
from matrix_jax.weights import diffusers_layout

SHIFTS = 8  # steps of the stream whose latents are compared
HELD, OTHER = (SYMBOLS.index(symbol) for symbol in ('D', 'DL'))


def run(run, random: bool = False, layers: int | None = None, seed: int = 0) -> tuple[dict, str]:
    """Measures the errors of bfloat16 and of both choices of 8-bit layers -> (results, page).

    Args:
      run, random, layers, seed: see `target.open_target`.
    """
    cfg = targets.shape(run, random, layers)
    check(run.name, cfg)
    compilation.enable_cache(run.keep_programs)
    cfg = dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, int8='none'))
    mesh = sharding.make_mesh(run.mesh)
    if random:
        world = targets.build(cfg)
        params, cond = targets.draw(world, mesh, seed), targets.random_condition(world, seed)
    else:
        world, params = worlds.open_run(dataclasses.replace(run, world=cfg))
        cond = targets.start(world, params, mesh, diffusers_layout.resolve(run.weights))
        cfg = world.cfg
    kinds = [('float32', 'none'), ('bfloat16', 'none')]
    kinds += [(cfg.dit.dtype, int8) for int8 in ('attention', 'blocks')]
    results, wanted = {}, {}
    for dtype, int8 in kinds:
        name = f'int8 ({int8}) and {dtype}' if int8 != 'none' else dtype
        made, size = play(cfg, dtype, int8, params['transformer'], cond, seed)
        if int8 == 'none':
            wanted[dtype] = made
        results[name] = {'bytes': size, **against(made, wanted['float32'])}
        if 'bfloat16' in wanted:
            results[name]['to_bfloat16'] = against(made, wanted['bfloat16'])
    results['float32']['to_bfloat16'] = against(wanted['float32'], wanted['bfloat16'])
    return results, pages.int8(run.name, random, results)


def check(name: str, cfg):
    """Raises UsageError for a world whose transformer has no 8-bit layers."""
    if not worlds.build(cfg).has_int8_layers:
        raise UsageError(
            f'--int8: got {name}, expected a world of The Matrix (the transformer of '
            'this one has no 8-bit layers)'
        )


def play(cfg, dtype: str, int8: str, net, cond, seed: int):
    """Runs a stream with this arithmetic -> ({'prediction', 'latents'}, bytes of its network)."""
    world = worlds.build(
        dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, dtype=dtype, int8=int8))
    )
    net = jax.tree.map(lambda leaf: leaf.astype(dtype), net)
    params = world.quantize({'transformer': net})
    stream, count = world.latents(), cfg.stream.group_frames

    @jax.jit
    def make(params, cond):
        carry = stream.init(params, cond, jax.random.key(seed))
        level = jnp.broadcast_to(world.levels[0], carry.window.shape[:2])
        held = jnp.full([1, cfg.stream.frames], HELD)
        v = world.denoise(params, carry.window, level, carry.text, carry.control_table[held])
        keys = jnp.where(jnp.arange(SHIFTS) % 4 < 2, HELD, OTHER)
        keys = jnp.broadcast_to(keys[:, None, None], (SHIFTS, 1, count))
        return {'prediction': v, 'latents': rollout(stream, params, carry, keys)[1]}

    made = {name: np.asarray(value, np.float64) for name, value in make(params, cond).items()}
    return made, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def against(made: dict, wanted: dict) -> dict[str, dict[str, float]]:
    """`compare` of each output."""
    return {what: compare(made[what], wanted[what]) for what in made}


def compare(got, want) -> dict[str, float]:
    """Relative errors {'rms', 'largest'} and cosine similarity of two arrays."""

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x))))

    return {
        'rms': rms(got - want) / rms(want),
        'largest': float(np.abs(got - want).max() / np.abs(want).max()),
        'cosine': float(np.sum(got * want) / np.sqrt(np.sum(got * got) * np.sum(want * want))),
    }
