"""Flow matching on clips that begin with a picture, under keyboard and mouse (Matrix-Game 2.0).

    x = (1 - sigma) x0 + sigma eps;   v = eps - x0;   loss = weight(sigma) |v_net - v|^2

sigma is drawn from the entries of the schedule's table. The foundation network sees a whole clip
at one level (`Foundation`). The streaming network is block-causal, with a level per block
(`CausalFlow`, after Diffusion Forcing, arXiv 2407.01392). A stream reads clean blocks, so in a
share of the clips all blocks before a random one are clean.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from matrix_jax.diffusion import flow
from matrix_jax.stream import causal
from matrix_jax.stream.causal import Cond
from matrix_jax.train.stage import Stage, check_clip_frames, example_batch, latent_size


@dataclasses.dataclass(frozen=True)
class FlowMatching(Stage):
    """Base of the flow-matching stages.

    Attributes:
      clip_frames: pixel frames F = 1 + 4k of a clip.
      train_encoders: also train the image encoder (first stage of a bundled world).
    """

    clip_frames: int = 45
    train_encoders: bool = False

    prediction: ClassVar = 'flow_prediction'
    components: ClassVar = ('transformer', 'image_encoder', 'vae')

    def __post_init__(self):
        super().__post_init__()
        check_clip_frames(self.clip_frames)

    def trainable(self, path):
        component = path.split('/')[0]
        return component == 'transformer' or (self.train_encoders and component == 'image_encoder')

    def frames(self, world) -> int:
        """Latent frames T of a clip."""
        return 1 + (self.clip_frames - 1) // world.cfg.stream.ratio

    def blocks(self, world) -> int:
        """Number of blocks in a clip.

        Raises:
          ValueError: the clip is not a whole number of blocks.
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

        store = image_clips.encode(data, world, params, cache, self.clip_frames)
        return image_clips.ClipBatches(store, batch, seed)

    def example(self, world, batch):
        cfg, frames, size = world.cfg, self.frames(world), latent_size(world.cfg)
        return example_batch(
            batch,
            latents=('float16', frames, *size, cfg.dit.channels),
            condition=('float16', frames, *size, cfg.dit.cond_channels),
            picture=('uint8', cfg.height, cfg.width, 3),
            actions=(
                'float32',
                self.clip_frames,
                cfg.dit.actions.keyboard + (cfg.dit.actions.mouse or 0),
            ),
        )

    def condition(self, world, params, batch) -> Cond:
        """Condition of the network from the start pictures of a batch."""
        return Cond(
            latents=batch['condition'].astype(jnp.float32),
            image=world.image_features(params, batch['picture'][:, None]),
        )

    def block_condition(self, world, cond: Cond, clean) -> Cond:
        """Condition of a network that makes blocks of a clip with latents `clean` [B T H W C]."""
        latents = causal.condition_blocks(world.cfg.stream, cond.latents, clean)
        return dataclasses.replace(cond, latents=latents)


@dataclasses.dataclass(frozen=True)
class Foundation(FlowMatching):
    """Trains the network that sees whole clips."""

    def loss(self, world, params, batch, key):
        keys = jax.random.split(key)
        clean = batch['latents'].astype(jnp.float32)
        entry = jax.random.randint(keys[0], (len(clean), 1), 0, world.cfg.flow.train_steps)
        entry = jnp.broadcast_to(entry, clean.shape[:2])
        cond = self.condition(world, params, batch)
        return flow_loss(world, params, clean, cond, batch['actions'], entry, keys[1]), {}


@dataclasses.dataclass(frozen=True)
class CausalFlow(FlowMatching):
    """Trains the streaming network on recorded clips.

    Attributes:
      clean: share of clips in which the blocks before a random one are clean.
      history_noise: largest sigma of noise on those blocks. The network is not given it, as a
        stream does not know the errors of its own blocks.
    """

    clean: float = 0.5
    history_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(clean=(0, 1), history_noise=(0, 1))

    def loss(self, world, params, batch, key):
        keys, count = jax.random.split(key, 6), self.blocks(world)
        clean, block = batch['latents'].astype(jnp.float32), world.cfg.stream.frames
        size = len(clean)

        def per_frame(blocks):
            return jnp.repeat(blocks, block, axis=1)

        entry = jax.random.randint(keys[0], (size, count), 0, world.cfg.flow.train_steps)
        first = jax.random.randint(keys[1], (size, 1), 0, count)
        first = jnp.where(jax.random.uniform(keys[2], (size, 1)) < self.clean, first, 0)
        history = per_frame(jnp.arange(count) < first)
        blur = self.history_noise * per_frame(jax.random.uniform(keys[3], (size, count)))
        blurred = flow.add_noise(blur, clean, jax.random.normal(keys[5], clean.shape))
        cond = self.block_condition(world, self.condition(world, params, batch), blurred)
        loss = flow_loss(
            world,
            params,
            clean,
            cond,
            batch['actions'],
            per_frame(entry),
            keys[4],
            block,
            history,
            blur,
        )
        return loss, {'history': history.mean()}


def flow_loss(
    world, params, clean, cond: Cond, actions, entry, key, block=None, history=None, blur=0.0
):
    """Weighted squared error of the velocity.

    Args:
      world: gives `denoise`, the schedule and the level of clean blocks.
      params: parameters of the world.
      clean: latents x0 [B T H W C].
      cond: condition of the clip.
      actions: float32 [B F A].
      entry: indices int32 [B T] into the schedule's table.
      key: key of the noise.
      block: latent frames that are made together; None = the network sees the whole clip.
      history: bool [B T], frames that are inputs only and do not count.
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
