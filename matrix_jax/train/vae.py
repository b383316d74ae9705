"""Stage 0: trains the video autoencoder of a bundled world from scratch.

Clips pass the encoder and the *streaming* decoder as in use, because norms that see one chunk at a
time have other statistics than norms over a whole clip.

    loss = |e| + 2 e^2 + edges |grad e| + kl KL(N(mean, var) || N(0, 1)),   e = decoded - clip
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import vae
from matrix_jax.parallel import compilation
from matrix_jax.train.stage import Stage, example_batch


@dataclasses.dataclass(frozen=True)
class Autoencode(Stage):
    """Reconstruction, spatial gradients and a weak KL divergence.

    Attributes:
      frames: clip length F = 1 + 8k.
      kl: weight of the KL divergence to N(0, 1), per latent element.
      edges: weight of the L1 error of spatial gradients.
      train_encoder: whether the encoder trains too; if not, latents keep their meaning for a
        trained stream.
    """

    frames: int = 9
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
        frames = batch['frames'].astype(jnp.float32) / 127.5 - 1
        mean, logvar = net.encode(cfg, params['vae'], frames)
        noise = jax.random.normal(key, mean.shape)
        made = net.decode_streamed(cfg, params['vae'], mean + jnp.exp(0.5 * logvar) * noise)
        error = made - frames[:, -made.shape[1] :]
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        square = jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        loss = jnp.abs(error).mean() + 2 * square + self.edges * edges + self.kl * kl
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
