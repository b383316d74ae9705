"""Video tokens by frame, text tokens, and both as one sequence, whatever splits them.

A mesh gives each device the same places of every frame, and its part of the text. One sequence of
them holds the tokens of a device side by side: joining and splitting moves nothing between devices,
and attention does not mind the order. Tokens are padded with zeros once, so that all parts are
equal; `real` says where attention must not look.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from matrix_jax.parallel.sharding import constrain, ways


def pad(x, axis: int):
    """`x` with zeros behind its tokens, up to a multiple of the devices that share them."""
    more = -x.shape[axis] % ways('tokens')
    if not more:
        return x
    widths = [(0, more if index == axis else 0) for index in range(x.ndim)]
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths)


def flatten(video):
    """Video [B T N/T D] or [B T N/T K E] -> one sequence [B N D] or [B N K E]."""
    tokens = rearrange(video, 'b t (p n) ... -> b (p t n) ...', p=ways('tokens'))
    return constrain(tokens, 'batch', 'tokens', *_of_a_token(tokens, 2))


def unflatten(tokens, frames: int):
    """The inverse of `flatten`."""
    video = rearrange(tokens, 'b (p t n) ... -> b t (p n) ...', p=ways('tokens'), t=frames)
    return constrain(video, 'batch', None, 'tokens', *_of_a_token(video, 3))


def _of_a_token(x, start: int):
    """Names of the axes from `start` on."""
    return (None,) if x.ndim == start + 1 else ('heads', None)


def table(rows, frames: int):
    """Rows [N ...] of the tokens of all frames, in raster order -> as `flatten` has them."""
    parts = ways('tokens')
    rows = pad(rearrange(rows, '(t n) c -> t n c', t=frames), 1)
    return rearrange(rows, 't (p n) c -> (p t n) c', p=parts)


def join(video, text):
    """Video [B T N/T D] and text [B L D] -> one sequence [B L+N D], text first on each device."""
    parts = ways('tokens')
    text = rearrange(text, 'b (p l) d -> b p l d', p=parts)
    video = rearrange(video, 'b t (p n) d -> b p (t n) d', p=parts)
    tokens = rearrange(jnp.concatenate([text, video], axis=2), 'b p n d -> b (p n) d')
    return constrain(tokens, 'batch', 'tokens', None)


def split(tokens, shape):
    """The inverse of `join`, for video of the given shape."""
    parts = ways('tokens')
    tokens = rearrange(tokens, 'b (p n) d -> b p n d', p=parts)
    length = tokens.shape[2] - shape[1] * shape[2] // parts
    video = rearrange(tokens[:, :, length:], 'b p (t n) d -> b t (p n) d', t=shape[1])
    text = rearrange(tokens[:, :, :length], 'b p l d -> b (p l) d')
    return constrain(video, 'batch', None, 'tokens', None), constrain(text, 'batch', 'tokens', None)


def real(frames: int, places: int, length: int = 0):
    """Where a joined sequence of padded parts has tokens, int [R]; None if there is no padding.

    Args:
      frames: frames T.
      places: tokens of a frame, without padding.
      length: tokens of the text, without padding.
    """
    parts = ways('tokens')
    if places % parts == length % parts == 0:
        return None
    video = rearrange(pad(np.ones([frames, places], bool), 1), 't (p n) -> p (t n)', p=parts)
    text = pad(np.ones([length], bool), 0).reshape(parts, -(-length // parts))
    return np.flatnonzero(np.concatenate([text, video], axis=1))
