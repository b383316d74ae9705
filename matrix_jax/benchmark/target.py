"""What is measured: a streaming world, its parameters on a mesh, and a start.

Weights are those of a folder, or random ones drawn on the devices: speed does not depend on values.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import worlds
from matrix_jax.benchmark import roofline
from matrix_jax.config import UsageError
from matrix_jax.parallel import compilation, sharding
from matrix_jax.pipelines import generate
from matrix_jax.stream.base import Stream, prefilled
from matrix_jax.weights import conversion, converter, diffusers_layout

RUNS = {'transformer': 'dit', 'vae': 'vae'}  # parts of a step, and their configs


@dataclasses.dataclass(frozen=True)
class Target:
    """A world that is ready to stream.

    Attributes:
      name: of the recipe.
      world: the world.
      params: on the meshes; random ones are of the parts that a step runs only.
      mesh: the devices of the network, and of the decoder if it has none of its own.
      decoder: the devices of the decoder.
      cond: what the stream starts from, on the mesh.
      random: whether the weights are.
    """

    name: str
    world: Any
    params: dict
    mesh: jax.sharding.Mesh
    decoder: jax.sharding.Mesh
    cond: Any
    random: bool

    @property
    def halves(self) -> tuple[Target, Target]:
        """What makes latents and what decodes them, each with its devices and what lies there; this
        target twice, if there is one mesh."""
        params, decoder = self.world.split_decoder(self.params)
        if decoder is None:
            return self, self
        return (
            dataclasses.replace(self, params=params, decoder=self.mesh),
            dataclasses.replace(self, params=decoder, mesh=self.decoder),
        )

    @property
    def devices(self) -> dict[str, int]:
        """How many devices each part has: {'dit', 'vae', 'end_to_end'}."""
        both = {*self.mesh.devices.flat, *self.decoder.devices.flat}
        return {'dit': self.mesh.size, 'vae': self.decoder.size, 'end_to_end': len(both)}

    def within(self):
        """The mesh as a context, in which programs are traced."""
        return sharding.within(self.mesh)

    @property
    def presses(self) -> tuple[np.ndarray, np.ndarray]:
        """Controls of one step, batch 1: what is held, and what it changes to."""
        words = self.world.vocabulary
        held = [one for one in words.choices if one != words.idle][:2]
        return tuple(
            words.encode([one] * self.world.cfg.stream.controls_per_step)[None] for one in held
        )

    def run(self, function, *given):
        """What a function makes, whole on every device of the mesh."""
        with self.within():
            made = jax.jit(function)(*given)
        return jax.device_put(made, sharding.replicated(self.mesh))


def shape(run, random: bool = False, layers: int | None = None):
    """The config of the world that a run measures.

    Raises:
      UsageError: it does not stream, or options do not go together.
    """
    if layers is not None and not random:
        raise UsageError(f'--layers: got {layers} without --random; weights have their own layers')
    if random and run.lora:
        raise UsageError('--lora: got an adapter with --random, expected real weights')
    if not random and not run.weights:
        raise UsageError(f'{run.name}: needs --weights FOLDER, or --random')
    cfg = converter.shorten(run.world, layers)
    world = worlds.build(cfg)
    if run.mesh.parts and world.one_mesh:
        world.stages()  # says so
    if not world.endless:
        raise UsageError(
            f'{run.name}: does not stream, expected a recipe that takes keys '
            '(such as the_matrix:STAGE4)'
        )
    return cfg


def open_target(run, random: bool = False, layers: int | None = None, seed: int = 0) -> Target:
    """Opens a run's world for measuring.

    Args:
      run: the run.
      random: whether weights are drawn in place of read.
      layers: of a random network, if fewer than the recipe.
      seed: of random weights and starts.

    Raises:
      UsageError: see `shape`; CheckpointError, ConversionError: the weights cannot be used.
    """
    cfg = shape(run, random, layers)
    compilation.enable_cache(run.keep_programs)
    mesh, decoder = sharding.make_meshes(run.mesh)
    if random:
        world = build(cfg)
        params = world.quantize(draw(world, mesh, seed, decoder))
        params, cond = world.precompute_for(params, imagine(world, seed))
    else:
        world, params = worlds.open_run(run, split_decoder=True)
        params = world.precompute(params)
        cond = start(
            world, world.split_decoder(params)[0], mesh, diffusers_layout.resolve(run.weights)
        )
    return Target(
        run.name,
        world,
        params,
        mesh,
        decoder,
        jax.device_put(cond, sharding.replicated(mesh)),
        random,
    )


def start(world, params, mesh, folder):
    """The condition of a world's start clip or picture; of a grey one if it brings none."""
    cfg = world.cfg
    try:
        frames = generate.start_clip(world, folder, cfg.prompt, None, False)
    except UsageError:
        frames = np.full([world.start_frames, cfg.height, cfg.width, 3], 128, np.uint8)
    given, _ = world.inputs(cfg.prompt, frames)
    with sharding.within(mesh):
        return jax.jit(world.condition)(params, *given)


def build(cfg):
    """The world of a config, for random weights."""
    return worlds.build(cfg).with_tokenizers(None)


def stream(world, control_binding: str | None = None) -> Stream:
    """A world's stream, every step alike: its first output is made by `init`."""
    return prefilled(world.stream(control_binding), _first(world))


def network_stream(world) -> Stream:
    """The same without the decoder: latents come out."""
    return prefilled(world.latents(), _first(world))


def _first(world):
    words = world.vocabulary
    return words.encode([words.idle] * world.first_step_controls)[None]


def told(world):
    """Shapes of the condition that a stream of a world starts from."""
    cfg = world.cfg
    frames = np.zeros([world.start_frames, cfg.height, cfg.width, 3], np.uint8)
    given, _ = world.inputs('', frames)
    return jax.eval_shape(world.condition, world.shapes(), *given)


def imagine(world, seed: int = 0):
    """A condition of noise, of the shapes of a real one; its controls are the first there are."""
    chance = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(chance.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(draw, told(world))


def clip_noise(world, count: int, seed: int = 0):
    """Latents [1 count H W C] to decode."""
    sizes = (1, count, *roofline.size(world.cfg), world.cfg.vae.latent_channels)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(sizes, np.float32))


def parts(world) -> dict:
    """ShapeDtypeStructs of what a step runs: the network and the decoder, as they are stored."""
    shapes = world.shapes()
    kept = {name: shapes[name] for name in RUNS}
    kept['vae'] = {'decoder': kept['vae']['decoder']}
    kinds = {name: getattr(world.cfg, field).dtype for name, field in RUNS.items()}
    return {
        name: jax.tree.map(
            lambda leaf, kind=kinds[name]: jax.ShapeDtypeStruct(leaf.shape, kind), tree
        )
        for name, tree in kept.items()
    }


def draw(world, mesh, seed: int = 0, decoder=None) -> dict:
    """Random parameters of `parts(world)`, drawn where they lie; kernels keep variances.

    Args:
      world: the world.
      mesh: devices of the network.
      seed: of the draw.
      decoder: devices of the decoder, the same by default.
    """
    shapes = parts(world)
    letters = {name: conversion.axes(world.tables[name]) for name in shapes}
    letters['vae'] = {'decoder': letters['vae']['decoder']}
    places = {
        name: sharding.shardings(
            letters[name], shapes[name], decoder if decoder and name == 'vae' else mesh
        )
        for name in shapes
    }
    places = conversion.flatten(places)
    stacked = conversion.flatten(letters)
    key, drawn = jax.random.key(seed, impl='rbg'), {}
    for index, (path, leaf) in enumerate(conversion.flatten(shapes).items()):
        kind = path.rsplit('/', 1)[-1]
        inner = leaf.shape[stacked[path][0] == 'layers' : -1]
        drawn[path] = _draw(
            jax.random.fold_in(key, index),
            kind,
            leaf.shape,
            leaf.dtype,
            math.prod(inner),
            places[path],
        )
    return conversion.unflatten(drawn)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw(key, kind, shape, dtype, inputs, place):
    if kind in ('scale', 'bias'):
        made = jnp.full(shape, float(kind == 'scale'), dtype)
    else:
        made = jax.random.uniform(key, shape, dtype, -1, 1) * (3 / inputs) ** 0.5
    return jax.lax.with_sharding_constraint(made.astype(dtype), place)
