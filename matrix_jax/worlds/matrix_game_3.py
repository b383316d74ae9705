"""Matrix-Game 3.0: a Wan 2.2 DiT of 5B with a memory of earlier frames, retrieved by camera.

    prompt --UMT5--> text      picture --VAE--> first latent frame
    actions -> cameras         cameras --overlap--> memory frames
    noise + memory + last frames + rays + actions + text --DiT--> segment --VAE--> frames

A stream makes segments: 57 frames, then 40 more per step. The distilled network makes a segment in
three solver steps, the base network in 50 with guidance. The decoder may be a light one with fewer
channels, in a folder of its own; the full autoencoder encodes the start picture.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.dit import wan_memory as dit
from matrix_jax.encoders import t5, tokenizers
from matrix_jax.stream import memory
from matrix_jax.stream.base import PyTree, Stream, StreamDecoder
from matrix_jax.vae import condition as start
from matrix_jax.vae import wan as vae
from matrix_jax.weights import conversion, diffusers_layout
from matrix_jax.worlds.base import BaseWorld, check_frames
from matrix_jax.worlds.networks import Component, Params, fewer_layers

Array = np.ndarray[Any, Any]

LOG = logging.getLogger(__name__)
# Folders of the published weights; ours are called 'transformer' and 'tokenizer'.
PUBLISHED = {'base': 'base_model', 'distilled': 'base_distilled_model'}
TOKENIZER = 'google/umt5-xxl'
VaeConfig = vae.Config
LIGHT = vae.PRESETS['light_v2']
NEGATIVE = (
    'Vibrant colors, overexposure, static, blurred details, subtitles, style, artwork, painting, '
    'still image, overall grayness, worst quality, low quality, JPEG compression residue, ugly, '
    'mutilated, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, '
    'malformed limbs, fused fingers, still image, cluttered background, three legs, crowded '
    'background, walking backwards'
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A Matrix-Game 3 world.

    Attributes:
      name: `_class_name` of model_index.json.
      dit, vae, text: configs of the networks; a weights folder overrides their sizes.
      light: autoencoder whose decoder streams, in the folder `vae_decoder`; None = that of `vae`.
      stream: segments, memory and solver.
      height, width: pixels of a frame.
      fps: frames per second of a video.
      prompt: the default prompt.
      negative_prompt: the prompt that guidance moves away from.
      mirror: whether a mirrored clip with mirrored actions is a valid training example.

    Raises:
      ValueError: networks, autoencoders and stream do not fit each other.
    """

    dit: dit.Config = dit.PRESETS['5b']
    vae: vae.Config = vae.PRESETS['wan_2_2']
    light: VaeConfig | None = LIGHT
    text: t5.Config = t5.PRESETS['umt5_xxl']
    stream: memory.Config = memory.Config()
    height: int = 704
    width: int = 1280
    fps: int = 17
    prompt: str = 'A view of a large open world, seen by someone who walks through it.'
    negative_prompt: str = NEGATIVE
    mirror: bool = True
    name: str = 'MatrixGame3'

    def __post_init__(self) -> None:
        net, keys = self.dit, KeyboardMouseVocabulary('matrix_game_3').mode.keys
        size = net.actions
        if size is None or (size.keyboard, size.mouse) != (len(keys), 2):
            got = size and (size.keyboard, size.mouse)
            raise ValueError(
                f'world.dit.actions: got {got} keys and mouse entries, expected ({len(keys)}, 2)'
            )
        if not net.memory:
            raise ValueError('world.dit.memory: got False, expected True in a world that streams')
        check_frames(self)
        rays = 6 * self.vae.spatial_compression**2
        if net.camera_channels != rays:
            raise ValueError(
                f'world.dit.camera_channels: got {net.camera_channels}, expected '
                f'{rays}, the ray map of a latent pixel'
            )
        channels = {
            net.in_channels,
            net.channels,
            self.vae.latent_channels,
            (self.light or self.vae).latent_channels,
        }
        if len(channels) > 1:
            raise ValueError(
                f'world.dit.channels: got {sorted(channels)} channels of latents in '
                'network and autoencoders, expected one number'
            )
        if net.text_dim != self.text.dim:
            raise ValueError(
                f'world.dit.text_dim: got {net.text_dim}, expected {self.text.dim} '
                'of the text encoder'
            )
        ratios = {self.vae.temporal_compression, size.ratio, self.stream.ratio}
        if len(ratios) > 1:
            raise ValueError(
                f'world.stream.ratio: got {self.stream.ratio}, expected '
                f'{self.vae.temporal_compression} of the VAE and {size.ratio} of the '
                'network'
            )

    clip: ClassVar[None] = None  # the world streams

    @property
    def kind(self) -> str:
        """'base' or 'distilled', which needs no guidance."""
        return 'base' if self.stream.guidance > 1 else 'distilled'


class World(BaseWorld):
    """Pure functions of parameters around `Config`."""

    autoencoder = vae
    vocabulary = KeyboardMouseVocabulary('matrix_game_3')
    reads_text = True
    extras = ('tokenizer',)
    single_mesh = True  # the first segment is another program than the others
    roofline = 'wan_memory'
    tokenizer: Any = None

    @property
    def components(self) -> tuple[Component, ...]:  # type: ignore[override]
        """Network, autoencoder, text encoder, and the light decoder if there is one."""
        return _components(self.cfg.light is not None)

    def replace(self, **fields: Any) -> World:
        world = super().replace(**fields)
        world.tokenizer = self.tokenizer
        return world

    # --- text ------------------------------------------------------------------------------------

    def with_tokenizers(self, folder: str | Path | None) -> World:
        """Returns the world with the tokenizer of a weights folder; None = a byte tokenizer."""
        world = self.replace()
        if folder is None:
            world.tokenizer = tokenizers.byte_pair()[0]
        else:
            world.tokenizer = tokenizers.load(Path(*self.locate(folder, 'tokenizer')))
        return world

    def tokenize_and_cut(self, prompts: Any) -> tuple[Any, tuple[str, ...]]:
        """Prompts -> (int32 ids [B L], padded with 0, the unread end of each prompt)."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        read: tuple[Any, tuple[str, ...]] = tokenizers.encode(
            self.tokenizer, cleaned, self.cfg.dit.text_length
        )
        return read

    def embed_ids(self, params: Params, ids: Any) -> jax.Array:
        """Ids [B L] -> text features [B L D], zeros after the end of each prompt."""
        ids = jnp.asarray(ids)
        encoder = t5.T5Encoder(self.cfg.text)
        text: Any = encoder.apply({'params': params['text_encoder']}, ids, ids != 0)
        return jnp.where((ids != 0)[..., None], text, 0)

    # --- what a video needs ----------------------------------------------------------------------

    @property
    def first_step_controls(self) -> int:
        """Actions of the first segment, which is longer than the others."""
        return self.cfg.stream.first_actions

    def fit(self, frames: Array) -> Array:
        """Returns uint8 frames [F H W 3] of any size in the size of the world, cropped in the
        middle and resized bicubically as in the reference."""
        size = self.cfg.height, self.cfg.width
        return np.stack([start.fit(frame, *size, resample='bicubic') for frame in frames])

    def inputs(
        self, prompt: str, frames: Any, controls: list[str] | None = None
    ) -> tuple[tuple[Any, ...], str]:
        """Returns (inputs of `condition`, the unread end of the prompt). A stream takes no actions
        at its start."""
        ids, cut = self.tokenize_and_cut([prompt])
        return (np.asarray(ids, np.int32), np.asarray(frames)[None]), cut[0]

    # --- pixels and the stream -------------------------------------------------------------------

    @staticmethod
    def to_uint8(frames: jax.Array) -> jax.Array:
        """Frames in [-1, 1] -> uint8, rounded down."""
        return jnp.clip((frames + 1) * 127.5, 0, 255).astype(jnp.uint8)

    @property
    def decoder_vae(self) -> vae.Config:
        """Config of the autoencoder whose decoder streams: the light one, if there is one."""
        return self.cfg.light or self.cfg.vae

    def decoder(self) -> StreamDecoder:
        """Returns the streaming decoder: latents of a step -> uint8 frames."""
        cfg = self.decoder_vae
        name = 'vae_decoder' if self.cfg.light else 'vae'

        def step(params: Params, cache: PyTree, latents: jax.Array) -> tuple[PyTree, jax.Array]:
            cache, frames = vae.step(cfg, params[name], cache, vae.unscaled(cfg, latents))
            return cache, self.to_uint8(frames)

        return StreamDecoder(lambda params, latents: step(params, None, latents), step)

    def condition(self, params: Params, ids: Any, frames: Any) -> memory.Cond:
        """Returns what a stream starts from.

        Args:
          params: parameters.
          ids: prompt ids [B L].
          frames: pictures uint8 [B 1 H W 3].
        """
        text = self.embed_ids(params, ids)
        null_text = text[:1, :1]  # not read without guidance
        if self.cfg.stream.guidance > 1:
            null_text = self.embed_ids(params, self._negative_ids)
        return memory.Cond(self.encode_frames(params, frames), text, null_text)

    @functools.cached_property
    def _negative_ids(self) -> Any:
        return self.tokenize_and_cut([self.cfg.negative_prompt])[0]

    def latents(self, control_binding: str | None = None) -> Stream:
        """Returns the stream of segments: actions in, latents [B T H W C] out.

        Args:
          control_binding: has no effect; actions bind to the segment that takes them.
        """
        cfg = self.cfg
        return memory.make(cfg.stream, network(cfg.dit, cfg.vae.spatial_compression))

    # --- weights folders -------------------------------------------------------------------------

    def described_by(self, folder: str | Path, whole: bool = False) -> World:
        """Also finds out whether the norms of action modules use their weights.

        The config.json says it, or else the weights: the references differ, and only agree if all
        of these weights are one.
        """
        fields = self._read_configs(folder, whole)
        net = fields.get('dit')
        if net is not None and net.actions is not None:
            place = self.locate(folder, 'transformer')
            action_config = diffusers_layout.read_config(*place)['action_config']
            unknown = 'norm_scale' not in action_config
            if unknown and has_norm_scales(diffusers_layout.Tensors(Path(*place))):
                LOG.warning(
                    '%s: norms of the action modules are multiplied by their weights, which '
                    'are not all one',
                    '/'.join(place),
                )
                actions = dataclasses.replace(net.actions, norm_scale=True)
                fields['dit'] = dataclasses.replace(net, actions=actions)
        return self.replace(**fields)

    def locate(self, folder: str | Path, name: str) -> tuple[str, str]:
        """The published folder has both networks and the tokenizer under other names."""
        published = {'transformer': PUBLISHED[self.cfg.kind], 'tokenizer': TOKENIZER}.get(name)
        if published and not (Path(folder) / name).is_dir():
            name = published if (Path(folder) / published).is_dir() else name
        return super().locate(folder, name)

    def has_part(self, folder: str | Path, name: str) -> bool:
        return Path(*self.locate(folder, name)).is_dir()

    def write_extra(self, name: str, folder: str) -> None:
        tokenizers.write_byte_tokenizer(folder, self.cfg.dit.text_length)

    def shortened(self, layers: int | None, text_layers: int | None = None) -> World:
        fields = {}
        if layers is not None:
            fields['dit'] = fewer_layers(self.cfg.dit, layers, 'actions')
        if (text_layers := layers if text_layers is None else text_layers) is not None:
            fields['text'] = dataclasses.replace(self.cfg.text, layers=text_layers)
        return self.replace(**fields)


@functools.cache
def _components(light: bool) -> tuple[Component, ...]:
    """Components of a world with or without a light decoder."""

    def autoencoder(field: str, folder: str, half: str | None) -> Component:
        return Component(
            field,
            folder,
            functools.partial(half_weights, half=half),
            functools.partial(half_shapes, half=half),
            lambda cfg: vae.INIT_RULES,
            run_fields=('dtype', 'chunk'),
        )

    transformer = Component(
        'dit',
        'transformer',
        dit.weights,
        dit.shapes,
        dit.init_rules,
        zero_init=dit.ZERO_INIT,
        run_fields=('dtype', 'remat', 'scan_unroll', 'exchange', 'int8', 'int8_truncate'),
    )
    text = Component(
        'text', 'text_encoder', t5.weights, t5.shapes, t5.init_rules, run_fields=('dtype',)
    )
    if not light:
        return transformer, autoencoder('vae', 'vae', None), text
    encoder = autoencoder('vae', 'vae', 'encoder')
    return transformer, encoder, text, autoencoder('light', 'vae_decoder', 'decoder')


def network(cfg: dit.Config, pixels: int) -> memory.MemoryNetwork:
    """Returns the transformer as a stream calls it, with the parameters of a world.

    Args:
      cfg: sizes.
      pixels: pixels of a latent pixel, in height and in width.
    """
    net, sizes = dit.WanMemoryTransformer(cfg), cfg.actions
    assert sizes is not None
    keys, mouse_width = sizes.keyboard or 0, sizes.mouse or 0

    def denoise(params: Params, x: Any, level: Any, segment: memory.Segment) -> jax.Array:
        count, frames = segment.memory.shape[1], x.shape[1]

        def windows(actions: Any, unknown: float) -> jax.Array:
            of_memory = jnp.full((len(x), count, actions.shape[-1]), unknown)
            return dit.frame_windows(sizes, actions, frames, of_memory)

        keyboard = windows(segment.actions[..., :keys], memory.NO_KEY) if keys else None
        mouse = windows(segment.actions[..., keys:], memory.NO_MOUSE) if mouse_width else None
        v: Any = net.apply(
            {'params': params['transformer']},
            jnp.concatenate([segment.memory, x], axis=1),
            jnp.pad(level, ((0, 0), (count, 0))),
            segment.text,
            segment.positions,
            segment.rays,
            mouse,
            keyboard,
            count,
        )
        return v

    return memory.MemoryNetwork(denoise, keys, mouse_width, pixels)


def clean_prompt(prompt: str) -> str:
    """Returns a prompt without HTML entities and with single spaces, as in training."""
    return re.sub(r'\s+', ' ', html.unescape(html.unescape(prompt))).strip()


def half_weights(cfg: vae.Config, half: str | None) -> conversion.Table:
    """Returns the weight table of an autoencoder, or of its 'encoder' or 'decoder' alone."""
    table: conversion.Table = vae.weights(cfg)
    if half is None:
        return table
    return tuple(
        conversion.Drop(row.torch, why=f'only the {half} is used')
        if isinstance(row, conversion.Row) and row.path.split('/')[0] != half
        else row
        for row in table
    )


def half_shapes(cfg: vae.Config, half: str | None) -> Params:
    """Returns parameter shapes of an autoencoder, or of its 'encoder' or 'decoder' alone."""
    shapes: Params = vae.shapes(cfg)
    return shapes if half is None else {half: shapes[half]}


def has_norm_scales(tensors: Mapping[str, Any]) -> bool:
    """Returns whether any weight of the query and key norms of action modules is not one."""
    norm = re.compile(r'action_model\.(img|key)_attn_[qk]_norm\.weight$')
    return any(
        bool(np.any(np.asarray(tensors[name], np.float32) != 1))
        for name in tensors
        if norm.search(name)
    )
