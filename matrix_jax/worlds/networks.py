"""The networks of a world: parameters drawn, counted and placed on devices.

A `Component` is one network: its config, its weight table and its parameter shapes. A world lists
its components; all that follows from the list alone is the same for every world and is here, and
in `weights_folders`, which reads and writes them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.dit import segments
from matrix_jax.nn import initializers, linear
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.base import PyTree
from matrix_jax.weights import conversion

Draw = Callable[[int | None], np.ndarray[Any, Any]]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a world.

    Attributes:
      field: name of its config in the world's config.
      folder: name of its folder in the diffusers layout, and of its part of the parameters.
      weights: config -> weight table.
      shapes: config -> tree of ShapeDtypeStructs.
      init_rules: config -> rules for initial parameters (`nn.initializers`), before the defaults.
      zero_init: rules before those, with which training starts.
      stream_layer: what streams on one GPU change about the parameters of a layer.
      run_fields: config fields that say how the network runs, such as 'dtype'. They come from the
        recipe, all others from the weights folder.
    """

    field: str
    folder: str
    weights: Callable[[Any], conversion.Table]
    shapes: Callable[[Any], Params]
    init_rules: Callable[[Any], initializers.InitRules] = lambda cfg: ()
    zero_init: initializers.InitRules = ()
    stream_layer: Callable[[Params], Params] = lambda params: params
    run_fields: tuple[str, ...] = ()


class Networks:
    """What follows from the config and the list of components.

    Attributes:
      cfg: the world's config.
      components: the networks.
      decoder_folder: folder of the component whose decoder streams.
      network_folders: folders of the transformers; several have the same sizes.
      programs_folder: weights folder that may hold compiled programs of this world
        (`weights.stored_programs`), or None.
    """

    components: tuple[Component, ...] = ()
    decoder_folder: str = 'vae'
    network_folders: tuple[str, ...] = ('transformer',)
    programs_folder: Path | None = None

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def replace(self, **fields: Any) -> Self:
        """Returns the same world with config fields replaced."""
        return type(self)(dataclasses.replace(self.cfg, **fields))

    @property
    def tables(self) -> dict[str, conversion.Table]:
        """Weight table of each component by folder name."""
        return {one.folder: one.weights(getattr(self.cfg, one.field)) for one in self.components}

    def shapes(self) -> Params:
        """Returns the parameter tree as ShapeDtypeStructs, by component; allocates nothing."""
        return {
            one.folder: component_shapes(one, getattr(self.cfg, one.field))
            for one in self.components
        }

    # --- initial parameters ----------------------------------------------------------------------

    def init(
        self,
        seed: int,
        zero_init: bool = True,
        only: tuple[str, ...] | None = None,
        paths: str = '*',
    ) -> Params:
        """Returns initial parameters, float32 numpy, by component.

        Args:
          seed: one seed always gives the same parameters.
          zero_init: whether blocks start as the identity, for training; else all leaves are random.
          only: folder names of the components to draw; all by default.
          paths: pattern of the leaves to draw.
        """
        drawn = {}
        for component in self.components:
            if only is not None and component.folder not in only:
                continue
            leaves = {}
            for row, _, draw in self.draws(component, seed, zero_init):
                if not fnmatch.fnmatchcase(row.path, paths):
                    continue
                layers = range(*row.layers) if row.layers else ()
                leaves[row.path] = np.stack([draw(i) for i in layers]) if layers else draw(None)
            drawn[component.folder] = conversion.unflatten(leaves)
        return drawn

    def draws(
        self, component: Component, seed: int, zero_init: bool = True
    ) -> Iterator[tuple[conversion.Row, tuple[int, ...], Draw]]:
        """Yields (row, shape of one layer, draw) for each row of a component's weight table.

        `draw(i)` returns layer i, or with None a leaf that has no layers.
        """
        cfg = getattr(self.cfg, component.field)
        flat = conversion.flatten(component_shapes(component, cfg))
        zeros = component.zero_init if zero_init else ()
        rules = (*zeros, *component.init_rules(cfg))
        seeds = (seed, self.components.index(component))
        for row in component.weights(cfg):
            if isinstance(row, conversion.Row) and row.keys():
                shape = flat[row.path].shape[1:] if row.layers else flat[row.path].shape
                draw = functools.partial(initializers.draw, rules, row.path, shape, seeds)
                yield row, shape, draw

    def fingerprint_text(self) -> str:
        """Returns a text of the config for fingerprints of saved sessions.

        It uses the names of the first saved sessions, so that these stay readable.
        """
        text = repr(self.cfg)
        for name, first_name in FIRST_NAMES.items():
            text = text.replace(name, first_name)
        return text

    # --- other numbers of layers -----------------------------------------------------------------

    def shortened(self, layers: int | None, text_layers: int | None = None) -> Self:
        """Returns this world with fewer layers, to measure parts of a large one.

        Args:
          layers: layers of the transformer and of its encoders.
          text_layers: layers of the text encoder; as `layers` by default.

        Raises:
          UsageError: the world has no such layers.
        """
        if layers is None and text_layers is None:
            return self
        raise UsageError(f'--layers: {self.cfg.name} has no version with fewer layers')

    def with_new_layers(self, cfg: Any) -> Self:
        """Returns this world with the layers that `cfg` adds to a network before training."""
        return self

    def add_params(self, params: Params, before: Self, seed: int) -> Params:
        """Returns parameters of the world `before` with initial ones for the new layers."""
        return params

    # --- devices ---------------------------------------------------------------------------------

    def device_put(
        self, params: Params, mesh: jax.sharding.Mesh, decoder: jax.sharding.Mesh | None = None
    ) -> Params:
        """Returns parameters on a mesh, sharded by the axis letters of their weight tables.

        Args:
          params: parameters.
          mesh: the mesh.
          decoder: mesh of the video decoder, if it has its own.
        """
        return jax.device_put(params, self.param_places(params, mesh, decoder))

    def param_places(
        self, params: Params, mesh: jax.sharding.Mesh, decoder: jax.sharding.Mesh | None = None
    ) -> PyTree:
        """Returns the tree of shardings of `device_put`, which takes the same arguments."""
        tables = {name: conversion.axes(self.tables[name]) for name in params}
        # A component may be there without some of its parts, such as an encoder.
        axes = {name: {part: tables[name][part] for part in params[name]} for name in params}
        places = sharding.param_shardings(axes, params, mesh)
        if decoder not in (None, mesh):
            name = self.decoder_folder
            places[name]['decoder'] = sharding.param_shardings(
                axes[name]['decoder'], params[name]['decoder'], decoder
            )
        return places

    def split_decoder(self, params: Params) -> tuple[Params, Params | None]:
        """Returns (parameters of the network, parameters of the decoder).

        If both lie on the same devices, the first are all parameters and the second are None.
        """
        name = self.decoder_folder
        vae = params.get(name, {})
        some = [*jax.tree.leaves(vae.get('decoder'))[:1], *jax.tree.leaves(params)[:1]]
        if len({frozenset(leaf.devices()) for leaf in some if isinstance(leaf, jax.Array)}) < 2:
            return params, None
        rest = {half: tree for half, tree in vae.items() if half != 'decoder'}
        return params | {name: rest}, {name: {'decoder': vae['decoder']}}

    def quantize(self, params: Params) -> Params:
        """Returns parameters with the layers in 8 bits that the configs name (`int8_layers`).

        Activations are rounded to the nearest integer, or towards zero if a config says so
        (`int8_truncate`).
        """
        quantized = dict(params)
        for one in self.components:
            cfg = getattr(self.cfg, one.field)
            layers = getattr(cfg, 'int8_layers', ())
            if layers and one.folder in params:
                truncate = getattr(cfg, 'int8_truncate', False)
                quantized[one.folder] = linear.quantize(params[one.folder], layers, truncate)
        return quantized

    def stream_params(self, params: Params) -> Params:
        """Returns parameters as streams read them.

        On GPUs, the layers of the transformers are separate (`dit.segments`), unless they stay in
        host memory. Parameters that are so already are returned as they are.
        """
        if compilation.backend() != 'gpu':
            return params
        made = dict(params)
        changes = {one.folder: one.stream_layer for one in self.components}
        for name in self.network_folders:
            if name in params and not _in_host_memory(params[name]):
                places = _places(params[name])
                runs = {
                    row.path.split('/')[0]
                    for row in self.tables[name]
                    if isinstance(row, conversion.Row) and row.layers
                }
                alone = all(place.num_devices == 1 for place in places)
                change = changes[name] if alone else lambda layer: layer
                made[name] = segments.separate(params[name], runs, change)
        return made

    def summary(self, mesh: Any) -> str:
        """Returns a line per component: parameters, and memory per device at bfloat16.

        Args:
          mesh: a mesh, or an abstract one (`sharding.abstract_mesh`); nothing is allocated.
        """

        lines, total, total_local = [], 0, 0
        for name, (count, local) in self.sizes(mesh).items():
            lines.append(summary_line(name, count, local))
            total, total_local = total + count, total_local + local
        return '\n'.join([*lines, summary_line('total', total, total_local)])

    def sizes(self, mesh: Any) -> dict[str, tuple[int, int]]:
        """Returns (parameters, parameters per device) of each component by folder name."""
        found: dict[str, tuple[int, int]] = {}
        shapes = self.shapes()
        axes = {name: conversion.axes(self.tables[name]) for name in shapes}
        places = sharding.param_shardings(axes, shapes, mesh)
        for name in shapes:
            leaves = list(zip(*map(jax.tree.leaves, (shapes[name], places[name])), strict=True))
            count = sum(int(np.prod(leaf.shape)) for leaf, _ in leaves)
            local = sum(int(np.prod(place.shard_shape(leaf.shape))) for leaf, place in leaves)
            found[name] = count, local
        return found


def _places(params: Params) -> list[jax.sharding.Sharding]:
    """Shardings of the leaves that have one."""
    places = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(params))
    return [place for place in places if place is not None]


def _in_host_memory(params: Params) -> bool:
    """Whether parameters stay in host memory between steps."""
    return any(place.memory_kind == 'pinned_host' for place in _places(params))


def summary_line(name: str, count: int, local: int) -> str:
    """Line of `Networks.summary`: parameters, and MiB per device at bfloat16."""
    return f'{name:16}{count:>15,} parameters{local * 2 / 2**20:>11,.1f} MiB per device'


# Parts of a config's repr -> the same when sessions were first saved; empty for newer fields.
FIRST_NAMES = {
    "control_binding='late'": "entry='tail'",
    "control_binding='early'": "entry='head'",
    'condition_on_last_frame=': 'tell_last=',
    'ClipConfig(': 'Clip(',
    'ActionConfig(': 'Actions(',
    'ControlConfig(': 'Control(',
    ', blocks=None, norm_scale=False': '',
    'layer_bias=False, ': '',
    "spatial_levels=None, time_taps=(), resampling='average', ": '',
    "norm_frames='chunk', modulated=True, ": '',
}


@functools.cache
def component_shapes(component: Component, cfg: Any) -> PyTree:
    """Returns the parameter tree of a component of this config as ShapeDtypeStructs."""
    return component.shapes(cfg)
