"""Networks of the CogVideoX autoencoder, which code one chunk of a clip and carry a cache.

The cache has the tree structure of the modules, with the last two inputs of each convolution. It is
None at the start of a clip.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from matrix_jax.nn.conv3d import CausalConv3d, Downsample2d, Upsample2d
from matrix_jax.parallel import spatial
from matrix_jax.vae.cogvideox_config import Config
from matrix_jax.weights.conversion import Row


class Encoder(nn.Module):
    """One chunk of frames -> moments of its latent frames."""

    cfg: Config

    @nn.compact
    def __call__(self, x, cache=None):
        """[B F H W in], cache or None -> cache, [B T h w 2C]."""
        cfg, old, new = self.cfg, cache or {}, {}
        x, new['conv_in'] = conv(cfg, cfg.block_out_channels[0], 'conv_in')(x, old.get('conv_in'))
        for level, width in enumerate(cfg.block_out_channels):
            name = f'down_{level}'
            x, new[name] = Level(cfg, width, cfg.layers_per_block, name=name)(
                x, None, old.get(name)
            )
            if level < len(cfg.block_out_channels) - 1:
                x = halve_time(x) if cfg.halves_time(level) else x
                x = Downsample2d(width, dtype=cfg.dtype, name=f'downsample_{level}')(x)
        x, new['mid'] = Level(cfg, x.shape[-1], 2, name='mid')(x, None, old.get('mid'))
        x = nn.silu(GroupNorm(cfg, name='norm_out')(x))
        x, new['conv_out'] = conv(cfg, 2 * cfg.latent_channels, 'conv_out')(x, old.get('conv_out'))
        return new, x


class Decoder(nn.Module):
    """One chunk of latent frames -> its frames."""

    cfg: Config

    @nn.compact
    def __call__(self, z, cache=None):
        """[B T h w C], cache or None -> cache, [B F H W out]."""
        cfg, old, new = self.cfg, cache or {}, {}
        widths = cfg.block_out_channels[::-1]
        x, new['conv_in'] = conv(cfg, widths[0], 'conv_in')(z, old.get('conv_in'))
        x, new['mid'] = Level(cfg, widths[0], 2, name='mid')(x, z, old.get('mid'))
        for level, width in enumerate(widths):
            name = f'up_{level}'
            x, new[name] = Level(cfg, width, cfg.layers_per_block + 1, name=name)(
                x, z, old.get(name)
            )
            if level < len(widths) - 1:
                # The convolution is per frame, so doubling time after it is equal and cheaper.
                x = Upsample2d(width, dtype=cfg.dtype, name=f'upsample_{level}')(x)
                x = double_time(cfg, x) if cfg.halves_time(level) else x
        x = nn.silu(SpatialNorm(cfg, name='norm_out')(x, z))
        width = cfg.out_channels * cfg.patch_size**2
        x, new['conv_out'] = conv(cfg, width, 'conv_out')(x, old.get('conv_out'))
        return new, x


class Level(nn.Module):
    """Residual blocks of one frame size."""

    cfg: Config
    features: int
    layers: int

    @nn.compact
    def __call__(self, x, z=None, cache=None):
        """[B T H W in], latents [B T h w C] in the decoder, cache -> [B T H W out], cache."""
        new = {}
        for layer in range(self.layers):
            name = f'resnet_{layer}'
            x, new[name] = Resnet(self.cfg, self.features, name=name)(
                x, z, None if cache is None else cache[name]
            )
        return x, new


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with spatial norms in the decoder."""

    cfg: Config
    features: int

    @nn.compact
    def __call__(self, x, z=None, cache=None):
        """[B T H W in], latents [B T h w C] or None, cache -> [B T H W out], cache."""
        cfg, old, new = self.cfg, cache or {}, {}

        def norm(h, name):
            return GroupNorm(cfg, name=name)(h) if z is None else SpatialNorm(cfg, name=name)(h, z)

        h = nn.silu(norm(x, 'norm1'))
        h, new['conv1'] = conv(cfg, self.features, 'conv1')(h, old.get('conv1'))
        h = nn.silu(norm(h, 'norm2'))
        h, new['conv2'] = conv(cfg, self.features, 'conv2')(h, old.get('conv2'))
        if x.shape[-1] != self.features:
            x, _ = conv(cfg, self.features, 'shortcut', kernel=(1, 1, 1))(x)
        return x + h, new


class GroupNorm(nn.Module):
    """Group norm over time, height and width of the chunk; statistics in float32."""

    cfg: Config

    @nn.compact
    def __call__(self, x):
        """[B T H W C] -> the same."""
        width = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones_init(), (width,))
        bias = self.param('bias', nn.initializers.zeros_init(), (width,))
        wide = x.astype(jnp.float32)

        def group_mean(y):
            # Means of channels first, then of groups, so the reduction runs along rows.
            means = rearrange(spatial.local_mean(y), 'b (g c) -> b g c', g=self.cfg.norm_groups)
            means = repeat(means.mean(2), 'b g -> b (g c)', c=means.shape[2])
            return rearrange(means, 'b c -> b 1 1 1 c')

        mean = group_mean(wide)
        mean, variance = spatial.pooled_statistics(mean, group_mean(jnp.square(wide - mean)))
        wide = (wide - mean) * (lax.rsqrt(variance + self.cfg.norm_eps) * scale) + bias
        return wide.astype(x.dtype)


class SpatialNorm(nn.Module):
    """Group norm with a scale and a shift computed from the latents."""

    cfg: Config

    @nn.compact
    def __call__(self, x, z):
        """[B T H W D], latents [B t h w C] -> [B T H W D]."""
        # A 1x1x1 convolution commutes with nearest neighbours, so it runs on the small frames.
        y, _ = conv(self.cfg, x.shape[-1], 'conv_y', kernel=(1, 1, 1))(z)
        b, _ = conv(self.cfg, x.shape[-1], 'conv_b', kernel=(1, 1, 1))(z)
        return GroupNorm(self.cfg, name='norm')(x) * nearest(y, x.shape) + nearest(b, x.shape)


def conv(cfg: Config, features: int, name: str, **fields) -> CausalConv3d:
    """A causal convolution of this network, 3x3x3 by default."""
    return CausalConv3d(features, dtype=cfg.dtype, name=name, **fields)


def nearest(z, shape):
    """Nearest neighbours: z [B t h w C] at the time, height and width of `shape` [B T H W D].

    T, H, W are multiples of t, h, w; for odd T > 1 the first frame of z gives one frame.
    """
    if shape[1] % 2 and shape[1] > 1:
        rest = (shape[0], shape[1] - 1, *shape[2:])
        return jnp.concatenate(
            [nearest(z[:, :1], (shape[0], 1, *shape[2:])), nearest(z[:, 1:], rest)], axis=1
        )
    for axis in (1, 2, 3):  # one by one: the gradient of a joint repetition takes twice the time
        z = jnp.repeat(z, shape[axis] // z.shape[axis], axis=axis)
    return z


def halve_time(x):
    """Averages pairs of frames [B T ...]; the first of an odd number is kept."""
    odd = x.shape[1] % 2
    pairs = x[:, odd:]
    return jnp.concatenate([x[:, :odd], (pairs[:, ::2] + pairs[:, 1::2]) / 2], axis=1)


def double_time(cfg: Config, x):
    """Repeats frames [B T ...]; the first of an odd number is kept."""
    # PARITY: a single latent frame is one frame in stages 1 and 2, four in stages 3 and 4.
    if x.shape[1] == 1:
        return x if cfg.single_latent_frames == 1 else jnp.repeat(x, 2, axis=1)
    odd = x.shape[1] % 2
    return jnp.concatenate([x[:, :odd], jnp.repeat(x[:, odd:], 2, axis=1)], axis=1)


def weights(cfg: Config) -> tuple[Row, ...]:
    """Weight table: `AutoencoderKLCogVideoX` <-> parameter tree."""

    def conv_rows(torch, path, kernel='o i t h w -> t h w i o'):
        return [
            Row(f'{torch}.weight', f'{path}/kernel', kernel),
            Row(f'{torch}.bias', f'{path}/bias', 'o -> o'),
        ]

    def norm_rows(torch, path):
        if torch.startswith('encoder'):
            return [
                Row(f'{torch}.weight', f'{path}/scale', 'o -> o'),
                Row(f'{torch}.bias', f'{path}/bias', 'o -> o'),
            ]
        return [
            Row(f'{torch}.norm_layer.weight', f'{path}/norm/scale', 'o -> o'),
            Row(f'{torch}.norm_layer.bias', f'{path}/norm/bias', 'o -> o'),
            *conv_rows(f'{torch}.conv_y.conv', f'{path}/conv_y'),
            *conv_rows(f'{torch}.conv_b.conv', f'{path}/conv_b'),
        ]

    def level_rows(torch, path, layers, changes):
        rows = []
        for layer in range(layers):
            ours, theirs = f'{path}/resnet_{layer}', f'{torch}.resnets.{layer}'
            for part in '12':
                rows += norm_rows(f'{theirs}.norm{part}', f'{ours}/norm{part}')
                rows += conv_rows(f'{theirs}.conv{part}.conv', f'{ours}/conv{part}')
            if changes and not layer:
                rows += conv_rows(f'{theirs}.conv_shortcut', f'{ours}/shortcut')
        return rows

    made, widths = [], cfg.block_out_channels
    for net, block, sampler, levels, layers in (
        ('encoder', 'down', 'downsample', widths, cfg.layers_per_block),
        ('decoder', 'up', 'upsample', widths[::-1], cfg.layers_per_block + 1),
    ):
        made += conv_rows(f'{net}.conv_in.conv', f'{net}/conv_in')
        made += level_rows(f'{net}.mid_block', f'{net}/mid', 2, False)
        for level, width in enumerate(levels):
            torch = f'{net}.{block}_blocks.{level}'
            made += level_rows(
                torch, f'{net}/{block}_{level}', layers, width != levels[max(level - 1, 0)]
            )
            if level < len(levels) - 1:
                made += conv_rows(
                    f'{torch}.{sampler}rs.0.conv', f'{net}/{sampler}_{level}', 'o i h w -> h w i o'
                )
        made += norm_rows(f'{net}.norm_out', f'{net}/norm_out')
        made += conv_rows(f'{net}.conv_out.conv', f'{net}/conv_out')
    return tuple(made)
