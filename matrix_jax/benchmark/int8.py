"""Errors of 8-bit layers in a network's prediction and a stream's latents, against float32 and
bfloat16."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import worlds
from matrix_jax.benchmark import pages
from matrix_jax.benchmark import target as targets
from matrix_jax.config import UsageError
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import rollout
from matrix_jax.weights import diffusers_layout

STEPS = 8  # of the stream whose latents are compared


def run(run, random: bool = False, layers: int | None = None, seed: int = 0) -> tuple[dict, str]:
    """Measures the errors of bfloat16 and of both choices of 8-bit layers -> (results, page).

    Args:
      run, random, layers, seed: see `target.open_target`.
    """
    cfg = targets.shape(run, random, layers)
    check(run.name, cfg)
    compilation.enable_cache(run.keep_programs)
    dit = dataclasses.replace(cfg.dit, int8='none')
    cfg = dataclasses.replace(cfg, dit=dit)
    mesh = sharding.make_mesh(run.mesh)
    if random:
        world = targets.build(cfg)
        params, cond = targets.draw(world, mesh, seed), targets.random_condition(world, seed)
    else:
        world, params = worlds.open_run(dataclasses.replace(run, world=cfg))
        cond = targets.start(world, params, mesh, diffusers_layout.resolve(run.weights))
        cfg = world.cfg
    results, wanted = {}, {}
    nets = {name: params[name] for name in world.network_folders}
    for name, fields in arithmetics(cfg.dit).items():
        made, size = play(cfg, fields, nets, cond, seed)
        if fields['int8'] == 'none':
            wanted[name] = made
        results[name] = {'bytes': size, **against(made, wanted['float32'])}
        if 'bfloat16' in wanted:
            results[name]['to_bfloat16'] = against(made, wanted['bfloat16'])
    results['float32']['to_bfloat16'] = against(wanted['float32'], wanted['bfloat16'])
    return results, pages.int8(run.name, random, results)


def arithmetics(dit) -> dict[str, dict]:
    """Name -> fields of a transformer's config, for every arithmetic that it knows."""
    found = {dtype: {'dtype': dtype, 'int8': 'none'} for dtype in ('float32', 'bfloat16')}
    rounding = {'': {}}
    if hasattr(dit, 'int8_truncate'):
        rounding = {', rounded': {'int8_truncate': False}, ', truncated': {'int8_truncate': True}}
    for layers in typing.get_args(typing.get_type_hints(type(dit))['int8']):
        for how, fields in rounding.items() if layers != 'none' else ():
            name = f'int8 ({layers}{how}) and {dit.dtype}'
            found[name] = {'dtype': dit.dtype, 'int8': layers, **fields}
    return found


def check(name: str, cfg):
    """Raises UsageError for a world whose transformer has no 8-bit layers."""
    if not worlds.build(cfg).has_int8_layers:
        raise UsageError(
            f'--int8: got {name}, expected a world whose transformer has 8-bit layers, such as '
            'the_matrix or matrix_game_3'
        )


def play(cfg, arithmetic: dict, nets: dict, cond, seed: int):
    """Runs a stream -> ({'prediction', 'latents'}, bytes of its networks).

    Args:
      cfg: config of the world.
      arithmetic: fields of its transformer, from `arithmetics`.
      nets: parameters of the transformers.
      cond: what the stream starts from.
      seed: seed of its noise.
    """
    world = targets.build(dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, **arithmetic)))
    nets = jax.tree.map(lambda leaf: leaf.astype(arithmetic['dtype']), nets)
    params = world.quantize(nets)
    stream = targets.network_stream(world)
    held, other = targets.two_controls(world)

    @jax.jit
    def make(params, cond):
        carry = stream.init(params, cond, jax.random.key(seed))
        v = world.first_prediction(params, carry, held)
        turn = (jnp.arange(STEPS) % 4 < 2).reshape(-1, *[1] * held.ndim)
        controls = jnp.where(turn, held, other)
        return {'prediction': v, 'latents': rollout(stream, params, carry, controls)[1]}

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
