"""The networks of Matrix-Game 3.0: components, folders, and the function that a stream calls."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.dit import segments
from matrix_jax.dit import wan_memory as dit
from matrix_jax.encoders import t5
from matrix_jax.stream import memory
from matrix_jax.stream.base import PyTree
from matrix_jax.vae import wan as vae
from matrix_jax.weights import conversion
from matrix_jax.worlds.networks import Component, Params

# Folders of the two experts, as in diffusers: for high and for low noise levels.
EXPERTS = ('transformer', 'transformer_2')
# Folders of the published weights, by the kind of world; '' is the weights folder itself. The two
# experts are not published; these are the names of Wan 2.2.
PUBLISHED = {
    'base': {'transformer': 'base_model'},
    'distilled': {'transformer': 'base_distilled_model'},
    'experts': dict(zip(EXPERTS, ('high_noise_model', 'low_noise_model'), strict=True)),
    'clip': {'transformer': ''},
}
TOKENIZER = 'google/umt5-xxl'


@functools.cache
def components(light: bool, experts: bool = False) -> tuple[Component, ...]:
    """Returns the components of a world.

    Args:
      light: whether a light decoder streams.
      experts: whether there are two networks.
    """

    def transformer(folder: str) -> Component:
        return Component(
            'dit',
            folder,
            dit.weights,
            dit.shapes,
            dit.init_rules,
            zero_init=dit.ZERO_INIT,
            run_fields=('dtype', 'remat', 'scan_unroll', 'exchange', 'int8', 'int8_truncate'),
        )

    def autoencoder(field: str, folder: str, half: str | None) -> Component:
        return Component(
            field,
            folder,
            functools.partial(half_weights, half=half),
            functools.partial(half_shapes, half=half),
            lambda cfg: vae.INIT_RULES,
            run_fields=('dtype', 'chunk'),
        )

    text = Component(
        'text', 'text_encoder', t5.weights, t5.shapes, t5.init_rules, run_fields=('dtype',)
    )
    networks = [transformer(folder) for folder in EXPERTS[: 1 + experts]]
    if not light:
        return *networks, autoencoder('vae', 'vae', None), text
    encoder = autoencoder('vae', 'vae', 'encoder')
    return *networks, encoder, text, autoencoder('light', 'vae_decoder', 'decoder')


def published(kind: str, folder: str | Path, name: str) -> str:
    """Returns the folder of a component: its own, or the published one if only that is there."""
    other = (PUBLISHED[kind] | {'tokenizer': TOKENIZER}).get(name, name)
    place = Path(folder) / other
    there = place.is_dir() if other else (place / 'config.json').is_file()
    return other if there and not (Path(folder) / name).is_dir() else name


def network(
    cfg: dit.Config, pixels: int, experts: memory.Experts | None = None
) -> memory.MemoryNetwork:
    """Returns the transformer as a stream calls it, with the parameters of a world.

    Args:
      cfg: sizes.
      pixels: pixels of a latent pixel, in height and in width.
      experts: how two networks share the steps; None = there is one network.
    """
    net, sizes = dit.WanMemoryTransformer(cfg), cfg.actions
    assert sizes is not None
    keys, mouse_width = sizes.keyboard or 0, sizes.mouse or 0

    def denoise(params: Params, x: Any, level: Any, segment: memory.Segment) -> jax.Array:
        count, frames = segment.memory.shape[1], x.shape[1]

        def windows(actions: Any, unknown: float) -> jax.Array:
            of_memory = jnp.full((len(x), count, actions.shape[-1]), unknown)
            return dit.frame_windows(sizes, actions, frames, of_memory)

        keyboard = windows(segment.actions[..., :keys], memory.NO_KEY) if keys else None
        mouse = windows(segment.actions[..., keys:], memory.NO_MOUSE) if mouse_width else None
        v: Any = net.apply(
            {'params': params[EXPERTS[0]]},
            jnp.concatenate([segment.memory, x], axis=1),
            jnp.pad(level, ((0, 0), (count, 0))),
            segment.text,
            segment.positions,
            segment.rays,
            mouse,
            keyboard,
            count,
        )
        return v

    def begin(params: Params, segment: memory.Segment) -> memory.Segment:
        run = params[EXPERTS[0]][next(iter(cfg.segments))]
        if segment.rays is None or not segments.is_separate(run):
            return segment
        variables = {'params': params[EXPERTS[0]]}
        rays = net.apply(variables, segment.text, segment.rays, method='read_segment')
        return dataclasses.replace(segment, rays=rays)

    def expert(params: Params, index: int, x: jax.Array) -> Params:
        chosen = params[EXPERTS[index]]
        return {EXPERTS[0]: from_host(chosen, x) if experts and experts.offload else chosen}

    return memory.MemoryNetwork(denoise, keys, mouse_width, pixels, expert, begin)


def from_host(params: PyTree, x: jax.Array) -> PyTree:
    """Copies parameters from host memory to the devices; x must be known before the copy begins.

    Without this order, both experts could be on the devices at the same time.
    """
    params, _ = jax.lax.optimization_barrier((params, x))
    return jax.device_put(params, jax.memory.Space.Device)


def half_weights(cfg: vae.Config, half: str | None) -> conversion.Table:
    """Returns the weight table of an autoencoder, or of its 'encoder' or 'decoder' alone."""
    table: conversion.Table = vae.weights(cfg)
    if half is None:
        return table
    return tuple(
        conversion.Drop(row.torch, why=f'only the {half} is used')
        if isinstance(row, conversion.Row) and row.path.split('/')[0] != half
        else row
        for row in table
    )


def half_shapes(cfg: vae.Config, half: str | None) -> Params:
    """Returns parameter shapes of an autoencoder, or of its 'encoder' or 'decoder' alone."""
    shapes: Params = vae.shapes(cfg)
    return shapes if half is None else {half: shapes[half]}


def completed(found: vae.Config, recipe: vae.Config, released: Mapping[str, Any]) -> vae.Config:
    """Returns the config of an autoencoder with the recipe's values of keys that its file lacks.

    Args:
      found: config as read from the file.
      recipe: config of the recipe.
      released: content of the file.
    """
    missing = [name for name in ('time_sees_first', 'norm_eps') if name not in released]
    return dataclasses.replace(found, **{name: getattr(recipe, name) for name in missing})


def has_norm_scales(tensors: Mapping[str, Any]) -> bool:
    """Returns whether any weight of the query and key norms of action modules is not one."""
    norm = re.compile(r'action_model\.(img|key)_attn_[qk]_norm\.weight$')
    return any(
        bool(np.any(np.asarray(tensors[name], np.float32) != 1))
        for name in tensors
        if norm.search(name)
    )
