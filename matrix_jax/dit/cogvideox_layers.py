"""Layers of the CogVideoX DiT: joint attention and an MLP, with or without a control block behind.

`cfg` is `matrix_jax.dit.cogvideox.Config`. Frames and text may be padded for a mesh
(`nn.sequence`); `places` is the tokens of a frame without padding.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from matrix_jax.dit.actions import ControlBlock
from matrix_jax.nn import token_layout
from matrix_jax.nn.attention import MultiHead
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import PairedAdaLN
from matrix_jax.nn.precompute import COLLECTION


def stack(layer, cfg: Any, length: int, given: int):
    """A scan of `length` equal layers; `given` inputs are the same for all of them."""
    if cfg.remat != 'none':
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = nn.remat(layer, prevent_cse=False, policy=kept if cfg.remat == 'dots' else None)
    return nn.scan(
        layer,
        variable_axes={'params': 0, COLLECTION: 0},
        split_rngs={'params': True},
        length=length,
        in_axes=(nn.broadcast,) * given,
        unroll=min(cfg.scan_unroll, length),
    )


class SteeredLayer(nn.Module):
    """A block, then a control block."""

    cfg: Any
    places: int

    @nn.compact
    def __call__(self, tokens, time, steering):
        """Tokens (video [B T N/T D], text [B L D]), time [B T P], what steers -> tokens."""
        (video, text), _ = Block(self.cfg, self.places, name='block')(tokens, time)
        video = ControlBlock(
            self.cfg.heads, self.cfg.eps, jnp.dtype(self.cfg.dtype), name='control'
        )(video, steering[0], time, *steering[1:])
        return (video, text), None


class Block(nn.Module):
    """Joint self-attention over text and video, then a shared MLP; both gated by the level."""

    cfg: Any
    places: int

    @nn.compact
    def __call__(self, tokens, time):
        """Tokens (video [B T N/T D], text [B L D]), time [B T P] -> tokens."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        real = token_layout.real(tokens[0].shape[1], self.places, cfg.text_length)
        attend = MultiHead(cfg.heads, dtype=dtype, exchange=cfg.exchange, name='attention')
        mlp = Mlp(4 * cfg.width, dtype, name='mlp')
        for norm, branch in (('norm1', lambda x: attend(x, real=real)), ('norm2', mlp)):
            video, text = tokens
            *normed, gate, text_gate = PairedAdaLN(cfg.eps, name=norm)(video, text, time)
            y = branch(token_layout.join(*(x.astype(dtype) for x in normed)))
            video_y, text_y = token_layout.split(y, video.shape)
            tokens = (
                (video + gate * video_y).astype(dtype),
                (text + text_gate * text_y).astype(dtype),
            )
        return tokens, None


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B N D] -> [B N D]."""
        y = Linear(self.hidden, dtype=self.dtype, name='up')(x)
        return Linear(x.shape[-1], dtype=self.dtype, name='down')(jax.nn.gelu(y, approximate=True))
