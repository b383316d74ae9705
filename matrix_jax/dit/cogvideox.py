"""CogVideoX DiT with a noise level per latent frame and interleaved control blocks.

A joint text-video transformer with expert adaptive LayerNorm (CogVideoX, arXiv 2408.06072, section
2.2). The Matrix (arXiv 2412.03568) adds a control block behind each of the layers [start, end).
With x the video tokens, y the text tokens, t the embedded level of each latent frame and c one
embedded control per latent frame, a layer computes

    x, y <- (x, y) + gate1(t) * attend(norm1(x, y; t))      joint self-attention
    x, y <- (x, y) + gate2(t) * mlp(norm2(x, y; t))
    x    <- x + gate(t) * attend(norm(x; t), norm(c; t))    layers with control

norm(.; t) is LayerNorm(.) * (1 + scale(t)) + shift(t), where x and y have their own shift, scale
and gate. Layers run as three scans, `before`, `steered` (with control) and `after`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.dit.actions import ControlBlock, ControlEmbedding, visibility
from matrix_jax.dit.cogvideox_config import PRESETS, Config, ControlConfig, check
from matrix_jax.dit.segments import is_separate, scan_layers
from matrix_jax.dit.weight_rows import adaln_rows, attention_rows, linear_rows, norm_rows
from matrix_jax.nn import initializers, token_layout
from matrix_jax.nn.attention import MultiHead
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, PairedAdaLN, TimeEmbedding, modulate, stored
from matrix_jax.nn.rope import scaled_positions, sincos_3d
from matrix_jax.parallel.sharding import constrain
from matrix_jax.weights.conversion import Row

__all__ = [
    'PRESETS',
    'ZERO_INIT',
    'Block',
    'CogVideoXTransformer',
    'Config',
    'ControlConfig',
    'ControlledBlock',
    'count',
    'positions',
    'shapes',
    'weights',
]


class CogVideoXTransformer(nn.Module):
    """The whole network: latents, text, noise levels and control -> v-prediction."""

    cfg: Config

    @nn.compact
    def __call__(self, latents, text, level, control=None, guidance=None):
        """Predicts v.

        Args:
          latents: noisy latents [B T H W C].
          text: encoded text [B L Dt].
          level: noise levels 0 .. 999, [B T] or [B]; the batch may be 1.
          control: control vectors [B T A], None without control blocks; the batch may be 1.
          guidance: guidance codes [B T P] or None; T may be 1.

        Returns:
          v [B T H W C], float32.

        Raises:
          ValueError: a shape does not fit the network.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        level = jnp.asarray(level)
        level = level[:, None] if level.ndim == 1 else level
        check(cfg, latents, text, level, control)
        frames, rows, columns = latents.shape[1], *(n // cfg.patch for n in latents.shape[2:4])

        time = TimeEmbedding(
            cfg.width, cfg.time_dim, cfg.guidance_dim, dtype, name='time_embedding'
        )(level, guidance)
        patches = token_layout.to_tokens(latents, cfg.patch)
        video = Linear(cfg.width, dtype=dtype, name='patch')(patches)
        video = video + token_layout.pad(positions(cfg, frames, rows, columns), 1).astype(dtype)
        text = constrain(token_layout.pad(text, 1), 'batch', 'tokens', None)
        tokens = (video, Linear(cfg.width, dtype=dtype, name='text')(text))
        if cfg.control:
            control = ControlEmbedding(cfg.width, dtype, name='control_embedding')(control)
            if cfg.control.modulate:
                time = time + Linear(cfg.time_dim, dtype=dtype, name='control_time')(control)
            bias = visibility(frames * rows * columns, control.shape[1], cfg.control.recency)
            bias = token_layout.flatten_rows(bias, frames)

        given = self.variables.get('params', {})
        for name, (start, stop) in cfg.segments.items():
            block, inputs = Block, (time,)
            if name == 'steered':
                block, inputs = ControlledBlock, (time, control, bias)
            layers = scan_layers(
                block,
                cfg,
                stop - start,
                is_separate(given.get(name, ())),
                __call__=(nn.broadcast,) * len(inputs),
            )
            tokens, _ = layers(cfg, rows * columns, name=name)(tokens, *inputs)

        video = LayerNorm(cfg.eps, name='norm_final')(tokens[0])
        modulation = Linear(2 * cfg.width, name='modulation_out')(jax.nn.silu(time))
        shift, scale = rearrange(modulation, 'b t (c d) -> c b t 1 d', c=2)
        video = modulate(LayerNorm(cfg.eps, name='norm_out')(video), shift, scale)
        patches = Linear(cfg.patch**2 * cfg.channels, dtype=dtype, name='out')(video)
        return token_layout.from_tokens(patches, cfg.patch, rows, columns).astype(jnp.float32)


class Block(nn.Module):
    """Joint self-attention over text and video, then a shared MLP.

    Attributes:
      cfg: sizes.
      sites: tokens of a frame, without the padding for a mesh.
    """

    cfg: Config
    sites: int

    @nn.compact
    def __call__(self, tokens, time):
        """Tokens (video [B T N/T D], text [B L D]), levels [B T P] -> (tokens, None)."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        real = token_layout.real_positions(tokens[0].shape[1], self.sites, cfg.text_length)
        attention = MultiHead(cfg.heads, dtype=dtype, exchange=cfg.exchange, name='attention')
        mlp = Mlp(4 * cfg.width, dtype, name='mlp')

        def add(tokens, norm, branch):
            """(x, y) + gate(t) * branch(norm(x, y; t))."""
            video, text = tokens
            *normed, gate, text_gate = PairedAdaLN(cfg.eps, name=norm)(video, text, time)
            y = branch(token_layout.join_text(*(x.astype(dtype) for x in normed)))
            video_y, text_y = token_layout.split_text(y, video.shape)
            video, text = video + gate * video_y, text + text_gate * text_y
            return stored(video.astype(dtype)), stored(text.astype(dtype))

        tokens = add(tokens, 'norm1', lambda x: attention(x, real=real))
        tokens = add(tokens, 'norm2', mlp)
        return tokens, None


class ControlledBlock(nn.Module):
    """A `Block`, then cross-attention from video to control; same attributes."""

    cfg: Config
    sites: int

    @nn.compact
    def __call__(self, tokens, time, control, bias):
        """As `Block`, with control [B T D] and its attention bias [N T]."""
        cfg = self.cfg
        (video, text), _ = Block(cfg, self.sites, name='block')(tokens, time)
        attend = ControlBlock(cfg.heads, cfg.eps, jnp.dtype(cfg.dtype), name='control')
        return (attend(video, control, time, bias), text), None


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B N D] -> [B N D]."""
        y = Linear(self.hidden, dtype=self.dtype, name='up')(x)
        return Linear(x.shape[-1], dtype=self.dtype, name='down')(jax.nn.gelu(y, approximate=True))


def positions(cfg: Config, frames: int, rows: int, columns: int) -> np.ndarray:
    """Sinusoidal position codes [T N/T D] of a window, whose first frame is always frame 0."""
    return sincos_3d(
        scaled_positions(frames, cfg.temporal_scale),
        scaled_positions(rows, cfg.spatial_scale),
        scaled_positions(columns, cfg.spatial_scale),
        cfg.width,
    ).astype(np.float32)


# --- parameters ------------------------------------------------------------------------------


# Modulations and output that start at zero, for training from scratch: blocks are the identity.
ZERO_INIT = (
    ('*norm?/linear/*', initializers.zeros),
    ('modulation_out/*', initializers.zeros),
    ('out/*', initializers.zeros),
)


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    control = jnp.zeros((1, 1, cfg.control.dim)) if cfg.control else None
    inputs = (
        jnp.zeros((1, 1, cfg.patch, cfg.patch, cfg.channels)),
        jnp.zeros((1, cfg.text_length, cfg.text_dim)),
        jnp.zeros((1, 1)),
        control,
    )
    return jax.eval_shape(CogVideoXTransformer(cfg).init, jax.random.key(0), *inputs)['params']


def count(cfg: Config) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(cfg)))


def weights(cfg: Config) -> tuple[Row, ...]:
    """Weight table: released state dict <-> parameter tree."""
    patch = dict(p=cfg.patch, q=cfg.patch)
    rows = [
        Row('patch_embed.proj.weight', 'patch/kernel', 'd c p q -> (p q c) d', sizes=patch),
        Row('patch_embed.proj.bias', 'patch/bias', 'd -> d'),
        *linear_rows('patch_embed.text_proj', 'text', 'i', 'd'),
        *linear_rows('time_embedding.linear_1', 'time_embedding/linear_1', 'd', 'p'),
        *linear_rows('time_embedding.linear_2', 'time_embedding/linear_2', 'i', 'p'),
        *norm_rows('norm_final', 'norm_final', 'd'),
        *norm_rows('norm_out.norm', 'norm_out', 'd'),
        *linear_rows('norm_out.linear', 'modulation_out', 'p', 'd'),
        Row('proj_out.weight', 'out/kernel', '(c p q) d -> d (p q c)', sizes=patch),
        Row('proj_out.bias', 'out/bias', '(c p q) -> (p q c)', sizes=patch),
    ]
    if cfg.guidance_dim is not None:
        rows += [
            Row('time_embedding.cond_proj.weight', 'time_embedding/guidance/kernel', 'd i -> i d')
        ]
    for name, layers in cfg.segments.items():
        path = 'steered/block' if name == 'steered' else name
        torch = 'transformer_blocks.{i}'
        rows += attention_rows(torch, path, layers)
        rows += adaln_rows(f'{torch}.norm2', f'{path}/norm2', layers)
        rows += linear_rows(f'{torch}.ff.net.0.proj', f'{path}/mlp/up', 'd', 'm', layers)
        rows += linear_rows(f'{torch}.ff.net.2', f'{path}/mlp/down', 'm', 'd', layers)
    if cfg.control:
        rows += linear_rows('control_embedding.0', 'control_embedding/linear_1', 'i', 'o')
        rows += linear_rows('control_embedding.2', 'control_embedding/linear_2', 'i', 'd')
        rows += linear_rows('control_embedding.4', 'control_embedding/linear_3', 'd', 'o')
        if cfg.control.modulate:
            rows += linear_rows('control_time', 'control_time', 'd', 'p')
        rows += attention_rows(
            'control_blocks.{i}', 'steered/control', (0, cfg.control.end - cfg.control.start)
        )
    return tuple(rows)
