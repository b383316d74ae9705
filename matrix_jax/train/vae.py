"""Stage 0: the video autoencoder of a bundled world, trained from scratch.

Clips go through encoder and *streaming* decoder exactly as they will be used: causal 8-frame chunks
in, one latent frame per chunk out, so that the chunk statistics of the norms are the trained ones.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import convert
from matrix_jax.train.stage import Stage
from matrix_jax.vae import cogvideox

# Kernels that read latents: of the first convolution and of the modulated norms.
LATENT_INPUT = re.compile(r'^decoder/conv_in/kernel$|/conv_[yb]/kernel$')


@dataclasses.dataclass(frozen=True)
class Autoencode(Stage):
    """Reconstruction + gradient-domain term + weak KL.

    Attributes:
      frames: clip length F = 1 + 4k.
      kl: weight of the KL divergence to N(0, 1), per latent element.
      edges: weight of the L1 difference of spatial gradients.
      train_encoder: whether the encoder trains too. If not, latents stay the ones that a stream
        has learned.
    """
    frames: int = 9
    kl: float = 1e-5
    edges: float = 0.5
    train_encoder: bool = True

    components = ('vae',)

    def __post_init__(self):
        super().__post_init__()
        if self.frames < 9 or (self.frames - 1) % 8:
            raise ValueError(f'stage.frames: got {self.frames}, expected 1 + 8k with k of at least '
                             '1 (whole encoder chunks)')

    def trainable(self, path):
        return self.train_encoder or path.startswith('vae/decoder/')

    def loader(self, world, params, data, batch, seed, cache):
        from matrix_jax.data.loader import Loader
        return Loader(data, self.frames, batch, seed, mirror=0.5 if world.cfg.mirror else 0.0)

    def example(self, world, batch):
        shape = batch, self.frames, world.cfg.height, world.cfg.width, 3
        return {'frames': jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def loss(self, world, params, batch, key):
        cfg = world.cfg.vae
        frames = batch['frames'].astype(jnp.float32) / 127.5 - 1
        mean, logvar = cogvideox.encode(cfg, params['vae'], frames)
        latents = cogvideox.sample(mean, logvar, jax.random.normal(key, mean.shape))
        made = decode_streamed(cfg, params['vae'], latents[:, 1:])
        error = made - frames[:, 1:]
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        square = jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        loss = jnp.abs(error).mean() + 2 * square + self.edges * edges + self.kl * kl
        psnr = 10 * jnp.log10(4 / square)
        return loss, {'psnr': psnr, 'kl': kl, 'latent_std': jnp.std(mean)}

    def finish(self, world, params, loader):
        """Gives each latent channel mean 0 and deviation 1, as the noise schedule expects."""
        cfg = world.cfg.vae
        if not self.train_encoder:
            return world, params
        encode = jax.jit(lambda p, x: cogvideox.encode(cfg, p, x)[0])
        means = []
        for _ in range(8):
            frames = next(loader)['frames'].astype(np.float32) / 127.5 - 1
            means.append(np.asarray(encode(params['vae'], frames)))
        means = np.concatenate(means)
        mean, std = means.mean(axis=(0, 1, 2, 3)), means.std(axis=(0, 1, 2, 3))
        vae = dataclasses.replace(cfg, scaling_factor=1.0, latent_means=[
            round(float(one), 4) for one in mean / std])
        return world.replace(vae=vae), {**params, 'vae': rescaled(params['vae'], std)}


def rescaled(params, std):
    """The same autoencoder with latents divided by `std` [C]: the factor goes into the weights."""
    flat, channels = convert.flatten(params), len(std)
    for path, leaf in flat.items():
        if path == 'encoder/conv_out/kernel':
            flat[path] = leaf / np.append(std, np.ones(channels, std.dtype))
        elif path == 'encoder/conv_out/bias':
            flat[path] = np.append(leaf[:channels] / std, leaf[channels:] - 2 * np.log(std))
        elif path.startswith('decoder/') and LATENT_INPUT.search(path):
            flat[path] = leaf * std[:, None]
    return convert.unflatten(flat)


def decode_streamed(cfg, params, latents):
    """Latents [B T H W C] -> frames [B 4T H W 3], one latent frame per chunk, cache from empty."""
    cache, frames = cogvideox.prefill(cfg, params, latents[:, :1])
    parts = [frames]
    for index in range(1, latents.shape[1]):      # not a scan: convolutions are slow in a CPU loop
        cache, frames = cogvideox.step(cfg, params, cache, latents[:, index:index + 1])
        parts.append(frames)
    return jnp.concatenate(parts, axis=1)
