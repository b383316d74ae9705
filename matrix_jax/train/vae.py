"""Stage 0: trains the video autoencoder of a bundled world from scratch.

Clips pass the encoder and the *streaming* decoder as in use, because norms that see one chunk at a
time have other statistics than norms over a whole clip.

    loss = w (absolute |e| + square e^2) + edges |grad e| + kl KL(N(mean, var) || N(0, 1)),
    e = decoded - clip, w = 1 or the weight of the pixel's colour (`rare`)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import vae
from matrix_jax.config import UsageError
from matrix_jax.parallel import compilation
from matrix_jax.train.stage import Stage, example_batch


@dataclasses.dataclass(frozen=True)
class Autoencode(Stage):
    """Reconstruction, spatial gradients and a weak KL divergence.

    Attributes:
      frames: clip length F = 1 + 8k.
      crop: height and width in pixels of the random part of each clip that is trained on; empty =
        whole frames. Parts of many clips differ more than whole frames of few.
      absolute: weight of the mean absolute error.
      square: weight of the mean square error.
      rare: emphasis on rare colours, from 0 (none) to 1: the weight of a pixel is proportional to
        the share of its colour in the batch to the power of -rare, with a mean of 1, and at most
        `MAX_WEIGHT`.
      kl: weight of the KL divergence to N(0, 1), per latent element.
      edges: weight of the L1 error of spatial gradients.
      train_encoder: whether the encoder trains too; if not, latents keep their meaning for a
        trained stream.

    Raises:
      ValueError: a field is out of range.
    """

    frames: int = 9
    crop: tuple[int, ...] = ()
    absolute: float = 1.0
    square: float = 2.0
    rare: float = 0.0
    kl: float = 1e-5
    edges: float = 0.5
    train_encoder: bool = True

    components = ('vae',)

    def __post_init__(self):
        super().__post_init__()
        if self.frames < 9 or (self.frames - 1) % 8:
            raise ValueError(
                f'stage.frames: got {self.frames}, expected 1 + 8k with k of at least '
                '1 (whole encoder chunks)'
            )
        object.__setattr__(self, 'crop', tuple(self.crop))
        if self.crop and (len(self.crop) != 2 or min(self.crop) < 1):
            raise ValueError(f'stage.crop: got {self.crop}, expected none, or a height and a width')
        for name in ('absolute', 'square', 'edges', 'kl'):
            if not 0 <= getattr(self, name) < float('inf'):
                raise ValueError(f'stage.{name}: got {getattr(self, name)}, expected 0 or more')
        if not self.absolute + self.square:
            raise ValueError(
                'stage.square: got 0 with stage.absolute 0, expected one of them above 0'
            )
        if not 0 <= self.rare <= 1:
            raise ValueError(f'stage.rare: got {self.rare}, expected 0 <= rare <= 1')

    def check_world(self, world):
        super().check_world(world)
        grid, size = world.cfg.vae.spatial_compression, (world.cfg.height, world.cfg.width)
        if any(part % grid or part > whole for part, whole in zip(self.crop, size)):
            raise UsageError(
                f'stage.crop: got {self.crop}, expected multiples of {grid} within {size}'
            )

    def trainable(self, path):
        return self.train_encoder or path.startswith('vae/decoder/')

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data.loader import Loader

        return Loader(data, self.frames, batch, seed, mirror=0.5 if world.cfg.mirror else 0.0)

    def example(self, world, batch):
        size = world.cfg.height, world.cfg.width
        return example_batch(batch, frames=('uint8', self.frames, *size, 3))

    def loss(self, world, params, batch, key):
        cfg = world.cfg.vae
        net = vae.network(cfg)
        frames = batch['frames']
        if self.crop:
            key, crop_key = jax.random.split(key)
            frames = random_crops(frames, self.crop, cfg.spatial_compression, crop_key)
        frames = frames.astype(jnp.float32) / 127.5 - 1
        mean, logvar = net.encode(cfg, params['vae'], frames)
        noise = jax.random.normal(key, mean.shape)
        made = net.decode_streamed(cfg, params['vae'], mean + jnp.exp(0.5 * logvar) * noise)
        true = frames[:, -made.shape[1] :]
        error = made - true
        weight = color_weights(true, self.rare) if self.rare else 1.0
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        square = jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        loss = (
            self.absolute * (weight * jnp.abs(error)).mean()
            + self.square * (weight * jnp.square(error)).mean()
            + self.edges * edges
            + self.kl * kl
        )
        psnr = 10 * jnp.log10(4 / square)
        return loss, {'psnr': psnr, 'kl': kl, 'latent_std': jnp.std(mean)}

    def finish(self, world, params, loader):
        """Scales each latent channel to mean 0 and deviation 1, as the noise schedule expects."""
        if not self.train_encoder:
            return world, params
        cfg = world.cfg.vae
        net = vae.network(cfg)
        encode = compilation.jit(lambda p, x: net.encode(cfg, p, x)[0])
        means = []
        for _ in range(8):
            frames = next(loader)['frames'].astype(np.float32) / 127.5 - 1
            means.append(np.asarray(encode(params['vae'], frames)))
        means = np.concatenate(means)
        cfg, made = net.standardised(
            cfg, params['vae'], means.mean(axis=(0, 1, 2, 3)), means.std(axis=(0, 1, 2, 3))
        )
        return world.replace(vae=cfg), {**params, 'vae': made}


def random_crops(frames, size: tuple[int, int], grid: int, key):
    """A random part of each clip: frames [B F H W 3], size (h, w) -> [B F h w 3].

    Args:
      frames: the clips.
      size: height and width of the parts in pixels.
      grid: pixels of a latent pixel. Parts begin at whole latent pixels, so that what stands still
        in all frames, such as the car, always has the same position relative to latent pixels.
      key: random key.

    Raises:
      ValueError: the part is larger than the frames.
    """
    if size[0] > frames.shape[2] or size[1] > frames.shape[3]:
        raise ValueError(f'stage.crop: got {size}, expected at most the frames {frames.shape[2:4]}')
    spare = np.subtract(frames.shape[2:4], size)
    corners = grid * jax.random.randint(key, (frames.shape[0], 2), 0, spare // grid + 1)

    def crop(clip, corner):
        return jax.lax.dynamic_slice(
            clip, (0, corner[0], corner[1], 0), (clip.shape[0], *size, clip.shape[3])
        )

    return jax.vmap(crop)(frames, corners)


COLOR_LEVELS = 4  # of each colour channel, when colours are counted
MAX_WEIGHT = 10.0  # of a pixel


def color_weights(frames, power: float):
    """Weights of pixels, larger for rare colours: [B F H W 3] in [-1, 1] -> [B F H W 1]."""
    levels = jnp.clip((frames + 1) * (COLOR_LEVELS / 2), 0, COLOR_LEVELS - 1).astype(jnp.int32)
    colors = levels @ np.array([COLOR_LEVELS**2, COLOR_LEVELS, 1], np.int32)
    shares = jnp.bincount(colors.ravel(), length=COLOR_LEVELS**3) / colors.size
    weights = jnp.maximum(shares, 1e-6) ** -power
    weights = jnp.minimum(weights / (weights * shares).sum(), MAX_WEIGHT)
    return weights[colors][..., None]
