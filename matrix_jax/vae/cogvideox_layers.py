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
from matrix_jax.parallel import compilation, spatial
from matrix_jax.vae.cogvideox_config import Config
from matrix_jax.vae.resampling import fold, fold_mean, unfold, unfold_repeat
from matrix_jax.weights.conversion import Row


class Encoder(nn.Module):
    """One chunk of frames -> moments of its latent frames."""

    cfg: Config

    @nn.compact
    def __call__(self, x, cache=None):
        """[B F H W in], cache or None -> cache, [B T h w 2C]."""
        cfg, old, new = self.cfg, cache or {}, {}
        x, new['conv_in'] = conv(cfg, cfg.block_out_channels[0], 'conv_in', cfg.taps(0))(
            x, old.get('conv_in')
        )
        for level, width in enumerate(cfg.block_out_channels):
            name, level_input = f'down_{level}', x
            x, new[name] = Level(cfg, width, cfg.layers_per_block, cfg.taps(level), name=name)(
                x, None, old.get(name)
            )
            if level < len(cfg.block_out_channels) - 1:
                x = downsample(cfg, level, x, level_input)
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
            name, level_input, taps = f'up_{level}', x, cfg.taps(len(widths) - 1 - level)
            x, new[name] = Level(cfg, width, cfg.layers_per_block + 1, taps, name=name)(
                x, z, old.get(name)
            )
            if level < len(widths) - 1:
                x = upsample(cfg, level, x, level_input)
        x = nn.silu(norm(cfg, 'norm_out', x, z))
        width = cfg.out_channels * cfg.patch_size**2
        x, new['conv_out'] = conv(cfg, width, 'conv_out', cfg.taps(0))(x, old.get('conv_out'))
        return new, x


class Level(nn.Module):
    """Residual blocks of one frame size."""

    cfg: Config
    features: int
    layers: int
    taps: int = 3

    @nn.compact
    def __call__(self, x, z=None, cache=None):
        """[B T H W in], latents [B T h w C] in the decoder, cache -> [B T H W out], cache."""
        new = {}
        for layer in range(self.layers):
            name = f'resnet_{layer}'
            x, new[name] = Resnet(self.cfg, self.features, self.taps, name=name)(
                x, z, None if cache is None else cache[name]
            )
        return x, new


class Resnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with spatial norms in the decoder."""

    cfg: Config
    features: int
    taps: int = 3

    @nn.compact
    def __call__(self, x, z=None, cache=None):
        """[B T H W in], latents [B T h w C] or None, cache -> [B T H W out], cache."""
        cfg, old, new = self.cfg, cache or {}, {}
        h = nn.silu(norm(cfg, 'norm1', x, z))
        h, new['conv1'] = conv(cfg, self.features, 'conv1', self.taps)(h, old.get('conv1'))
        h = nn.silu(norm(cfg, 'norm2', h, z))
        h, new['conv2'] = conv(cfg, self.features, 'conv2', self.taps)(h, old.get('conv2'))
        if x.shape[-1] != self.features:
            x, _ = pointwise(cfg, self.features, 'shortcut')(x)
        return x + h, new


def downsample(cfg: Config, level: int, x, level_input):
    """The resampling after an encoder level.

    Args:
      cfg: sizes and options.
      level: number of the level, from full frames.
      x: output of the level [B T H W C].
      level_input: its input [B T H W in], for the shortcut.

    Returns:
      [B T' H' W' C].
    """
    name, width = f'downsample_{level}', x.shape[-1]
    time, space = 1 + cfg.halves_time(level), 1 + cfg.halves_space(level)
    if cfg.resampling == 'fold':
        return pointwise(cfg, width, name)(fold(even_frames(x, time), time, space))[0]
    x = halve_time(x) if time == 2 else x
    x = Downsample2d(width, dtype=cfg.dtype, name=name)(x) if space == 2 else x
    if cfg.resampling == 'shortcut':
        x = x + fold_mean(even_frames(level_input, time), width, time, space)
    return x


def upsample(cfg: Config, level: int, x, level_input):
    """The resampling after a decoder level.

    Args:
      cfg: sizes and options.
      level: number of the level, from the smallest frames.
      x: output of the level [B T H W C].
      level_input: its input [B T H W in], for the shortcut.

    Returns:
      [B T' H' W' C].
    """
    name, width = f'upsample_{level}', x.shape[-1]
    time, space = 1 + cfg.halves_time(level), 1 + cfg.doubles_space(level)
    frames = doubled_frames(cfg, x.shape[1]) if time == 2 else x.shape[1]
    if cfg.resampling == 'fold':
        x, _ = pointwise(cfg, width * time * space**2, name)(x)
        return unfold(x, time, space)[:, -frames:]
    # The convolution is per frame, so doubling time after it is equal and cheaper.
    x = Upsample2d(width, dtype=cfg.dtype, name=name)(x) if space == 2 else x
    x = double_time(cfg, x) if time == 2 else x
    if cfg.resampling == 'shortcut':
        x = x + unfold_repeat(level_input, width, time, space)[:, -frames:]
    return x


class GroupNorm(nn.Module):
    """Group norm over time, height and width; statistics in float32.

    They cover the chunk, or each frame if `norm_frames = 'one'`.
    """

    cfg: Config

    @nn.compact
    def __call__(self, x):
        """[B T H W C] -> the same."""
        width = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones_init(), (width,))
        bias = self.param('bias', nn.initializers.zeros_init(), (width,))
        wide = x.astype(jnp.float32)
        if self.cfg.norm_frames == 'one':
            wide = rearrange(wide, 'b t h w c -> (b t) 1 h w c')

        # The caches of a CPU make a second reading cheap; elsewhere it is memory traffic.
        statistics = two_readings if compilation.backend() == 'cpu' else one_reading
        mean, variance = spatial.pooled_statistics(*statistics(wide, self.cfg.norm_groups))
        wide = (wide - mean) * (lax.rsqrt(variance + self.cfg.norm_eps) * scale) + bias
        return wide.reshape(x.shape).astype(x.dtype)


def two_readings(x, groups: int):
    """Mean and variance [B 1 1 1 C] of groups of channels, over a device's rows x [B T H W C]."""
    mean = group_mean(spatial.local_mean(x), groups)
    return mean, group_mean(spatial.local_mean(jnp.square(x - mean)), groups)


def one_reading(x, groups: int):
    """Like `two_readings`, with sums of values and of squares in one pass over x."""
    # Differences from a sample of the channel keep the digits that squares of values would lose.
    sample = lax.stop_gradient(x[:, :1, :1, :1])
    shift, square = (spatial.local_mean(y) for y in (x - sample, jnp.square(x - sample)))
    means, variances = sample[:, 0, 0, 0] + shift, jnp.maximum(square - jnp.square(shift), 0)
    mean = group_mean(means, groups)
    return mean, group_mean(variances + jnp.square(means - mean[:, 0, 0, 0]), groups)


def group_mean(means, groups: int):
    """Means of channels [B C] -> means of their groups [B 1 1 1 C]."""
    means = rearrange(means, 'b (g c) -> b g c', g=groups)
    means = repeat(means.mean(2), 'b g -> b (g c)', c=means.shape[2])
    return rearrange(means, 'b c -> b 1 1 1 c')


class SpatialNorm(nn.Module):
    """Group norm with a scale and a shift computed from the latents."""

    cfg: Config

    @nn.compact
    def __call__(self, x, z):
        """[B T H W D], latents [B t h w C] -> [B T H W D]."""
        # A 1x1x1 convolution commutes with nearest neighbours, so it runs on the small frames.
        y, _ = pointwise(self.cfg, x.shape[-1], 'conv_y')(z)
        b, _ = pointwise(self.cfg, x.shape[-1], 'conv_b')(z)
        return GroupNorm(self.cfg, name='norm')(x) * nearest(y, x.shape) + nearest(b, x.shape)


def norm(cfg: Config, name: str, x, z):
    """Normalises x [B T H W C], with latents z [B t h w C] if the norm reads them, else None."""
    if z is None or not cfg.modulated:
        return GroupNorm(cfg, name=name)(x)
    return SpatialNorm(cfg, name=name)(x, z)


def conv(cfg: Config, features: int, name: str, taps: int = 3) -> CausalConv3d:
    """A causal convolution of this network, 3x3 in space and over `taps` frames."""
    return CausalConv3d(features, (taps, 3, 3), dtype=cfg.dtype, name=name)


def pointwise(cfg: Config, features: int, name: str) -> CausalConv3d:
    """A 1x1x1 convolution of this network."""
    return CausalConv3d(features, (1, 1, 1), dtype=cfg.dtype, name=name)


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


def even_frames(x, time: int):
    """Repeats the first of an odd number of frames [B T ...], if time is halved (`time` = 2)."""
    return jnp.concatenate([x[:, :1], x], axis=1) if x.shape[1] % time else x


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


def doubled_frames(cfg: Config, frames: int) -> int:
    """Number of frames that `double_time` returns for `frames`."""
    if frames == 1:
        return 1 if cfg.single_latent_frames == 1 else 2
    return 2 * frames - frames % 2


def weights(cfg: Config) -> tuple[Row, ...]:
    """Weight table: `AutoencoderKLCogVideoX` <-> parameter tree."""

    def conv_rows(torch, path, kernel='o i t h w -> t h w i o'):
        return [
            Row(f'{torch}.weight', f'{path}/kernel', kernel),
            Row(f'{torch}.bias', f'{path}/bias', 'o -> o'),
        ]

    def norm_rows(torch, path):
        if torch.startswith('encoder') or not cfg.modulated:
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
            names = f'{torch}.{sampler}rs.0.conv', f'{net}/{sampler}_{level}'
            if level == len(levels) - 1:
                continue
            if cfg.resampling == 'fold':
                made += conv_rows(*names)
            elif (cfg.halves_space if net == 'encoder' else cfg.doubles_space)(level):
                made += conv_rows(*names, 'o i h w -> h w i o')
        made += norm_rows(f'{net}.norm_out', f'{net}/norm_out')
        made += conv_rows(f'{net}.conv_out.conv', f'{net}/conv_out')
    return tuple(made)
