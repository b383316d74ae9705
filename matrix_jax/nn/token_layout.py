"""Layout of video and text tokens, the same whether or not a mesh splits them.

A mesh gives each device the same positions of every frame, and an equal part of the text. A joined
sequence holds the tokens of one device side by side, so joining and splitting moves no data between
devices; attention does not depend on the order. Tokens are padded with zeros once, so that all
parts are equal, and `real_positions` tells attention which tokens are no padding.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.parallel.sharding import constrain, num_shards


def to_tokens(latents, patch: int):
    """Latents [B T H W C] -> patches [B T N/T p*p*C], padded and split over the devices."""
    x = rearrange(latents, 'b t (h p) (w q) c -> b t (h w) (p q c)', p=patch, q=patch)
    # The input is replicated: without this the split of the tokens would propagate to it.
    x = constrain(x, 'batch', None, None, None)
    return constrain(pad(x, 2), 'batch', None, 'tokens', None)


def from_tokens(tokens, patch: int, rows: int, columns: int):
    """Inverse of `to_tokens`: patches of rows x columns per frame -> latents [B T H W C].

    Removes the padding, and gives all devices the whole result by one all-gather.
    """
    x = constrain(tokens, 'batch', None, None, None)[:, :, : rows * columns]
    return rearrange(x, 'b t (h w) (p q c) -> b t (h p) (w q) c', h=rows, p=patch, q=patch)


def pad(x, axis: int):
    """Pads an axis of tokens with zeros to a multiple of the devices that share them."""
    more = -x.shape[axis] % num_shards('tokens')
    if not more:
        return x
    widths = [(0, more if index == axis else 0) for index in range(x.ndim)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths)


def flatten_frames(video):
    """Video [B T N/T D] or [B T N/T K E] -> one sequence [B N D] or [B N K E]."""
    tokens = rearrange(video, 'b t (p n) ... -> b (p t n) ...', p=num_shards('tokens'))
    return constrain(tokens, 'batch', 'tokens', *_feature_axes(tokens, 2))


def unflatten_frames(tokens, frames: int):
    """Inverse of `flatten_frames`."""
    video = rearrange(tokens, 'b (p t n) ... -> b t (p n) ...', p=num_shards('tokens'), t=frames)
    return constrain(video, 'batch', None, 'tokens', *_feature_axes(video, 3))


def _feature_axes(x, start: int):
    """Logical names of the axes from `start` on."""
    return (None,) if x.ndim == start + 1 else ('heads', None)


def flatten_rows(rows, frames: int):
    """Rows [N ...] in raster order, one per token -> the order of `flatten_frames`."""
    parts = num_shards('tokens')
    rows = pad(rearrange(rows, '(t n) c -> t n c', t=frames), 1)
    return rearrange(rows, 't (p n) c -> (p t n) c', p=parts)


def join_text(video, text):
    """Video [B T N/T D] and text [B L D] -> one sequence [B L+N D], text first on each device."""
    parts = num_shards('tokens')
    text = rearrange(text, 'b (p l) d -> b p l d', p=parts)
    video = rearrange(video, 'b t (p n) d -> b p (t n) d', p=parts)
    tokens = rearrange(jnp.concatenate([text, video], axis=2), 'b p n d -> b (p n) d')
    return constrain(tokens, 'batch', 'tokens', None)


def split_text(tokens, shape):
    """Inverse of `join_text`, for video of the given shape."""
    parts = num_shards('tokens')
    tokens = rearrange(tokens, 'b (p n) d -> b p n d', p=parts)
    length = tokens.shape[2] - shape[1] * shape[2] // parts
    video = rearrange(tokens[:, :, length:], 'b p (t n) d -> b t (p n) d', t=shape[1])
    text = rearrange(tokens[:, :, :length], 'b p l d -> b (p l) d')
    return constrain(video, 'batch', None, 'tokens', None), constrain(text, 'batch', 'tokens', None)


def real_positions(frames: int, sites: int, length: int = 0):
    """Positions of the tokens of a joined sequence that are no padding.

    Args:
      frames: frames T.
      sites: tokens of a frame, without padding.
      length: text tokens L, without padding.

    Returns:
      int [R], or None without padding.
    """
    parts = num_shards('tokens')
    if sites % parts == length % parts == 0:
        return None
    video = rearrange(pad(np.ones([frames, sites], bool), 1), 't (p n) -> p (t n)', p=parts)
    text = pad(np.ones([length], bool), 0).reshape(parts, -(-length // parts))
    return np.flatnonzero(np.concatenate([text, video], axis=1))
