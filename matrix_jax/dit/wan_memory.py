"""Wan 2.2 DiT with memory frames, camera and actions (Matrix-Game 3.0), or plain.

Wan 2.2 (arXiv 2503.20314) with one expert reads latents, noise levels and text. Matrix-Game 3.0
puts M memory frames in front, each with its own time in the video. A block computes

    x <- x + m2 * attend(norm(x) * (1 + m1) + m0)      m = layer's own + embedded level of the token
    c = P + mlp(P);  x <- (1 + scale(c)) * x + shift(c)     P: tokens of the camera rays
    x <- norm3(x);  x <- x + attend_text(x)
    x <- x + mouse(x);  x <- x + keyboard(x)           layers with actions
    x <- x + m5 * mlp(norm(x) * (1 + m4) + m3)

Without memory and actions, the third line is x <- x + attend_text(norm3(x)). Each head has its own
period of RoPE (`sigma_theta`), so no distance in time looks the same to all heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from matrix_jax.dit.segments import is_separate, scan_layers
from matrix_jax.dit.wan_actions import ActionBlock, frame_windows
from matrix_jax.dit.wan_config import ACTING
from matrix_jax.dit.wan_layers import LevelEmbedding, Projections, standardize
from matrix_jax.dit.wan_memory_config import PRESETS, Config, check
from matrix_jax.dit.wan_memory_rope import rotate, rotation_tables
from matrix_jax.dit.wan_rows import diffusers_names, trunk_rows
from matrix_jax.dit.weight_rows import linear_rows
from matrix_jax.nn import initializers, token_layout
from matrix_jax.nn.kv_cache import Blocks, KVCache, attend_all
from matrix_jax.nn.linear import Linear
from matrix_jax.nn.modulation import LayerNorm, modulate, stored
from matrix_jax.parallel.sharding import constrain
from matrix_jax.weights.conversion import Prefix, Rename, Row

__all__ = [
    'PRESETS',
    'ZERO_INIT',
    'ActionFrames',
    'Config',
    'WanMemoryTransformer',
    'count',
    'frame_windows',
    'init_rules',
    'shapes',
    'weights',
]


@struct.dataclass
class ActionFrames(Blocks):
    """Attention of action modules: memory frames are numbered from 0, and so are the others.

    Attributes:
      memory: memory frames in front.
    """

    memory: int = struct.field(pytree_node=False, default=0)

    def positions(self):
        """Positions of queries and keys, both [M+T]."""
        # PARITY: only the main attention is given the times of memory frames.
        positions = np.append(np.arange(self.memory), np.arange(self.frames - self.memory))
        return positions, positions


@struct.dataclass
class MemoryLayerInputs:
    """Inputs that all layers share.

    Attributes:
      time: modulation [B T n 6 D], n = 1 or the tokens of a frame.
      text: tokens [B L D].
      camera: tokens of ray maps [B T n D], or None.
      mouse, keyboard: windows of actions [B T R*W A], or None.
      pattern, action_pattern: which frames attend to which.
      rotations: RoPE of queries and keys, see `rotate`.
      norm_text: whether text attention is added to the normalised tokens.
    """

    time: Any
    text: Any
    camera: Any
    mouse: Any
    keyboard: Any
    pattern: Blocks
    action_pattern: ActionFrames
    rotations: Any
    norm_text: bool = struct.field(pytree_node=False)


@struct.dataclass
class SegmentRead:
    """What a layer reads of text and camera, the same in all calls on a segment.

    Attributes:
      text: keys and values of the text.
      scale, shift: of the camera [B T n D], or None.
      unread: first frames whose tokens nothing reads after this layer.
    """

    text: KVCache
    scale: Any
    shift: Any
    unread: int = struct.field(pytree_node=False, default=0)

    def without(self, frames: int):
        """The same for a layer after which the first frames are not read."""
        scale, shift = (one if one is None else one[:, frames:] for one in (self.scale, self.shift))
        return dataclasses.replace(self, scale=scale, shift=shift, unread=frames)


class WanMemoryTransformer(nn.Module):
    """The whole network: latents, levels, text, camera and actions -> velocity."""

    cfg: Config

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)

        def linear(features=cfg.width):
            return Linear(features, dtype=dtype)

        self.patch, self.time_embedding = linear(), LevelEmbedding(cfg)
        self.time_projection = linear(6 * cfg.width)
        self.text_1, self.text_2 = linear(), linear()
        if cfg.memory:
            self.camera_patch, self.camera_1, self.camera_2 = linear(), linear(), linear()
        given = self.variables.get('params', {})
        for name, (start, stop) in cfg.segments.items():
            separate = is_separate(given.get(name, ()))
            layers = scan_layers(
                Block,
                cfg,
                stop - start,
                separate,
                __call__=(0, nn.broadcast),
                read_segment=nn.broadcast,
            )
            setattr(self, name, layers(cfg, name.startswith(ACTING)))
        normal = nn.initializers.normal(cfg.width**-0.5)
        self.modulation_out = self.param('modulation_out', normal, (2, cfg.width))
        self.out = linear(cfg.patch**2 * cfg.channels)

    def __call__(
        self,
        latents,
        level,
        text,
        positions,
        camera=None,
        mouse=None,
        keyboard=None,
        memory: int = 0,
    ):
        """Predicts the velocity of a clip.

        Args:
          latents: noisy latents behind M memory frames [B M+T H W C].
          level: noise levels 0 .. 1000: [B], [B M+T], or of each token [B M+T n].
          text: encoded text [B L Dt], zeros after the prompt.
          positions: number of each frame in the video, in latent frames, int [M+T] or [B M+T].
          camera: ray maps [B M+T H W Cc] (`nn.camera.plucker`), or the result of `read_segment`;
            None = no camera terms.
          mouse, keyboard: windows of actions [B M+T R*W A] (`frame_windows`), or None.
          memory: memory frames M.

        Returns:
          v [B T H W C], float32.

        Raises:
          ValueError: a shape does not fit the network.
        """
        cfg, frames = self.cfg, latents.shape[1]
        level, positions = jnp.asarray(level), _to_int32(positions)
        check(cfg, latents, level, text, positions, camera, mouse, keyboard, memory)
        rows, columns = (size // cfg.patch for size in latents.shape[2:4])
        level = level.reshape(level.shape + (1,) * (3 - level.ndim))
        time = self.time_embedding(level if level.shape[2] == 1 else token_layout.pad(level, 2))
        modulation = self.time_projection(jax.nn.silu(time)).astype(jnp.float32)
        read = isinstance(camera, dict)
        inputs = MemoryLayerInputs(
            time=rearrange(modulation, 'b t n (c d) -> b t n c d', c=6),
            text=None if read else self._text(text, len(latents)),
            camera=None if read or camera is None else self._camera(camera),
            mouse=mouse if mouse is None or cfg.actions.gain == 1 else mouse * cfg.actions.gain,
            keyboard=keyboard,
            pattern=Blocks(frames, frames, None, rows * columns, cfg.exchange),
            action_pattern=ActionFrames(frames, frames, memory=memory),
            rotations=rotation_tables(cfg, positions, rows, columns),
            norm_text=cfg.memory or mouse is not None,
        )

        name = list(cfg.segments)[-1]
        if read and not name.startswith(ACTING):  # the last layer; actions read all frames
            *others, last = camera[name]
            camera = camera | {name: (*others, last.without(memory))}
        x = self.patch(token_layout.to_tokens(latents, cfg.patch))
        for name in cfg.segments:
            x = constrain(x, 'batch', None, 'tokens', None)
            x, _ = getattr(self, name)(x, camera[name] if read else None, inputs)

        shift, scale = rearrange(self.modulation_out + time[..., None, :], 'b t n c d -> c b t n d')
        if x.shape[1] < frames:
            shift, scale = shift[:, memory:], scale[:, memory:]
        x = modulate(standardize(x, cfg.eps), shift, scale)
        x = self.out(x[:, x.shape[1] - frames + memory :])
        v = token_layout.from_tokens(x, cfg.patch, rows, columns)
        return v.astype(jnp.float32)

    def read_segment(self, text, camera):
        """Reads text and camera once for all calls on a segment, if the layers are separate.

        Args:
          text, camera: as in `__call__`; with a camera.

        Returns:
          run -> `SegmentRead` of each of its layers.
        """
        given = self._text(text, len(camera)), self._camera(camera)
        runs = {name: getattr(self, name) for name in self.cfg.segments}
        return {name: layers.read_segment(None, given)[1] for name, layers in runs.items()}

    def _text(self, text, batch):
        """Encoded text [1|B L' Dt] -> tokens [B L D]."""
        cfg = self.cfg
        text = jnp.pad(text, ((0, 0), (0, cfg.text_length - text.shape[1]), (0, 0)))
        tokens = self.text_2(jax.nn.gelu(self.text_1(text), approximate=True))
        return jnp.broadcast_to(tokens, (batch, cfg.text_length, cfg.width))

    def _camera(self, camera):
        """Ray maps [B T H W Cc] -> tokens [B T n D]."""
        cfg = self.cfg
        x = rearrange(camera, 'b t (h p) (w q) c -> b t (h w) (c p q)', p=cfg.patch, q=cfg.patch)
        x = token_layout.pad(constrain(x, 'batch', None, None, None), 2)
        x = self.camera_patch(constrain(x, 'batch', None, 'tokens', None))
        return x + self.camera_2(jax.nn.silu(self.camera_1(x)))


class Block(nn.Module):
    """Self-attention and MLP, modulated by the noise level, with camera, text and actions between.

    Attributes:
      cfg: sizes.
      has_actions: whether the layer has an action module.
    """

    cfg: Config
    has_actions: bool

    def setup(self):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        self.modulation = self.param(
            'modulation', nn.initializers.normal(cfg.width**-0.5), (6, cfg.width)
        )
        self.attention, self.text_attention = Projections(cfg), Projections(cfg)
        self.text_norm = LayerNorm(cfg.eps)
        if cfg.memory:
            self.camera_1, self.camera_2, self.camera_scale, self.camera_shift = (
                Linear(cfg.width, dtype=dtype) for _ in range(4)
            )
        if self.has_actions:
            self.actions = ActionBlock(cfg.actions, cfg.width, dtype)
        self.up, self.down = Linear(cfg.mlp, dtype=dtype), Linear(cfg.width, dtype=dtype)

    def __call__(self, x, read: SegmentRead | None, inputs: MemoryLayerInputs):
        """Tokens [B T n D] -> (tokens, None)."""
        dtype, eps = jnp.dtype(self.cfg.dtype), self.cfg.eps
        m = rearrange(self.modulation + inputs.time, 'b t n c d -> c b t n d')
        if read is None:
            read = self.read_segment(None, (inputs.text, inputs.camera))[1]

        y = modulate(standardize(x, eps), m[0], m[1]).astype(dtype)
        new, kept = self.attention.keys(y), slice(read.unread, None)
        q = rotate(self.attention.queries(y[:, kept]), inputs.rotations)
        k = rotate(new.k, inputs.rotations)
        if m.shape[2] > 1:  # else all frames have one level
            m = m[:, :, kept]
        y = self.attention.output(inputs.pattern.attend(q, k, new.v))
        x = stored((x[:, kept] + m[2] * y).astype(dtype))

        if read.scale is not None:
            x = (1 + read.scale) * x + read.shift

        y = self.text_norm(x).astype(dtype)
        queries = self.text_attention.queries(y)
        attended = self.text_attention.output(attend_all(queries, read.text.k, read.text.v))
        # PARITY: with memory or a mouse, the residual stream is the normalised one.
        x = stored((y if inputs.norm_text else x) + attended)

        if self.has_actions and not (inputs.mouse is None and inputs.keyboard is None):
            x, _ = self.actions(x, inputs.mouse, inputs.keyboard, inputs.action_pattern)

        y = self.up(modulate(standardize(x, eps), m[3], m[4]).astype(dtype))
        y = self.down(jax.nn.gelu(y, approximate=True))
        return stored((x + m[5] * y).astype(dtype)), None

    def read_segment(self, carry, given):
        """(text [B L D], tokens of ray maps [B T n D] or None) -> (carry, `SegmentRead`)."""
        text, camera = given
        scale = shift = None
        if camera is not None:
            c = self.camera_2(jax.nn.silu(self.camera_1(camera))) + camera
            scale, shift = self.camera_scale(c), self.camera_shift(c)
        return carry, SegmentRead(self.text_attention.keys(text[:, None]), scale, shift)


def _to_int32(positions):
    """Positions as int32; constant ones [T] stay on the host."""
    if isinstance(positions, np.ndarray) and positions.ndim == 1:
        return positions
    return jnp.asarray(positions, jnp.int32)


# --- parameters ------------------------------------------------------------------------------


def shapes(cfg: Config) -> dict:
    """Parameter tree of ShapeDtypeStructs; nothing is computed."""
    size, frame = cfg.actions, (1, 1, cfg.patch, cfg.patch)
    inputs = [
        jnp.zeros((*frame, cfg.in_channels)),
        jnp.zeros([1]),
        jnp.zeros((1, 1, cfg.text_dim)),
        np.arange(1),
        jnp.zeros((*frame, cfg.camera_channels)) if cfg.memory else None,
    ]
    if size:
        window = size.ratio * size.span
        inputs += [
            jnp.zeros((1, 1, window, size.mouse)) if size.mouse else None,
            jnp.zeros((1, 1, window, size.keyboard)) if size.keyboard else None,
        ]
    return jax.eval_shape(WanMemoryTransformer(cfg).init, jax.random.key(0), *inputs)['params']


def count(cfg: Config) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(cfg)))


def init_rules(cfg: Config) -> initializers.InitRules:
    """Rules for initial parameters, before the defaults."""
    return (
        ('*modulation*', initializers.normal(cfg.width**-0.5)),
        ('time_embedding/*/kernel', initializers.normal(0.02)),
        ('text_?/kernel', initializers.normal(0.02)),
    )


# Output layers that start at zero, for training from scratch.
ZERO_INIT = (
    ('out/kernel', initializers.zeros),
    ('*/actions/*/out/kernel', initializers.zeros),
    ('*/camera_scale/kernel', initializers.zeros),
    ('*/camera_shift/kernel', initializers.zeros),
)


def weights(cfg: Config) -> tuple[Row | Prefix | Rename, ...]:
    """Weight table: released state dict <-> parameter tree.

    Also reads the names of diffusers.
    """
    rows = [
        *trunk_rows(cfg, 'text'),
        *linear_rows('text_embedding.0', 'text_1', 'i', 'o'),
        *linear_rows('text_embedding.2', 'text_2', 'd', 'o'),
    ]
    if cfg.memory:
        rows += linear_rows('patch_embedding_wancamctrl', 'camera_patch', 'i', 'd')
        for part in (1, 2):
            rows += linear_rows(f'c2ws_hidden_states_layer{part}', f'camera_{part}', 'd', 'o')
        for path, layers in cfg.segments.items():
            for theirs, ours in (
                ('injector_layer1', '1'),
                ('injector_layer2', '2'),
                ('scale_layer', 'scale'),
                ('shift_layer', 'shift'),
            ):
                rows += linear_rows(
                    f'blocks.{{i}}.cam_{theirs}', f'{path}/camera_{ours}', 'd', 'o', layers
                )
    return (*rows, *diffusers_names())
