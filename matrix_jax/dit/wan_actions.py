"""Action modules of Matrix-Game 2.0 (arXiv 2508.13009) and 3.0: mouse and keyboard.

    y = mlp([x, mouse window]);  x <- x + out(attend(q(y), k(y), v(y)))
    y = embed(keyboard window);  x <- x + out(attend(q(x), k(y), v(y)))

A latent frame decodes to R = 4 pixel frames and reads a window of W*R = 12 actions. Attention is
over latent frames, separately for each site of a frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from matrix_jax.dit.weight_rows import linear_rows, norm_rows
from matrix_jax.nn.attention import softmax
from matrix_jax.nn.kv_cache import KVCache, attend_few, attend_per_site, few_frames, few_logits
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, stored
from matrix_jax.nn.rope import frequencies, rotate, rotations
from matrix_jax.parallel import compilation
from matrix_jax.weights.conversion import Row
from matrix_jax.weights.schema import check_fields

EPS = 1e-6  # of the norms of heads


@dataclasses.dataclass(frozen=True)
class ActionConfig:
    """Sizes of the action modules.

    Attributes:
      start, end: layers [start, end) with action modules.
      keyboard: keys, the width A of a keyboard vector, or None without a keyboard.
      mouse: width of a mouse vector, or None without a mouse.
      embed: width of an embedded keyboard vector.
      keyboard_width, mouse_width: widths of the two attentions.
      heads: heads K of both.
      ratio: pixel frames R of a latent frame.
      span: latent frames W whose actions a latent frame reads.
      axes: elements of a head for frame, row and column; only those of the frame are rotated.
      period: period of the frame's rotation.
      gain: factor of mouse actions, whose typical size of 0.1 is small for a small network;
        1 in published networks.
      modulate: whether the actions of a latent frame are also added to its level embedding, which
        all layers read. Published networks have no such weights.
      blocks: numbers of the layers with action modules, if these are not all of [start, end).
      norm_scale: whether norms of queries and keys multiply by their weights. Networks of
        Matrix-Game 2.0 have these weights, but its reference does not use them.

    Raises:
      ValueError: a size is out of range, or the sizes do not fit each other.
    """

    start: int = 0
    end: int = 15
    keyboard: int | None = 4
    mouse: int | None = 2
    embed: int = 128
    keyboard_width: int = 1024
    mouse_width: int = 1024
    heads: int = 16
    ratio: int = 4
    span: int = 3
    axes: tuple[int, int, int] = (8, 28, 28)
    period: float = 256.0
    gain: float = 1.0
    modulate: bool = False
    blocks: tuple[int, ...] | None = None
    norm_scale: bool = False

    def __post_init__(self):
        check_fields(self, 'actions.', zero=('start', 'axes', 'blocks'))
        wanted = self.blocks and tuple(sorted(set(self.blocks)))
        if self.blocks is not None and (
            self.blocks != wanted or (wanted[0], wanted[-1] + 1) != (self.start, self.end)
        ):
            raise ValueError(
                f'actions.blocks: got {self.blocks}, expected ascending layers from '
                f'{self.start} to {self.end - 1}'
            )
        if self.gain <= 0:
            raise ValueError(f'actions.gain: got {self.gain:g}, expected more than 0')
        for name in ('keyboard_width', 'mouse_width'):
            width, present = getattr(self, name), getattr(self, name.removesuffix('_width'))
            if present and width != self.heads * sum(self.axes):
                raise ValueError(
                    f'actions.{name}: got {width}, expected {self.heads} heads of '
                    f'{" + ".join(map(str, self.axes))} elements'
                )

    @classmethod
    def of_layers(cls, layers: Sequence[int], **fields) -> ActionConfig:
        """Action modules on any layers, in any order."""
        layers = tuple(sorted(set(layers)))
        start, end = layers[0], layers[-1] + 1
        blocks = None if len(layers) == end - start else layers
        return cls(start, end, blocks=blocks, **fields)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with action modules."""
        return tuple(range(self.start, self.end)) if self.blocks is None else self.blocks

    def steps(self, frames: int) -> int:
        """Action frames R(W+T) in the window of T latent frames."""
        return self.ratio * (self.span + frames)


def windows(actions, start, count: int, ratio: int = 4, span: int = 3):
    """Actions that the latent frames of a block read, up to the end of the block.

    Latent frame i has pixel frames R(i-1)+1 .. Ri, and latent frame 0 pixel frame 0. The first
    action is repeated before the start.

    Args:
      actions: [B F A] of pixel frames 0 .. R(start + count - 1) at least.
      start: first latent frame of the block.
      count: latent frames T of the block.
      ratio: pixel frames R of a latent frame.
      span: latent frames W of the past.

    Returns:
      [B R(W+T) A], up to and including pixel frame R(start + count - 1). The window of the next
      block drops the first R*count actions and appends as many.
    """
    steps = ratio * (span + count)
    last = ratio * (start + count - 1)
    return jnp.take(actions, jnp.maximum(last - steps + 1 + jnp.arange(steps), 0), axis=1)


def frame_windows(cfg: ActionConfig, actions, frames: int, memory=None):
    """Actions that each latent frame reads: [B M+T R*W A], oldest first.

    A clip of 1 + R(T-1) actions starts with a single pixel frame, and a latent frame reads the
    actions before its last pixel frame. A clip of R*T actions continues another one, and a latent
    frame reads the actions up to its last pixel frame. The first action is repeated before the
    start.

    Args:
      cfg: sizes R and W.
      actions: [B 1+R(T-1) A] or [B R*T A].
      frames: latent frames T.
      memory: action of each memory frame [B M A], repeated to fill its window; or None.

    Raises:
      ValueError: another number of actions.
    """
    ratio, window = cfg.ratio, cfg.ratio * cfg.span
    first = {1 + ratio * (frames - 1): -window, ratio * frames: ratio - window}.get(
        actions.shape[1]
    )
    if first is None:
        raise ValueError(
            f'actions: got {actions.shape[1]}, expected {1 + ratio * (frames - 1)} or '
            f'{ratio * frames} for {frames} latent frames'
        )
    seen = first + ratio * np.arange(frames)[:, None] + np.arange(window)
    seen = jnp.take(actions, np.maximum(seen, 0), axis=1)
    if memory is None:
        return seen
    return jnp.concatenate([jnp.repeat(memory[:, :, None], window, axis=2), seen], axis=1)


def grouped(cfg: ActionConfig, window):
    """A window [B R(W+T) A] -> actions of each latent frame [B T R*W*A], oldest first.

    Windows of each latent frame [B T R*W A] are only flattened.
    """
    if window.ndim == 4:
        return rearrange(window, 'b t f a -> b t (f a)')
    frames = window.shape[1] // cfg.ratio - cfg.span
    # PARITY: the last pixel frame of a latent frame is missing from its window.
    first = cfg.ratio - 1 + cfg.ratio * np.arange(frames)
    windows = window[:, first[:, None] + np.arange(cfg.ratio * cfg.span)]
    return rearrange(windows, 'b t f a -> b t (f a)')


class ActionEmbedding(nn.Module):
    """Embedding of the actions of each latent frame, to be added to its level embedding."""

    cfg: ActionConfig
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, mouse, keyboard):
        """Windows [B R(W+T) A] of mouse (or None) and keyboard -> [B T D] float32."""
        pressed = [grouped(self.cfg, part) for part in (mouse, keyboard) if part is not None]
        x = jnp.concatenate(pressed, axis=-1).astype(self.dtype)
        x = jax.nn.silu(Linear(self.width, dtype=self.dtype, name='linear_1')(x))
        return Linear(self.width, dtype=self.dtype, name='linear_2')(x).astype(jnp.float32)


@struct.dataclass
class KeyboardRead:
    """What tokens of a block read from the keyboard, the same in all calls on the block.

    Attributes:
      k: float32 [B T S 1 K E], rotated relative to each frame, and scaled.
      out: values behind the output layer [B K*S D].
      visible: bool, broadcastable to [T S].
    """

    k: Any
    out: Any
    visible: Any


class ActionBlock(nn.Module):
    """Adds mouse attention, then keyboard attention to the tokens.

    Attributes:
      cfg: sizes.
      width: width D of the tokens.
      dtype: type of the products and of the residual stream.
    """

    cfg: ActionConfig
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        if self.cfg.mouse:
            self.mouse = MouseAttention(self.cfg, self.dtype)
        if self.cfg.keyboard:
            self.keyboard = KeyboardAttention(self.cfg, self.width, self.dtype)

    def __call__(self, x, mouse, keyboard, pattern, past=(None, None)):
        """Computes the tokens and the new keys and values.

        Args:
          x: tokens [B T N/T D].
          mouse: window of mouse actions [B R(W+T) 2], or one of each latent frame [B T R*W 2]; None
            without a mouse.
          keyboard: the same for keyboard actions [... A]; not read with a `KeyboardRead`.
          pattern: `Blocks` or `Ring` of T frames.
          past: caches of mouse and keyboard, if `pattern` is a `Ring`; the second may be a
            `KeyboardRead`.

        Returns:
          (tokens [B T N/T D], (mouse, keyboard) `KVCache`s of T frames). The second is None with a
          `KeyboardRead`.
        """
        moved = pressed = None
        if self.cfg.mouse:
            x, moved = self.mouse(x, mouse, pattern, past[0])
        if isinstance(past[1], KeyboardRead):
            x = self.keyboard.attend(x, past[1])
        elif self.cfg.keyboard:
            x, pressed = self.keyboard(x, keyboard, pattern, past[1])
        return x, (moved, pressed)

    def read_keyboard(self, keyboard, pattern, past):
        """See `KeyboardAttention.read`."""
        return self.keyboard.read(keyboard, pattern, past)


class MouseAttention(nn.Module):
    """Self-attention of the frames of each site, with the mouse joined to the tokens."""

    cfg: ActionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, window, pattern, past):
        """Tokens [B T n D], window [B R(W+T) 2] -> (tokens, `KVCache` of T frames)."""
        cfg, dtype = self.cfg, self.dtype
        moves = grouped(cfg, window)[:, :, None].astype(dtype)
        y = jnp.concatenate([x, jnp.broadcast_to(moves, (*x.shape[:3], moves.shape[-1]))], axis=-1)
        y = jax.nn.gelu(Linear(cfg.mouse_width, dtype=dtype, name='linear_1')(y), approximate=True)
        y = LayerNorm(1e-5, name='norm')(Linear(cfg.mouse_width, dtype=dtype, name='linear_2')(y))
        q, k, v = rearrange(
            Linear(3 * cfg.mouse_width, use_bias=False, dtype=dtype, name='qkv')(y),
            'b t n (c k e) -> c b t n k e',
            c=3,
            k=cfg.heads,
        )
        norm = HeadNorm(sum(cfg.axes), cfg.norm_scale, name='query_norm')
        k = HeadNorm(sum(cfg.axes), cfg.norm_scale, name='key_norm')(k)
        y, new = attend(cfg, q, norm, KVCache(stored(k.astype(dtype)), v), pattern, past)
        return x + Linear(x.shape[-1], use_bias=False, dtype=dtype, name='out')(y), new


class KeyboardAttention(nn.Module):
    """Cross-attention from tokens to the keyboard windows of their own and earlier frames."""

    cfg: ActionConfig
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        cfg, dtype = self.cfg, self.dtype
        self.linear_1, self.linear_2 = (Linear(cfg.embed, dtype=dtype) for _ in range(2))
        self.query = Linear(cfg.keyboard_width, use_bias=False, dtype=dtype)
        self.key_value = Linear(2 * cfg.keyboard_width, use_bias=False, dtype=dtype)
        self.query_norm, self.key_norm = (HeadNorm(sum(cfg.axes), cfg.norm_scale) for _ in range(2))
        self.out = Linear(self.width, use_bias=False, dtype=dtype)

    def __call__(self, x, window, pattern, past):
        """Tokens [B T n D], window [B R(W+T) A] -> (tokens, `KVCache` of T frames, one site)."""
        new = self.keys(window)
        y, new = attend(self.cfg, self._queries(x), self.query_norm, new, pattern, past)
        return x + self.out(y), new

    def keys(self, window):
        """Window [B R(W+T) A] -> `KVCache` of T frames [B T 1 K E]."""
        keys = grouped(self.cfg, self.linear_2(jax.nn.silu(self.linear_1(window))))
        k, v = rearrange(self.key_value(keys), 'b t (c k e) -> c b t 1 k e', c=2, k=self.cfg.heads)
        return KVCache(self.key_norm(k).astype(self.dtype), v)

    def read(self, window, pattern, past):
        """Window [B R(W+T) A], cache -> (`KVCache` of T frames, `KeyboardRead` of the block)."""
        new = self.keys(window)
        cached = pattern.keys_and_values(past, new)
        own, theirs = frame_rotations(self.cfg, pattern)
        k = jnp.repeat(rotate(cached.k, theirs)[:, None].astype(jnp.float32), len(own[0]), axis=1)
        cos, sin = (part[:, None] for part in own)
        # Keys are turned back in place of the queries, of which there are more.
        k = rotate(k, (cos, -sin)) * k.shape[-1] ** -0.5 * self.query_norm.factors()
        # Values go through the output layer here, once per key in place of once per token.
        kernel = self.variables['params']['out']['kernel'].astype(self.dtype)
        kernel = rearrange(kernel, '(k e) d -> k e d', k=self.cfg.heads)
        out = jnp.einsum('bske,ked->bksd', cached.v[:, :, 0], kernel)
        return new, KeyboardRead(k, rearrange(out, 'b k s d -> b (k s) d'), pattern.visible())

    def attend(self, x, read: KeyboardRead):
        """Tokens [B T n D] and what they read -> tokens."""
        q = self._queries(x)
        weights = softmax(few_logits(q, read.k, read.visible, inverse_rms(q)))
        weights = rearrange(weights.astype(self.dtype), 'b t n k s -> b t n (k s)')
        return x + jnp.einsum('btns,bsd->btnd', weights, read.out.astype(self.dtype))

    def _queries(self, x):
        return rearrange(self.query(x), 'b t n (k e) -> b t n k e', k=self.cfg.heads)


class HeadNorm(nn.Module):
    """RMS norm over a head.

    Attributes:
      width: width E.
      use_scale: whether the norm multiplies by its weight (`ActionConfig.norm_scale`).
    """

    width: int
    use_scale: bool = False

    def setup(self):
        # PARITY: Matrix-Game 2.0 has a scale that is not used; it is kept for export.
        self.scale = self.param('scale', nn.initializers.ones_init(), (self.width,))

    def __call__(self, x):
        """[... E] -> [... E] float32."""
        x = x.astype(jnp.float32)
        x = x * inverse_rms(x)[..., None]
        return x * self.scale.astype(jnp.float32) if self.use_scale else x

    def factors(self):
        """What the norm multiplies by, [E] or 1."""
        return self.scale.astype(jnp.float32) if self.use_scale else 1


def inverse_rms(x):
    """[... E] -> [...] float32."""
    return jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1) + EPS)


def attend(cfg: ActionConfig, q, norm: HeadNorm, new: KVCache, pattern, past):
    """Attention of queries [B T n K E] to keys of their own site -> ([B T n K*E], `new`).

    Args:
      q: before their `norm`.
    """
    cached = pattern.keys_and_values(past, new)
    own, theirs = frame_rotations(cfg, pattern)
    k, v, visible = rotate(cached.k, theirs), cached.v, pattern.visible()
    if few_frames(q.shape[1], k.shape[1]):
        factors = inverse_rms(q) * q.shape[-1] ** -0.5
        q = rotate(q.astype(jnp.float32) * norm.factors(), own)
        y = attend_few(q, k, v, visible, factors)
    else:
        q = norm(q)
        if compilation.backend() == 'gpu':
            q = stored(q.astype(new.k.dtype))
        y = attend_per_site(rotate(q, own).astype(new.k.dtype), k, v, visible)
    return rearrange(y, 'b t n k e -> b t n (k e)'), new


def frame_rotations(cfg: ActionConfig, pattern):
    """RoPE of the frames of queries [T 1 P] and of keys [S 1 P], as (cos, sin) each."""
    speeds = frequencies(cfg.axes[0] // 2, cfg.period)
    return [
        tuple(part[:, None] for part in rotations(positions, speeds))
        for positions in pattern.positions()
    ]


def action_rows(cfg: ActionConfig, torch, path, layers):
    """Weight table rows: released action modules <-> `ActionBlock`s."""
    rows = []
    if cfg.mouse:
        rows += linear_rows(f'{torch}.mouse_mlp.0', f'{path}/mouse/linear_1', 'i', 'o', layers)
        rows += linear_rows(f'{torch}.mouse_mlp.2', f'{path}/mouse/linear_2', 'i', 'o', layers)
        rows += norm_rows(f'{torch}.mouse_mlp.3', f'{path}/mouse/norm', 'o', layers)
    named = [('mouse', {'t_qkv': 'qkv', 'proj_mouse': 'out'}, 'img_attn')] if cfg.mouse else []
    if cfg.keyboard:
        for theirs, ours in (('0', 'linear_1'), ('2', 'linear_2')):
            rows += linear_rows(
                f'{torch}.keyboard_embed.{theirs}', f'{path}/keyboard/{ours}', 'i', 'o', layers
            )
        kernels = {'mouse_attn_q': 'query', 'keyboard_attn_kv': 'key_value', 'proj_keyboard': 'out'}
        named.append(('keyboard', kernels, 'key_attn'))
    for branch, kernels, norms in named:
        rows += [
            Row(f'{torch}.{theirs}.weight', f'{path}/{branch}/{ours}/kernel', 'o i -> i o', layers)
            for theirs, ours in kernels.items()
        ]
        rows += [
            Row(
                f'{torch}.{norms}_{theirs}_norm.weight',
                f'{path}/{branch}/{ours}_norm/scale',
                'e -> e',
                layers,
            )
            for theirs, ours in (('q', 'query'), ('k', 'key'))
        ]
    return rows
