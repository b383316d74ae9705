"""The target of a benchmark: a streaming world, its parameters on a mesh, and a start condition.

Weights come from a folder or are drawn at random on the devices; speed does not depend on them.
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


@dataclasses.dataclass(frozen=True)
class Target:
    """A world that is ready to stream.

    Attributes:
      name: name of the recipe.
      world: the world.
      params: parameters on the meshes; random ones hold only the components that a step runs.
      mesh: devices of the network, and of the decoder unless it has its own.
      decoder: devices of the decoder.
      cond: the condition that the stream starts from, on the mesh.
      random: whether the weights are random.
    """

    name: str
    world: Any
    params: dict
    mesh: jax.sharding.Mesh
    decoder: jax.sharding.Mesh
    cond: Any
    random: bool

    @property
    def split(self) -> tuple[Target, Target]:
        """Targets of the network and of the decoder, each with its mesh and parameters; this target
        twice if both share one mesh."""
        params, decoder = self.world.split_decoder(self.params)
        if decoder is None:
            return self, self
        return (
            dataclasses.replace(self, params=params, decoder=self.mesh),
            dataclasses.replace(self, params=decoder, mesh=self.decoder),
        )

    @property
    def devices(self) -> dict[str, int]:
        """Number of devices of each part: {'dit', 'vae', 'end_to_end'}."""
        both = {*self.mesh.devices.flat, *self.decoder.devices.flat}
        return {'dit': self.mesh.size, 'vae': self.decoder.size, 'end_to_end': len(both)}

    def within(self):
        """Context in which programs for the mesh are traced."""
        return sharding.use_mesh(self.mesh)

    @property
    def controls(self) -> tuple[np.ndarray, np.ndarray]:
        """Two encoded controls of one step, batch 1: the one held first and the one after it."""
        return two_controls(self.world)

    def run(self, function, *given):
        """Result of a function, replicated over the mesh."""
        with self.within():
            made = jax.jit(function)(*given)
        return jax.device_put(made, sharding.replicated(self.mesh))


def shape(run, random: bool = False, layers: int | None = None):
    """Config of the world that a run measures.

    Raises:
      UsageError: the world does not stream, or options contradict each other.
    """
    if layers is not None and not random:
        raise UsageError(f'--layers: got {layers} without --random; weights have their own layers')
    if random and run.lora:
        raise UsageError('--lora: got an adapter with --random, expected real weights')
    if not random and not run.weights:
        raise UsageError(f'{run.name}: needs --weights FOLDER, or --random')
    cfg = converter.shorten(run.world, layers)
    world = worlds.build(cfg)
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
      random: whether to draw the weights instead of reading them.
      layers: layers of a random network; None = as in the recipe.
      seed: seed of random weights and starts.

    Raises:
      UsageError: see `shape`.
      CheckpointError, ConversionError: the weights cannot be used.
    """
    cfg = shape(run, random, layers)
    compilation.enable_cache(run.keep_programs)
    mesh, decoder = sharding.make_meshes(run.mesh)
    if random:
        world = build(cfg)
        params = world.stream_params(world.quantize(draw(world, mesh, seed, decoder)))
        cond = random_condition(world, seed)
    else:
        world, params = worlds.open_run(run, split_decoder=True)
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
    """Condition of the bundled start clip or picture; a grey one if the world has none."""
    cfg = world.cfg
    try:
        frames = generate.start_clip(world, folder, cfg.prompt, None, False)
    except UsageError:
        frames = np.full([world.start_frames, cfg.height, cfg.width, 3], 128, np.uint8)
    given, _ = world.inputs(cfg.prompt, frames)
    with sharding.use_mesh(mesh):
        return jax.jit(world.condition)(params, *given)


def build(cfg):
    """World of a config, for random weights."""
    return worlds.build(cfg).with_tokenizers(None)


def two_controls(world) -> tuple[np.ndarray, np.ndarray]:
    """Two different encoded controls of one step, batch 1, neither of them idle."""
    words = world.vocabulary
    held = [one for one in words.choices if one != words.idle][:2]
    return tuple(words.encode([one] * world.cfg.stream.controls_per_step)[None] for one in held)


def stream(world, control_binding: str | None = None) -> Stream:
    """Stream of a world whose steps are all alike: `init` makes the first output."""
    return prefilled(world.stream(control_binding), first_control(world))


def network_stream(world) -> Stream:
    """Like `stream` without the decoder; it returns latents."""
    return prefilled(world.latents(), first_control(world))


def first_control(world) -> np.ndarray:
    """Encoded control of the first step, in which no key is pressed."""
    words = world.vocabulary
    return words.encode([words.idle] * world.first_step_controls)[None]


def condition_shapes(world):
    """ShapeDtypeStructs of the condition that a stream of a world starts from."""
    cfg = world.cfg
    frames = np.zeros([world.start_frames, cfg.height, cfg.width, 3], np.uint8)
    given, _ = world.inputs('', frames)
    return jax.eval_shape(world.condition, world.shapes(), *given)


def random_condition(world, seed: int = 0):
    """Condition of random values; integers (controls) are 0."""
    chance = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(chance.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(draw, condition_shapes(world))


def clip_noise(world, count: int, seed: int = 0):
    """Random latents [1 count H W C]."""
    sizes = (1, count, *roofline.size(world.cfg), world.cfg.vae.latent_channels)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(sizes, np.float32))


def step_params(world) -> dict:
    """ShapeDtypeStructs of the parameters that a step runs: the network and the decoder."""
    shapes, decoder = world.shapes(), world.decoder_folder
    kept = {name: shapes[name] for name in world.network_folders}
    kept[decoder] = {'decoder': shapes[decoder]['decoder']}
    kinds = {one.folder: getattr(world.cfg, one.field).dtype for one in world.components}
    return {
        name: jax.tree.map(
            lambda leaf, kind=kinds[name]: jax.ShapeDtypeStruct(leaf.shape, kind), tree
        )
        for name, tree in kept.items()
    }


def draw(world, mesh, seed: int = 0, decoder=None) -> dict:
    """Random parameters like `step_params(world)`, drawn in their shardings.

    Kernels preserve the variance of their inputs.

    Args:
      world: the world.
      mesh: devices of the network.
      seed: seed of the draw.
      decoder: devices of the decoder; None = those of the network.
    """
    shapes = step_params(world)
    places = conversion.flatten(world.param_places(shapes, mesh, decoder))
    letters = {name: conversion.axes(world.tables[name]) for name in shapes}
    stacked = conversion.flatten(letters)
    key, drawn = jax.random.key(seed, impl='rbg'), {}
    for index, (path, leaf) in enumerate(conversion.flatten(shapes).items()):
        name = path.rsplit('/', 1)[-1]
        inputs = math.prod(leaf.shape[stacked[path][0] == 'layers' : -1])
        leaf_key = jax.random.fold_in(key, index)
        place = places[path].with_memory_kind('device')
        made = _draw(leaf_key, name, leaf.shape, leaf.dtype, inputs, place)
        drawn[path] = jax.device_put(made, places[path])  # a place may be in host memory
    return conversion.unflatten(drawn)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw(key, name, shape, dtype, inputs, place):
    if name in ('scale', 'bias'):
        made = jnp.full(shape, float(name == 'scale'), dtype)
    else:
        made = jax.random.uniform(key, shape, dtype, -1, 1) * (3 / inputs) ** 0.5
    return jax.lax.with_sharding_constraint(made.astype(dtype), place)
