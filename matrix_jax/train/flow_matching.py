"""Flow matching on clips that begin with a picture, under keyboard and mouse.

    x = (1 - sigma) x0 + sigma eps;   v = eps - x0;   loss = weight(sigma) (v_net - v)^2

sigma is drawn from the entries of the schedule's table. The foundation sees a clip whole, at one
level (`Foundation`). The streaming network sees blocks and what came before them, each block at a
level of its own (`CausalFlow`, after Diffusion Forcing, arXiv 2407.01392); since a stream reads
clean blocks, the blocks before a drawn one are clean in a share of the clips.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from matrix_jax.diffusion import flow
from matrix_jax.stream import causal
from matrix_jax.stream.causal import Cond
from matrix_jax.train.stage import Stage


@dataclasses.dataclass(frozen=True)
class FlowMatching(Stage):
    """Base of the stages on such clips.

    Attributes:
      clip_frames: pixel frames F = 1 + 4k of a clip.
      train_encoders: train the image tower too (first stage of a bundled world).
    """

    clip_frames: int = 45
    train_encoders: bool = False

    components = ('transformer', 'image_encoder', 'vae')

    def __post_init__(self):
        super().__post_init__()
        if self.clip_frames < 5 or (self.clip_frames - 1) % 4:
            raise ValueError(
                f'stage.clip_frames: got {self.clip_frames}, expected 1 + 4k with k '
                'of at least 1 (whole latent frames)'
            )

    def trainable(self, path):
        component = path.split('/')[0]
        return component == 'transformer' or (self.train_encoders and component == 'image_encoder')

    def frames(self, world) -> int:
        """Latent frames T of a clip."""
        return 1 + (self.clip_frames - 1) // world.cfg.stream.ratio

    def blocks(self, world) -> int:
        """Blocks of a clip.

        Raises:
          ValueError: the clip is no whole number of them.
        """
        frames, block = self.frames(world), world.cfg.stream.frames
        if frames % block:
            raise ValueError(
                f'stage.clip_frames: got {self.clip_frames}, which are {frames} '
                f'latent frames, expected whole blocks of {block}'
            )
        return frames // block

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data import image_clips

        return image_clips.ClipBatches(
            image_clips.encode(data, world, params, cache, self.clip_frames), batch, seed
        )

    def example(self, world, batch):
        cfg, frames = world.cfg, self.frames(world)
        scale = cfg.vae.spatial_compression
        rows, columns = cfg.height // scale, cfg.width // scale
        width = cfg.dit.actions.keyboard + (cfg.dit.actions.mouse or 0)
        shapes = {
            'latents': ('float16', frames, rows, columns, cfg.dit.channels),
            'told': ('float16', frames, rows, columns, cfg.dit.cond_channels),
            'picture': ('uint8', cfg.height, cfg.width, 3),
            'actions': ('float32', self.clip_frames, width),
        }
        return {
            name: jax.ShapeDtypeStruct((batch, *shape), dtype)
            for name, (dtype, *shape) in shapes.items()
        }

    def given(self, world, params, batch) -> Cond:
        """What a network is told of the pictures of a batch."""
        return Cond(
            latents=batch['told'].astype(jnp.float32),
            image=world.image_features(params, batch['picture'][:, None]),
        )

    def told(self, world, given: Cond, clean) -> Cond:
        """What a network that makes blocks is told of a clip with latents `clean` [B T H W C]."""
        return given.replace(
            latents=causal.condition_blocks(world.cfg.stream, given.latents, clean)
        )


@dataclasses.dataclass(frozen=True)
class Foundation(FlowMatching):
    """The network that sees clips whole."""

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key)
        clean = batch['latents'].astype(jnp.float32)
        entry = jax.random.randint(keys[0], (len(clean), 1), 0, world.cfg.flow.train_steps)
        entry = jnp.broadcast_to(entry, clean.shape[:2])
        return flow_loss(
            world, params, clean, self.given(world, params, batch), batch['actions'], entry, keys[1]
        ), {}


@dataclasses.dataclass(frozen=True)
class CausalFlow(FlowMatching):
    """The network that streams, on recorded clips.

    Attributes:
      clean: share of clips in which the blocks before a drawn one are clean.
      history_noise: greatest sigma of noise on these, of which the network is not told: what a
        stream reads is its own work.
    """

    clean: float = 0.5
    history_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ('clean', 'history_noise'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'stage.{name}: got {getattr(self, name)}, expected 0 to 1')

    def loss(self, world, params, batch, key):
        keys, count = jax.random.split(key, 6), self.blocks(world)
        clean, block = batch['latents'].astype(jnp.float32), world.cfg.stream.frames
        size = len(clean)

        def each(drawn):
            return jnp.repeat(drawn, block, axis=1)

        entry = each(jax.random.randint(keys[0], (size, count), 0, world.cfg.flow.train_steps))
        first = jax.random.randint(keys[1], (size, 1), 0, count)
        first = jnp.where(jax.random.uniform(keys[2], (size, 1)) < self.clean, first, 0)
        history = each(jnp.arange(count) < first)
        blur = self.history_noise * each(jax.random.uniform(keys[3], (size, count)))
        told = flow.add_noise(blur, clean, jax.random.normal(keys[5], clean.shape))
        given = self.told(world, self.given(world, params, batch), told)
        loss = flow_loss(
            world, params, clean, given, batch['actions'], entry, keys[4], block, history, blur
        )
        return loss, {'history': history.mean()}


def flow_loss(
    world, params, clean, cond: Cond, actions, entry, key, block=None, history=None, blur=0.0
):
    """Weighted error of the velocity of noised clips.

    Args:
      world: gives `denoise`, the schedule and the level of clean blocks.
      params: its parameters.
      clean: latents x0 [B T H W C].
      cond, actions: of the clip.
      entry: int32 [B T] into the schedule's table.
      key: of the noise.
      block: latent frames that are made together; None = the clip is seen whole.
      history: bool [B T], frames that are given and do not count.
      blur: sigma [B T] of the noise on these.
    """
    table = flow.table(world.cfg.flow)
    sigmas, levels, weights = (jnp.asarray(column)[entry] for column in table)
    if history is not None:
        sigmas = jnp.where(history, blur, sigmas)
        levels = jnp.where(history, world.cfg.stream.context_level, levels)
        weights = jnp.where(history, 0.0, weights)
        weights *= history.size / (~history).sum()
    noise = jax.random.normal(key, clean.shape)
    v = world.denoise(params, flow.add_noise(sigmas, clean, noise), levels, cond, actions, block)
    error = jnp.square(v - flow.velocity(clean, noise)).mean(axis=(2, 3, 4))
    return (weights * error).mean()
