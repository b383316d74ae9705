"""What every world is made of: named parts, and a folder in the released layout.

A part is one network: its config (read from the folder's config.json, so the folder decides the
sizes), its weight table and its parameter shapes. A world lists its parts; reading, writing,
counting and sharding them is the same for all worlds and stands here.

Who generates or serves a world sees no more of it than this:

    cfg.name, height, width, fps, prompt, clip     `clip`: it makes whole clips and does not stream
    vocabulary                                     words for controls (`controls.Symbols`)
    reads_text, start_frames, fit(frames)          what it starts from
    needed(seconds), whole(count), split(controls) controls of a video, of its start and its steps
    inputs(prompt, frames, controls=None)          what `condition` and `sample_clip` take
    first_step_controls                                 controls that `stream.prefill` takes
    cfg.stream.controls_per_step, lag, context, entered(...)   controls of a step; when they show
    condition, stream, sample_clip                 pure functions of parameters

Who measures one also asks for

    endless, warmup_steps                               whether it streams; when its memory is full
    cfg.dit, vae; cfg.stream.frames, passes, counted, step_frames, entry
                                                   what goes through the networks; what comes out
    latents, decoder, decode_chunk, precompute_for     both halves of a step, and what they are given
    one_mesh, stages, split_decoder, quantize              where they lie, and in what type
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.nn import initializers, linear
from matrix_jax.parallel import sharding
from matrix_jax.stream import base as streams
from matrix_jax.weights import conversion, diffusers_layout


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a world.

    Attributes:
      field: name of its config in the world's config.
      folder: its folder in the released layout.
      weights: config -> weight table.
      shapes: config -> tree of ShapeDtypeStructs.
      laws: config -> laws of fresh parameters (`nn.fresh`), beyond the common ones.
      still: laws before those, with which training starts.
    """

    field: str
    folder: str
    weights: Callable[[Any], conversion.Table]
    shapes: Callable[[Any], dict]
    laws: Callable[[Any], initializers.Laws] = lambda cfg: ()
    still: initializers.Laws = ()


class BaseWorld:
    """Base of worlds: `self.cfg` and the class attribute `components`."""

    components: tuple[Component, ...] = ()
    extras: tuple[str, ...] = ()  # folders without weights: tokenizers, scheduler

    reads_text = False
    warmup_steps = 0  # steps of a stream that remember less than those after them
    one_mesh = False  # whether both halves of a step share their devices, so that no pipeline is
    autoencoder: Any = None  # the module of the part 'vae'
    decode_chunk: int | None = None  # latent frames decoded at once; None = those of a step

    # What training, evaluation and benchmarks need to know of a world; they look these names up.
    prediction = ''  # what the network predicts: 'v_prediction' or 'flow_prediction'
    evaluator = ''  # who evaluates it, a name of `evals.report.EVALUATORS`
    roofline = ''  # who counts its FLOPs, a name of `benchmark.roofline.NETWORKS`
    has_int8_layers = False
    has_torch_baseline = False  # whether diffusers has the same network

    @property
    def first_step_controls(self) -> int:
        """Controls that the first step of a stream takes; as any other by default."""
        return self.cfg.stream.controls_per_step

    @property
    def endless(self) -> bool:
        """Whether the world makes endless videos, and no whole clips."""
        return self.cfg.clip is None

    def __init__(self, cfg):
        self.cfg = cfg

    def with_tokenizers(self, folder: str | None):
        """The world with the tokenizers of a weights folder, if it reads text."""
        return self

    @property
    def tables(self) -> dict[str, conversion.Table]:
        """Folder name -> weight table."""
        return {
            part.folder: part.weights(getattr(self.cfg, part.field)) for part in self.components
        }

    def shapes(self) -> dict:
        """Parameter tree of ShapeDtypeStructs by part; nothing is allocated."""
        return {
            part.folder: _shapes(part, getattr(self.cfg, part.field)) for part in self.components
        }

    def init(
        self, seed: int, still: bool = True, only: tuple[str, ...] | None = None, paths: str = '*'
    ) -> dict:
        """Fresh float32 numpy parameters by part.

        Args:
          seed: one seed is one tree.
          still: whether blocks start as the identity, for training; else every leaf is random.
          only: folders of the parts to draw; all by default.
          paths: pattern of the paths of the leaves to draw.
        """
        drawn = {}
        for part in self.components:
            if only is not None and part.folder not in only:
                continue
            leaves = {}
            for row, _, draw in self.draws(part, seed, still):
                if not fnmatch.fnmatchcase(row.path, paths):
                    continue
                layers = range(*row.layers) if row.layers else ()
                leaves[row.path] = np.stack([draw(i) for i in layers]) if layers else draw(None)
            drawn[part.folder] = conversion.unflatten(leaves)
        return drawn

    def draws(self, part: Component, seed: int, still: bool = True):
        """Yields (row, shape of one layer, draw) of each row of a part's table.

        `draw(i)` gives layer i of the row, or with None a leaf that is not stacked.
        """
        cfg = getattr(self.cfg, part.field)
        flat = conversion.flatten(_shapes(part, cfg))
        laws = (*(part.still if still else ()), *part.laws(cfg))
        for row in part.weights(cfg):
            if isinstance(row, conversion.Row) and row.keys():
                shape = flat[row.path].shape[1:] if row.layers else flat[row.path].shape
                seeds = (seed, self.components.index(part))
                yield row, shape, functools.partial(initializers.draw, laws, row.path, shape, seeds)

    def replace(self, **fields):
        """The same world with config fields replaced."""
        return type(self)(dataclasses.replace(self.cfg, **fields))

    def load(self, folder: str, only: tuple[str, ...] | None = None) -> dict:
        """Parameters from a folder that fits this world, strictly; numpy, dtype as stored.

        Raises:
          CheckpointError: a file is missing, damaged or not safetensors.
          ConversionError: names or shapes do not fit; all faults at once.
        """
        params = {}
        for part in self.components:
            if only is None or part.folder in only:
                place = self.locate(folder, part.folder)
                _, tensors = diffusers_layout.read_component(*place)
                cfg = getattr(self.cfg, part.field)
                try:
                    params[part.folder] = conversion.to_jax(
                        part.weights(cfg), tensors, _shapes(part, cfg)
                    )
                except conversion.ConversionError as error:
                    raise conversion.ConversionError(f'{"/".join(place)}: {error}') from error
        return params

    def locate(self, folder: str, name: str) -> tuple[str, str]:
        """(folder, component) where a part of a weights folder lies."""
        return str(folder), name

    def external_parts(self, folder: str) -> tuple[str, ...]:
        """Components that a weights folder leaves to another place, from where `locate` reads them."""
        return ()

    def has_part(self, folder: str, name: str) -> bool:
        """Whether a weights folder holds a component."""
        return (Path(folder) / name).is_dir()

    def can_load(self, folder: str, name: str) -> bool:
        """Whether training starts from a weights folder's component, or a borrowed one."""
        return self.has_part(folder, name)

    def with_new_layers(self, cfg):
        """This world with what `cfg` adds to a network, for training to begin."""
        return self

    def add_params(self, params: Mapping, narrow, seed: int) -> dict:
        """Parameters of the world `narrow`, with fresh ones for what `with_new_layers` added to it."""
        return params

    def save(self, folder: str, params: Mapping, start: str | None = None, dtype='bfloat16'):
        """Writes a folder in the released layout; parts that `params` lacks come from `start`, and
        what `start` borrows, the new folder borrows as well."""
        origin = Path(diffusers_layout.resolve(start)) if start else None
        borrowed = self.external_parts(origin) if origin else ()
        for part in self.components:
            cfg = getattr(self.cfg, part.field)
            if part.folder in params and part.folder not in borrowed:
                tensors = conversion.to_torch(part.weights(cfg), params[part.folder])
                diffusers_layout.write_component(
                    folder, part.folder, cfg.to_released(), tensors, dtype=dtype
                )
            elif origin and (origin / part.folder).is_dir():
                _copy(origin / part.folder, Path(folder) / part.folder)
        extras = [name for name in self.extras if name not in borrowed]
        for name in extras:
            if origin and (origin / name).is_dir():
                _copy(origin / name, Path(folder) / name)
            else:
                self.write_extra(name, os.path.join(folder, name))
        present = [part.folder for part in self.components if (Path(folder) / part.folder).is_dir()]
        index = {name: ['matrix_jax', name] for name in (*present, *extras)}
        diffusers_layout.write_json(
            folder, 'model_index.json', {'_class_name': self.cfg.name, **index}
        )

    def write_extra(self, name: str, folder: str):
        """Writes one of `extras` from scratch."""
        raise NotImplementedError

    # --- pixels and latents ----------------------------------------------------------------------

    @staticmethod
    def pixels(frames):
        """Frames uint8 -> float32 in [-1, 1]."""
        return jnp.asarray(frames, jnp.float32) / 127.5 - 1

    @staticmethod
    def to_uint8(frames):
        """Frames in [-1, 1] -> uint8, rounded."""
        return jnp.round(jnp.clip(frames / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def encode_frames(self, params, frames):
        """Frames uint8 [B F H W 3], F = 1 + 4k -> latents [B T H W C], scaled, posterior mean."""
        mean, _ = self.autoencoder.encode(self.cfg.vae, params['vae'], self.pixels(frames))
        return self.autoencoder.scaled(self.cfg.vae, mean)

    def encode_step(self, params, cache, frames):
        """One chunk of a long clip: frames uint8 [B F H W 3] -> (cache, latents [B T H W C])."""
        cfg = self.cfg.vae
        cache, mean, _ = self.autoencoder.encode_step(
            cfg, params['vae'], cache, self.pixels(frames)
        )
        return cache, self.autoencoder.scaled(cfg, mean)

    def decoder(self) -> streams.Decoder:
        """Streaming decoder: latents of one step -> uint8 frames."""
        vae, cfg = self.autoencoder, self.cfg.vae

        def prefill(params, latents):
            cache, frames = vae.prefill(cfg, params['vae'], vae.unscaled(cfg, latents))
            return cache, self.to_uint8(frames)

        def step(params, cache, latents):
            count = latents.shape[1] // (self.decode_chunk or latents.shape[1])
            frames = []
            for part in jnp.split(vae.unscaled(cfg, latents), count, axis=1):
                cache, made = vae.step(cfg, params['vae'], cache, part)
                frames.append(made)
            return cache, self.to_uint8(jnp.concatenate(frames, axis=1))

        return streams.Decoder(prefill, step)

    # --- devices ---------------------------------------------------------------------------------

    def device_put(self, params, mesh, decoder=None):
        """Parameters on the mesh: sharded by the letters of their tables.

        Args:
          params: parameters.
          mesh: the mesh.
          decoder: the mesh of what turns latents into frames, if it has one of its own.
        """
        axes = {name: conversion.axes(self.tables[name]) for name in params}
        places = sharding.shardings(axes, params, mesh)
        if decoder not in (None, mesh):
            places['vae']['decoder'] = sharding.shardings(
                axes['vae']['decoder'], params['vae']['decoder'], decoder
            )
        return jax.device_put(params, places)

    def split_decoder(self, params):
        """(parameters of the network, those of the decoder); the second are None where both lie on
        the same devices, and the first are then all."""
        vae = params.get('vae', {})
        some = [*jax.tree.leaves(vae.get('decoder'))[:1], *jax.tree.leaves(params)[:1]]
        if len({frozenset(leaf.devices()) for leaf in some if isinstance(leaf, jax.Array)}) < 2:
            return params, None
        rest = {name: tree for name, tree in vae.items() if name != 'decoder'}
        return params | {'vae': rest}, {'vae': {'decoder': vae['decoder']}}

    def quantize(self, params):
        """Parameters with the layers that the configs of the parts name in 8 bits."""
        chosen = {
            part.folder: getattr(getattr(self.cfg, part.field), 'int8_layers', ())
            for part in self.components
        }
        return {
            name: linear.quantize(tree, chosen[name]) if chosen.get(name) else tree
            for name, tree in params.items()
        }

    def precompute(self, params):
        """Parameters for streaming, with what no step of the stream changes."""
        return params

    def precompute_for(self, params, cond):
        """(parameters, condition) for streaming, of a condition made with others than `precompute` ones."""
        return self.precompute(params), cond

    def summary(self, mesh) -> str:
        """One line per part: parameters, and memory per device at bfloat16. Nothing is allocated.

        Args:
          mesh: a mesh, or an abstract one (`sharding.abstract_mesh`) of devices that are not here.
        """

        def line(name, count, mine):
            return f'{name:16}{count:>15,} parameters{mine * 2 / 2**20:>11,.1f} MiB per device'

        lines, total, local = [], 0, 0
        shapes = self.shapes()
        axes = {name: conversion.axes(self.tables[name]) for name in shapes}
        places = sharding.shardings(axes, shapes, mesh)
        for name in shapes:
            leaves = list(zip(*map(jax.tree.leaves, (shapes[name], places[name])), strict=True))
            count = sum(int(np.prod(leaf.shape)) for leaf, _ in leaves)
            mine = sum(int(np.prod(place.shard_shape(leaf.shape))) for leaf, place in leaves)
            lines.append(line(name, count, mine))
            total, local = total + count, local + mine
        return '\n'.join([*lines, line('total', total, local)])


def check_frames(cfg) -> None:
    """ValueError if the networks of a world's config cannot make its frames."""
    scale = cfg.vae.spatial_compression * cfg.dit.patch
    if cfg.height <= 0 or cfg.width <= 0 or cfg.height % scale or cfg.width % scale:
        raise ValueError(
            f'world: got {cfg.height}x{cfg.width} pixels, expected positive '
            f'multiples of {scale} (VAE {cfg.vae.spatial_compression}, patch '
            f'{cfg.dit.patch})'
        )
    if cfg.fps <= 0:
        raise ValueError(f'world.fps: got {cfg.fps}, expected at least 1')


@functools.cache
def _shapes(part: Component, cfg) -> dict:
    return part.shapes(cfg)


def read_config(part_config, folder: str, name: str):
    """`part_config.from_released` of a part's config.json, with the folder named in errors."""
    released = diffusers_layout.read_config(folder, name)
    try:
        cfg = part_config.from_released(released)
        wrong = [
            f'{field.name}: got {getattr(cfg, field.name)!r}, expected {kind.__name__}'
            for field in dataclasses.fields(cfg)
            if (kind := type(field.default)) in (int, str)
            and type(getattr(cfg, field.name)) is not kind
        ]
        if wrong:
            raise ValueError('; '.join(wrong))
    except (ValueError, TypeError) as error:
        found, wanted = (one.get('_class_name') for one in (released, part_config().to_released()))
        said = str(error)
        if found not in (None, wanted):
            said = f'got a {found}, expected a {wanted} by the recipe' + (
                '' if isinstance(error, TypeError) else f': {said}'
            )
        raise diffusers_layout.CheckpointError(f'{folder}/{name}/config.json: {said}') from error
    return cfg


def read_parts(
    world: BaseWorld, folder: str, whole: bool, kept: Mapping[str, tuple[str, ...]]
) -> dict:
    """Configs of a world's parts as a weights folder has them: field -> config.

    The folder decides the sizes of the parts that it holds; how they run is the recipe's.

    Args:
      world: of the recipe.
      folder: in the released layout.
      whole: whether every part is to be loaded; else those that are not there are left out.
      kept: field -> names that say how a part runs.
    """
    found = {}
    for part in world.components:
        if whole or world.has_part(folder, part.folder):
            mine = getattr(world.cfg, part.field)
            read = read_config(type(mine), *world.locate(folder, part.folder))
            found[part.field] = dataclasses.replace(
                read, **{name: getattr(mine, name) for name in kept.get(part.field, ())}
            )
    return found


def _copy(source: Path, target: Path):
    if source.resolve() != target.resolve():
        diffusers_layout.replace_folder(
            target, lambda part: shutil.copytree(source, part, dirs_exist_ok=True)
        )
