"""Wan DiT with image context, keyboard and mouse, for whole clips or block by block on caches.

Wan 2.1 (arXiv 2503.20314) without its text branch. Matrix-Game 2.0 (arXiv 2508.13009) adds action
modules to the layers [start, end) and trains the network block-causally:

    x <- x + m2 * attend(norm(x) * (1 + m1) + m0)      m = layer's own + embedded level of the frame
    x <- x + attend_image(norm3(x))
    x <- x + mouse(x);  x <- x + keyboard(x)           layers with actions
    x <- x + m5 * mlp(norm(x) * (1 + m4) + m3)

`__call__` takes a whole clip, bidirectional (the foundation model) or in blocks of n frames that
see themselves and earlier frames (training of streaming networks). `cached` takes the next block:

    caches = net.apply(params, image, init_caches(cfg, batch, height, width), method='read_image')
    v, caches = net.apply(params, caches, latents, level, cond, mouse, keyboard, method='cached')
    caches = advance(caches, n)

The calls for one block write to the same cache slots, so the last one, of clean latents, remains.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from matrix_jax.dit.segments import is_separate, scan_layers
from matrix_jax.dit.wan_actions import ActionBlock, ActionEmbedding, windows
from matrix_jax.dit.wan_caches import Caches, advance, init_caches, sharded, sites
from matrix_jax.dit.wan_config import ACTING, PRESETS, Config, check
from matrix_jax.dit.wan_layers import (
    ImageEmbedding,
    LevelEmbedding,
    Projections,
    merge_projections,
    standardize,
)
from matrix_jax.dit.wan_rows import diffusers_names, trunk_rows
from matrix_jax.dit.weight_rows import linear_rows, norm_rows
from matrix_jax.nn import initializers, token_layout
from matrix_jax.nn.kv_cache import Blocks, Ring, attend_all
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, modulate, stored
from matrix_jax.nn.rope import rotate, rotations_3d
from matrix_jax.parallel.sharding import constrain
from matrix_jax.weights.conversion import Prefix, Rename, Row

__all__ = [
    'PRESETS',
    'ZERO_INIT',
    'Caches',
    'Config',
    'WanTransformer',
    'advance',
    'count',
    'init_caches',
    'init_rules',
    'shapes',
    'stream_layer',
    'weights',
    'windows',
]


@struct.dataclass
class LayerInputs:
    """Inputs that all layers share.

    Attributes:
      time: modulation by the noise level [B T 6 D].
      image: image tokens [B L D], or None if their keys and values are cached.
      mouse, keyboard: windows of actions.
      pattern, action_pattern: which frames attend to which.
      rotations: RoPE of queries and of keys.
    """

    time: Any
    image: Any
    mouse: Any
    keyboard: Any
    pattern: Blocks | Ring
    action_pattern: Blocks | Ring
    rotations: Any


class WanTransformer(nn.Module):
    """The whole network: latents, levels, conditions and actions -> velocity."""

    cfg: Config

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.patch = Linear(cfg.width, dtype=dtype)
        self.time_embedding = LevelEmbedding(cfg)
        self.time_projection = Linear(6 * cfg.width, dtype=dtype)
        self.image_embedding = ImageEmbedding(cfg)
        if cfg.actions and cfg.actions.modulate:
            self.action_embedding = ActionEmbedding(cfg.actions, cfg.width, dtype)
        given = self.variables.get('params', {})
        for name, (start, stop) in cfg.segments.items():
            layers = scan_layers(
                Block,
                cfg,
                stop - start,
                is_separate(given.get(name, ())),
                __call__=(0, nn.broadcast),
                read_image=nn.broadcast,
                read_keyboard=(0, nn.broadcast),
            )
            setattr(self, name, layers(cfg, name.startswith(ACTING)))
        normal = nn.initializers.normal(cfg.width**-0.5)
        self.modulation_out = self.param('modulation_out', normal, (2, cfg.width))
        self.out = Linear(cfg.patch**2 * cfg.channels, dtype=dtype)

    def __call__(self, latents, level, cond, image, mouse=None, keyboard=None, block=None):
        """Predicts the velocity of a whole clip.

        Args:
          latents: noisy latents [B T H W C].
          level: noise levels 0 .. 1000, [B T] or [B]; the batch may be 1.
          cond: conditions [B T H W Cc] (mask and image latents).
          image: features of the first image [B L Di].
          mouse: mouse [B F 2] of pixel frames 0 .. R(T-1); None without a mouse.
          keyboard: keys [B F A] of the same frames; None without actions.
          block: latent frames of a block, each of which sees its block and earlier frames within
            `cfg.local` of the end of the block; None = all frames see all.

        Returns:
          v [B T H W C], float32.
        """
        cfg, frames = self.cfg, latents.shape[1]
        check(cfg, latents, level, cond, image, mouse, keyboard)
        pattern = Blocks(
            frames,
            block or frames,
            cfg.local if block else None,
            sites(cfg, *latents.shape[2:4]),
            cfg.exchange,
        )
        if cfg.actions:
            size = cfg.actions
            mouse, keyboard = (
                actions if actions is None else windows(actions, 0, frames, size.ratio, size.span)
                for actions in (mouse, keyboard)
            )
        actions, patterns = (mouse, keyboard), (pattern, pattern)
        image = self.image_embedding(image)
        return self._run(latents, level, cond, actions, patterns, image=image)[0]

    def cached(self, caches, latents, level, cond, mouse=None, keyboard=None):
        """Predicts the velocity of the block at `caches.start`.

        Args:
          caches: of `init_caches` and `read_image`, advanced to this block.
          latents, level, cond: as in `__call__`, for the frames of the block.
          mouse, keyboard: windows of actions [B R(W+T) A] (`windows`). The second may be the
            second result of `read_keyboard`, with the caches that are its first.

        Returns:
          (v [B T H W C] float32, caches with the keys and values of the block).
        """
        cfg, frames = self.cfg, latents.shape[1]
        check(cfg, latents, level, cond, None, mouse, keyboard, window=True)
        size = sites(cfg, *latents.shape[2:4])
        ring, action_ring = rings = [
            Ring(caches.start, frames, cfg.local, sink, size, cfg.exchange)
            for sink in (cfg.sink, 0)
        ]
        v, new = self._run(latents, level, cond, (mouse, keyboard), rings, caches=caches)

        def write(past, new):
            video, (mouse, keyboard) = new[0], new[1] or (None, None)
            return sharded(
                past.replace(
                    video=ring.put(past.video, video),
                    mouse=mouse and action_ring.put(past.mouse, mouse),
                    keyboard=action_ring.put(past.keyboard, keyboard)
                    if keyboard
                    else past.keyboard,
                )
            )

        return v, caches.replace(
            runs={name: _each(write, past, new[name]) for name, past in caches.runs.items()}
        )

    def read_image(self, image, caches):
        """Caches with the keys and values of an image [B L Di], for `cached`."""
        tokens = self.image_embedding(image)

        def write(past, image):
            return sharded(past.replace(image=image))

        return caches.replace(
            runs={
                name: _each(write, past, getattr(self, name).read_image(None, tokens)[1])
                for name, past in caches.runs.items()
            }
        )

    def read_keyboard(self, caches, keyboard):
        """Reads the keyboard once for all calls on a block, if the layers are separate.

        Args:
          caches: as in `cached`.
          keyboard: window of actions [B R(W+T) A].

        Returns:
          (caches with the keys and values of the block's actions, run -> `KeyboardRead` of each of
          its layers).
        """
        cfg, reads, runs = self.cfg, {}, dict(caches.runs)
        frames = keyboard.shape[1] // cfg.actions.ratio - cfg.actions.span
        ring = Ring(caches.start, frames, cfg.local)
        for name, past in caches.runs.items():
            if name.startswith(ACTING):
                _, made = getattr(self, name).read_keyboard(None, past, (keyboard, ring))
                new, reads[name] = zip(*made, strict=True)
                runs[name] = tuple(
                    one.replace(keyboard=ring.put(one.keyboard, now))
                    for one, now in zip(past, new, strict=True)
                )
        return caches.replace(runs=runs), reads

    def _run(self, latents, level, cond, actions, patterns, image=None, caches=None):
        """Returns (v, {run of layers: its new keys and values})."""
        cfg, (mouse, keyboard), (pattern, action_pattern) = self.cfg, actions, patterns
        past = caches.runs if caches else dict.fromkeys(cfg.segments)
        if isinstance(keyboard, dict):
            for name, reads in keyboard.items():
                layers = zip(past[name], reads, strict=True)
                past = past | {name: tuple(one.replace(keyboard=read) for one, read in layers)}
            keyboard = None

        def split_sites(table):  # each device computes all of it and keeps its part
            table = token_layout.pad(constrain(table, None, None, None), 1)
            return constrain(table, None, 'tokens', None)

        rows, columns = (size // cfg.patch for size in latents.shape[2:4])
        level = jnp.asarray(level)
        time = self.time_embedding(level[:, None] if level.ndim == 1 else level)
        if mouse is not None and cfg.actions.gain != 1:
            mouse = mouse * cfg.actions.gain
        if cfg.actions and cfg.actions.modulate:
            time = time + self.action_embedding(mouse, keyboard)
        modulation = self.time_projection(jax.nn.silu(time)).astype(jnp.float32)
        inputs = LayerInputs(
            rearrange(modulation, 'b t (c d) -> b t c d', c=6),
            image,
            mouse,
            keyboard,
            pattern,
            action_pattern,
            [
                [split_sites(part) for part in rotations_3d(positions, rows, columns, cfg.head_dim)]
                for positions in pattern.positions()
            ],
        )

        x = jnp.concatenate([latents, cond], axis=-1)
        x, new_caches = self.patch(token_layout.to_tokens(x, cfg.patch)), {}
        for name in cfg.segments:
            x = constrain(x, 'batch', None, 'tokens', None)
            x, new_caches[name] = getattr(self, name)(x, past[name], inputs)

        shift, scale = rearrange(self.modulation_out + time[:, :, None], 'b t c d -> c b t 1 d')
        x = self.out(modulate(standardize(x, cfg.eps), shift, scale))
        v = token_layout.from_tokens(x, cfg.patch, rows, columns)
        return v.astype(jnp.float32), new_caches


def _each(write, past, new):
    """`write` of a run of layers: of their stacked caches, or of those of each layer."""
    if isinstance(past, tuple):
        return tuple(map(write, past, new))
    return write(past, new)


class Block(nn.Module):
    """Self-attention and MLP, modulated by the noise level, with image and actions between them."""

    cfg: Config
    has_actions: bool

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.modulation = self.param(
            'modulation', nn.initializers.normal(cfg.width**-0.5), (6, cfg.width)
        )
        self.attention = Projections(cfg)
        self.image_norm = LayerNorm(cfg.eps)
        self.image_attention = Projections(cfg)
        if self.has_actions:
            self.actions = ActionBlock(cfg.actions, cfg.width, dtype)
        self.up, self.down = Linear(cfg.mlp, dtype=dtype), Linear(cfg.width, dtype=dtype)

    def __call__(self, x, past, inputs):
        """Tokens [B T N/T D], `LayerCaches` or None -> (tokens, new keys and values)."""
        dtype, eps = jnp.dtype(self.cfg.dtype), self.cfg.eps
        m = rearrange(self.modulation + inputs.time, 'b t c d -> c b t 1 d')

        y = modulate(standardize(x, eps), m[0], m[1]).astype(dtype)
        q, new = self.attention.queries_and_keys(y)
        cached = inputs.pattern.keys_and_values(past and past.video, new)
        q, k = (
            rotate(heads, rotation)
            for heads, rotation in zip((q, cached.k), inputs.rotations, strict=True)
        )
        y = self.attention.output(inputs.pattern.attend(q, k, cached.v))
        x = stored((x + m[2] * y).astype(dtype))

        q = self.image_attention.queries(self.image_norm(x).astype(dtype))
        image = past.image if past else self.image_attention.keys(inputs.image[:, None])
        x = stored(x + self.image_attention.output(attend_all(q, image.k, image.v)))

        acted = None
        if self.has_actions:
            x, acted = self.actions(
                x,
                inputs.mouse,
                inputs.keyboard,
                inputs.action_pattern,
                (past.mouse, past.keyboard) if past else (None, None),
            )

        y = self.up(modulate(standardize(x, eps), m[3], m[4]).astype(dtype))
        x = x + m[5] * self.down(jax.nn.gelu(y, approximate=True))
        return stored(x.astype(dtype)), (new, acted)

    def read_image(self, carry, image):
        """Keys and values of image tokens [B L D], as the output of a scan."""
        return carry, self.image_attention.keys(image[:, None])

    def read_keyboard(self, carry, past, given):
        """`KeyboardAttention.read` of (window, pattern), as the output of a scan."""
        return carry, self.actions.read_keyboard(*given, past.keyboard)


def stream_layer(params: dict) -> dict:
    """Parameters of a `Block` with one product for queries, keys and values of self-attention."""
    return params | {'attention': merge_projections(params['attention'])}


# --- parameters ------------------------------------------------------------------------------


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    size, frame = cfg.actions, (1, 1, cfg.patch, cfg.patch)
    inputs = [
        jnp.zeros((*frame, cfg.channels)),
        jnp.zeros((1, 1)),
        jnp.zeros((*frame, cfg.cond_channels)),
        jnp.zeros((1, 1, cfg.image_dim)),
    ]
    if size:
        inputs += [
            jnp.zeros((1, 1, size.mouse)) if size.mouse else None,
            jnp.zeros((1, 1, size.keyboard)),
        ]
    return jax.eval_shape(WanTransformer(cfg).init, jax.random.key(0), *inputs)['params']


def count(cfg: Config) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(cfg)))


def init_rules(cfg: Config) -> initializers.InitRules:
    """Rules for initial parameters, before the defaults."""
    return (
        ('*modulation*', initializers.normal(cfg.width**-0.5)),
        ('time_embedding/*/kernel', initializers.normal(0.02)),
    )


# Output layers that start at zero, for training from scratch.
ZERO_INIT = (
    ('out/kernel', initializers.zeros),
    ('*/actions/*/out/kernel', initializers.zeros),
    ('action_embedding/linear_2/kernel', initializers.zeros),
)


def weights(cfg: Config) -> tuple[Row | Prefix | Rename, ...]:
    """Weight table: released state dict <-> parameter tree."""
    rows = [
        *trunk_rows(cfg, 'image'),
        *norm_rows('img_emb.proj.0', 'image_embedding/norm_in', 'i'),
        *linear_rows('img_emb.proj.1', 'image_embedding/linear_1', 'i', 'o'),
        *linear_rows('img_emb.proj.3', 'image_embedding/linear_2', 'i', 'd'),
        *norm_rows('img_emb.proj.4', 'image_embedding/norm_out', 'd'),
    ]
    if cfg.actions and cfg.actions.modulate:  # not in released networks
        for name in ('linear_1', 'linear_2'):
            rows += linear_rows(f'action_embedding.{name}', f'action_embedding/{name}', 'i', 'o')
    return (*rows, *diffusers_names())
