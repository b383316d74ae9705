"""Networks of the Wan autoencoders, which code one chunk of a clip and carry a cache.

The cache has the tree structure of the modules, with the last inputs of each layer that reads past
frames. It is None for the first frame, which is a chunk of its own; later chunks may have any
length.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from matrix_jax.nn.attention import attention
from matrix_jax.nn.conv3d import CausalConv3d, Downsample2d, Upsample2d, fan_in
from matrix_jax.nn.linear import Linear
from matrix_jax.parallel import spatial
from matrix_jax.vae import wan_names
from matrix_jax.vae.resampling import fold_mean, unfold_repeat
from matrix_jax.vae.wan_config import Config
from matrix_jax.weights.conversion import Drop, Rename, Row


class Encoder(nn.Module):
    """A chunk of frames -> moments of its latent frames."""

    cfg: Config

    @nn.compact
    def __call__(self, x, cache=None):
        """The first frame [B 1 H W in] or later ones [B 4T H W in] -> (cache, [B T h w 2C])."""
        cfg, old, new = self.cfg, cache or {}, {}
        x, new['conv_in'] = conv(cfg, cfg.encoder_widths[0], 'conv_in')(x, old.get('conv_in'))
        for level in range(cfg.levels):
            name = f'down_{level}'
            x, new[name] = Down(cfg, level, name=name)(x, old.get(name))
        x, new['mid'] = Middle(cfg, name='mid')(x, old.get('mid'))
        x = nn.silu(RMSNorm(cfg.norm_eps, name='norm_out')(x))
        x, new['conv_out'] = conv(cfg, 2 * cfg.latent_channels, 'conv_out')(x, old.get('conv_out'))
        return new, Linear(2 * cfg.latent_channels, dtype=cfg.dtype, name='moments')(x)


class Decoder(nn.Module):
    """A chunk of latent frames -> its frames."""

    cfg: Config

    @nn.compact
    def __call__(self, z, cache=None):
        """Decodes the first latent frame, or later ones.

        [B 1 h w C] -> (cache, [B 1 H W out]), or [B T h w C] -> (cache, [B 4T H W out]).
        """
        cfg, old, new = self.cfg, cache or {}, {}
        x = Linear(cfg.latent_channels, dtype=cfg.dtype, name='latents')(z)
        x, new['conv_in'] = conv(cfg, cfg.decoder_widths[0], 'conv_in')(x, old.get('conv_in'))
        x, new['mid'] = Middle(cfg, name='mid')(x, old.get('mid'))
        for level in range(cfg.levels):
            name = f'up_{level}'
            x, new[name] = Up(cfg, level, name=name)(x, old.get(name))
        x = nn.silu(RMSNorm(cfg.norm_eps, name='norm_out')(x))
        width = cfg.channels * cfg.patch_size**2
        x, new['conv_out'] = conv(cfg, width, 'conv_out')(x, old.get('conv_out'))
        return new, x


class Down(nn.Module):
    """One frame size of the encoder; all but the last halve the frame."""

    cfg: Config
    level: int

    @nn.compact
    def __call__(self, x, cache=None):
        """[B T H W in], cache -> [B T' H' W' out], cache."""
        cfg, old, new, entry = self.cfg, cache or {}, {}, x
        for layer in range(cfg.layers):
            name = f'resnet_{layer}'
            x, new[name] = Resnet(cfg, cfg.encoder_widths[self.level], name=name)(x, old.get(name))
        space, time = 1, 1
        if self.level < cfg.levels - 1:
            x = Downsample2d(x.shape[-1], dtype=cfg.dtype, name='resample')(x)
            space = 2
            if cfg.halves_time[self.level]:
                x, new['time'] = HalveTime(dtype=cfg.dtype, name='time')(x, old.get('time'))
                time = 2
        if cfg.residual:  # a single frame counts as the second of two
            pad = (-entry.shape[1] % time, 0)
            entry = jnp.pad(entry, ((0, 0), pad, (0, 0), (0, 0), (0, 0)))
            x = x + fold_mean(entry, x.shape[-1], time, space)
        return x, new


class Up(nn.Module):
    """One frame size of the decoder; all but the last double the frame."""

    cfg: Config
    level: int

    @nn.compact
    def __call__(self, x, cache=None):
        """[B T H W in], cache -> [B T' H' W' out], cache."""
        cfg, old, new, entry = self.cfg, cache or {}, {}, x
        for layer in range(cfg.layers + 1):
            name = f'resnet_{layer}'
            x, new[name] = Resnet(cfg, cfg.decoder_widths[self.level], name=name)(x, old.get(name))
        if self.level == cfg.levels - 1:
            return x, new
        time = 2 if cfg.doubles_time[self.level] else 1
        if time == 2:
            x, new['time'] = DoubleTime(cfg.time_sees_first, cfg.dtype, name='time')(
                x, old.get('time')
            )
        width = x.shape[-1] if cfg.residual else x.shape[-1] // 2
        x = Upsample2d(width, dtype=cfg.dtype, name='resample')(x)
        if cfg.residual:  # the first frame has no first copies
            x = x + unfold_repeat(entry, width, time, 2)[:, -x.shape[1] :]
        return x, new


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest frame size."""

    cfg: Config

    @nn.compact
    def __call__(self, x, cache=None):
        """[B T H W C], cache -> the same."""
        cfg, old, new = self.cfg, cache or {}, {}
        x, new['resnet_0'] = Resnet(cfg, x.shape[-1], name='resnet_0')(x, old.get('resnet_0'))
        x = Attention(cfg, name='attention')(x)
        x, new['resnet_1'] = Resnet(cfg, x.shape[-1], name='resnet_1')(x, old.get('resnet_1'))
        return x, new


class Resnet(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    cfg: Config
    features: int

    @nn.compact
    def __call__(self, x, cache=None):
        """[B T H W in], cache -> [B T H W out], cache."""
        cfg, old, new = self.cfg, cache or {}, {}
        h = x
        for part in ('1', '2'):
            h = nn.silu(RMSNorm(cfg.norm_eps, name=f'norm{part}')(h))
            h, new[f'conv{part}'] = conv(cfg, self.features, f'conv{part}')(
                h, old.get(f'conv{part}')
            )
        if x.shape[-1] != self.features:
            x = Linear(self.features, dtype=cfg.dtype, name='shortcut')(x)
        return x + h, new


class Attention(nn.Module):
    """x + attention(norm(x)) within each frame, one head."""

    cfg: Config

    @nn.compact
    def __call__(self, x):
        """[B T H W C] -> the same."""
        cfg, width = self.cfg, x.shape[-1]
        h = Linear(3 * width, dtype=cfg.dtype, name='qkv')(RMSNorm(cfg.norm_eps, name='norm')(x))
        q, seen = h[..., :width], spatial.all_rows(h[..., width:])
        q, k, v = (
            rearrange(part, 'b t h w c -> (b t) (h w) 1 c')
            for part in (q, seen[..., :width], seen[..., width:])
        )
        h = rearrange(
            attention(q, k, v), '(b t) (h w) 1 c -> b t h w c', t=x.shape[1], h=x.shape[2]
        )
        return x + Linear(width, dtype=cfg.dtype, name='proj')(h)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the channels, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        """[... C] -> the same."""
        scale = self.param('scale', nn.initializers.ones_init(), x.shape[-1:])
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


class HalveTime(nn.Module):
    """Halves time by a convolution of stride 2; passes the first frame of a clip through."""

    dtype: Any

    @nn.compact
    def __call__(self, x, past=None):
        """Frames [B 2T H W C] and the one before them [B 1 H W C], or the first frame and None.

        Returns:
          [B T H W C] and the last frame [B 1 H W C].
        """
        width = x.shape[-1]
        run = taps(self, width, width, self.dtype)
        y = x if past is None else run(jnp.concatenate([past, x], axis=1), 2)
        return y, x[:, -1:]


class DoubleTime(nn.Module):
    """Doubles time by a convolution; the first frame of a clip remains one frame."""

    sees_first: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, past=None):
        """Frames [B T H W C] and the two before them [B 2 H W C], or the first frame and None.

        Returns:
          [B 2T H W C] ([B 1 H W C] for the first frame) and the last two frames.
        """
        width = x.shape[-1]
        run = taps(self, width, 2 * width, self.dtype)
        start = past is None
        if start:
            past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        if start and not self.sees_first:
            # PARITY: later frames see zeros in place of the first frame.
            return x, past
        x = jnp.concatenate([past, x], axis=1)
        y = rearrange(run(x, 1), 'b t h w (p c) -> b (t p) h w c', p=2)
        return y[:, 1:] if start else y, x[:, -2:]


def taps(layer, width: int, features: int, dtype):
    """A convolution over three frames with parameters of `layer`: `(x, stride) -> y`."""
    kernel = layer.param('kernel', fan_in, (3, width, features)).astype(dtype)
    bias = layer.param('bias', nn.initializers.zeros_init(), (features,)).astype(dtype)

    def run(x, stride):
        """[B T' H W in], unpadded -> [B T H W out]."""
        stop = x.shape[1] - 2
        x = jnp.concatenate([x[:, tap : stop + tap : stride] for tap in range(3)], axis=-1)
        return x @ rearrange(kernel, 't i o -> (t i) o') + bias

    return run


def conv(cfg: Config, features: int, name: str):
    """A 3x3x3 causal convolution of this network: `(x, context or None) -> (y, context)`."""
    layer = CausalConv3d(features, dtype=cfg.dtype, name=name)

    def run(x, context):
        if context is None:  # zeros before the first frame
            context = jnp.zeros((x.shape[0], 2, *x.shape[2:]), cfg.dtype)
        return layer(x, context)

    return run


def weights(cfg: Config) -> tuple[Row | Drop | Rename, ...]:
    """Weight table: published `.pth` of either version <-> parameter tree.

    Also reads the names of diffusers, which the light decoders of 2.2 have as well.
    """

    def both(torch, path, kernel):
        return [
            Row(f'{torch}.weight', f'{path}/kernel', kernel),
            Row(f'{torch}.bias', f'{path}/bias', 'o -> o'),
        ]

    def conv(torch, path):
        return both(torch, path, 'o i t h w -> t h w i o')

    def norm(torch, path, axes='c 1 1 1'):
        return [Row(f'{torch}.gamma', f'{path}/scale', f'{axes} -> c')]

    def resnet(torch, path, changes=False):
        return [
            *norm(f'{torch}.residual.0', f'{path}/norm1'),
            *conv(f'{torch}.residual.2', f'{path}/conv1'),
            *norm(f'{torch}.residual.3', f'{path}/norm2'),
            *conv(f'{torch}.residual.6', f'{path}/conv2'),
            *(both(f'{torch}.shortcut', f'{path}/shortcut', 'o i 1 1 1 -> i o') if changes else ()),
        ]

    def network(net, ours, theirs, layers, widths, times, entering):
        made = [
            *conv(f'{net}.conv1', f'{net}/conv_in'),
            *resnet(f'{net}.middle.0', f'{net}/mid/resnet_0'),
            *norm(f'{net}.middle.1.norm', f'{net}/mid/attention/norm', 'c 1 1'),
            *both(f'{net}.middle.1.to_qkv', f'{net}/mid/attention/qkv', 'o i 1 1 -> i o'),
            *both(f'{net}.middle.1.proj', f'{net}/mid/attention/proj', 'o i 1 1 -> i o'),
            *resnet(f'{net}.middle.2', f'{net}/mid/resnet_1'),
            *norm(f'{net}.head.0', f'{net}/norm_out'),
            *conv(f'{net}.head.2', f'{net}/conv_out'),
        ]
        for level, width in enumerate(widths):
            path = f'{net}/{ours}_{level}'
            names = [
                f'{net}.{theirs}.{level}.{theirs}.{part}'
                if cfg.residual
                else f'{net}.{theirs}.{level * (layers + 1) + part}'
                for part in range(layers + 1)
            ]
            for layer in range(layers):
                made += resnet(
                    names[layer], f'{path}/resnet_{layer}', not layer and width != entering[level]
                )
            if level < cfg.levels - 1:
                torch = names[layers]
                made += both(f'{torch}.resample.1', f'{path}/resample', 'o i h w -> h w i o')
                if times[level]:
                    made += both(f'{torch}.time_conv', f'{path}/time', 'o i t 1 1 -> t i o')
        return made

    down, up = cfg.encoder_widths, cfg.decoder_widths
    return (
        *network(
            'encoder', 'down', 'downsamples', cfg.layers, down, cfg.halves_time, (down[0], *down)
        ),
        *both('conv1', 'encoder/moments', 'o i 1 1 1 -> i o'),
        *both('conv2', 'decoder/latents', 'o i 1 1 1 -> i o'),
        *network(
            'decoder',
            'up',
            'upsamples',
            cfg.layers + 1,
            up,
            cfg.doubles_time,
            (up[0], *(width if cfg.residual else width // 2 for width in up)),
        ),
        *wan_names.names(cfg),
    )
