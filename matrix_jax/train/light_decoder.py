"""Distils the decoder of a Wan autoencoder into a light one with fewer channels.

The light decoder learns to draw what the full one draws from the latents of recorded clips. Linear
heads, which are dropped afterwards, map its features to those of the full decoder at every frame
size:

    loss = absolute |e| + square e^2 + edges |grad e| + features d
    d    = mean over l of |head_l(f_l) - F_l|^2 / |F_l|^2

with e the difference of the frames and f_l, F_l the features behind the middle and behind each
level of the light and of the full decoder. Losses and schedules of the published light decoders are
not known; that they were trained with heads shows in their files.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from matrix_jax.config import UsageError
from matrix_jax.nn import initializers
from matrix_jax.train.stage import Stage, example_batch
from matrix_jax.vae import wan
from matrix_jax.weights import conversion

LIGHT, HEADS = 'vae_decoder', 'heads'


@dataclasses.dataclass(frozen=True)
class LightDecoder(Stage):
    """Trains a decoder with fewer channels; the full autoencoder stays as it is.

    Attributes:
      rate: share of the channels that the light decoder lacks; the published ones lack 0.5 and
        0.75.
      frames: clip length F = 1 + 4k.
      absolute: weight of the mean absolute error.
      square: weight of the mean square error.
      edges: weight of the L1 error of spatial gradients.
      features: weight of the error of features, relative to their size; 0 = frames alone.
    """

    rate: float = 0.5
    frames: int = 17
    absolute: float = 1.0
    square: float = 2.0
    edges: float = 0.5
    features: float = 0.2

    components: ClassVar = ('vae', LIGHT)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(f'stage.rate: got {self.rate}, expected 0 < rate < 1')
        if self.frames < 5 or (self.frames - 1) % 4:
            raise ValueError(
                f'stage.frames: got {self.frames}, expected 1 + 4k with k of at least 1'
            )
        self.check_fields(**dict.fromkeys(('absolute', 'square', 'edges', 'features'), (0, 1e6)))
        if not self.absolute + self.square:
            raise ValueError(
                'stage.square: got 0 with stage.absolute 0, expected one of them above 0'
            )

    def check_world(self, world):
        super().check_world(world)
        if not isinstance(world.cfg.vae, wan.Config) or not hasattr(world.cfg, 'light'):
            raise UsageError(
                f'stage: {type(self).__name__} trains worlds that may have a light decoder, got '
                f'{world.cfg.name}'
            )
        if world.cfg.light is not None:
            raise UsageError(
                'world.light: got a light decoder, expected None: training starts from the full one'
            )

    def light(self, world):
        """The same world with the light decoder."""
        full = world.cfg.vae
        width = round((full.decoder_dim or full.dim) * (1 - self.rate))
        return world.replace(light=dataclasses.replace(full, decoder_dim=width))

    def start(self, world, params, seed, allow_non_finite=False):
        light = self.light(world)
        drawn = light.init(seed, only=(LIGHT,))[LIGHT]
        heads = {
            name: {'kernel': initializers.draw((), f'{name}/kernel', shape, (seed, 0))}
            for name, shape in self._head_shapes(light.cfg).items()
        }
        return {'vae': params['vae'], LIGHT: drawn, HEADS: heads}

    def _head_shapes(self, cfg) -> dict[str, tuple[int, int]]:
        """(channels of the light decoder, channels of the full one) of each head."""
        return {
            name: (small, large)
            for (name, small), large in zip(
                wan.feature_widths(cfg.light).items(), wan.feature_widths(cfg.vae).values()
            )
        }

    def axes(self, world):
        tables = {name: conversion.axes(table) for name, table in self.light(world).tables.items()}
        tables['vae'] = conversion.axes(world.tables['vae'])
        return conversion.flatten({name: tables[name] for name in self.components})

    def trainable(self, path):
        return path.split('/')[0] in (LIGHT, HEADS)

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data.loader import Loader

        return Loader(data, self.frames, batch, seed, mirror=0.5 if world.cfg.mirror else 0.0)

    def example(self, world, batch):
        size = world.cfg.height, world.cfg.width
        return example_batch(batch, frames=('uint8', self.frames, *size, 3))

    def loss(self, world, params, batch, key):
        full, light = world.cfg.vae, self.light(world).cfg.light
        frames = batch['frames'].astype(jnp.float32) / 127.5 - 1
        latents, _ = wan.encode(full, params['vae'], frames)
        latents = jax.lax.stop_gradient(latents)
        target, wanted = jax.lax.stop_gradient(
            wan.decode_with_features(full, params['vae'], latents)
        )
        made, features = wan.decode_with_features(light, params[LIGHT], latents)
        error = made - target
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        apart = [
            jnp.square(features[name] @ head['kernel'] - wanted[name]).mean()
            / jnp.maximum(jnp.square(wanted[name]).mean(), 1e-6)
            for name, head in params[HEADS].items()
        ]
        apart = sum(apart) / len(apart)
        loss = (
            self.absolute * jnp.abs(error).mean()
            + self.square * jnp.square(error).mean()
            + self.edges * edges
            + self.features * apart
        )

        def psnr(other):
            return 10 * jnp.log10(4 / jnp.square(made - other).mean())

        return loss, {'psnr': psnr(frames), 'psnr_full': psnr(target), 'features': apart}

    def finish(self, world, params, loader):
        """The world with the light decoder; the full autoencoder stays in the weights folder."""
        return self.light(world), {LIGHT: params[LIGHT]}
