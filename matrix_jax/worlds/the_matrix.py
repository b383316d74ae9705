"""The Matrix (arXiv 2412.03568): a CogVideoX transformer with control blocks, on Swin-DPM.

    prompt --T5--> text         control prompts --CLIP--> table of nine vectors and the null one
    start clip --VAE--> window  window + keys --Swin-DPM shift--> clean latents --VAE--> frames

The same class runs the released checkpoints (480x720) and the bundled worlds (a few MB): the
weights folder decides all sizes. Bundled folders also hold `control_encoder/` and
`control_tokenizer/`; the released ones leave these to `openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import driving
from matrix_jax.diffusion import sampling, schedules
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5, tokenizers
from matrix_jax.stream import swin
from matrix_jax.stream.base import Stream
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion, diffusers_layout, schema, stored_programs
from matrix_jax.worlds.base import BaseWorld, check_frames
from matrix_jax.worlds.layer_counts import fewer_layers, fewer_text_layers
from matrix_jax.worlds.networks import Component, Params
from matrix_jax.worlds.weights_folders import WRONG_VALUES, read_config

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """A Matrix-type world.

    Attributes:
      name: `_class_name` of model_index.json.
      dit, vae, text, control, scheduler: configs of the parts; a weights folder overrides them.
      stream: the Swin-DPM stream.
      clip: how whole clips are denoised, for networks of stages 1 and 2; None = the world streams.
      height, width: pixels of a frame.
      fps: frames per second.
      decode_chunk: latent frames per streaming decode; 2 equals whole-clip decoding.
      mirror: whether a mirrored clip with mirrored keys is a valid example.
      prompt: default prompt.
      control_weights: where control prompts are encoded if the folder has no `control_encoder`.
    """

    dit: dit.Config = dit.PRESETS['2b_control']
    vae: vae.Config = vae.PRESETS['released']
    text: t5.Config = t5.PRESETS['v1_1_xxl']
    control: clip.Config = clip.PRESETS['vit_l_14']
    scheduler: schedules.SchedulerConfig = schedules.SchedulerConfig()
    stream: swin.Config = swin.Config()
    clip: sampling.Config | None = None
    height: int = 480
    width: int = 720
    fps: int = 16
    decode_chunk: int = 2
    mirror: bool = True
    prompt: str = 'A car drives along a road.'
    control_weights: str = 'openai/clip-vit-large-patch14'
    name: str = 'TheMatrix'

    def __post_init__(self) -> None:
        check_frames(self)
        if self.decode_chunk not in (1, 2) or self.stream.group_frames % self.decode_chunk:
            raise ValueError(
                f'world.decode_chunk: got {self.decode_chunk}, expected 1, or 2 with '
                f'an even stream.group_frames (got {self.stream.group_frames})'
            )

    @property
    def frames_per_control(self) -> int:
        """Pixel frames of one latent frame, which is what one control symbol steers."""
        return self.vae.temporal_compression


class World(BaseWorld):
    """Pure functions of parameters around `Config`."""

    components = (
        Component(
            'dit',
            'transformer',
            dit.weights,
            dit.shapes,
            zero_init=dit.ZERO_INIT,
            run_fields=('dtype', 'remat', 'scan_unroll', 'int8', 'exchange'),
        ),
        Component(
            'vae',
            'vae',
            vae.weights,
            vae.shapes,
            lambda cfg: vae.INIT_RULES,
            run_fields=('dtype', 'single_latent_frames'),
        ),
        Component('text', 'text_encoder', t5.weights, t5.shapes, t5.init_rules),
        Component(
            'control', 'control_encoder', clip.weights, clip.shapes, lambda cfg: clip.INIT_RULES
        ),
    )
    extras = ('tokenizer', 'control_tokenizer', 'scheduler')
    vocabulary = driving.DrivingVocabulary()
    reads_text = True
    autoencoder = vae
    prediction = 'v_prediction'
    evaluator = 'carracing'
    roofline = 'cogvideox'
    has_int8_layers = True
    has_torch_baseline = True

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.schedule = schedules.make(cfg.scheduler)
        self.net = dit.CogVideoXTransformer(cfg.dit)
        self.decode_chunk = cfg.decode_chunk
        self.tokenizer: Any = None
        self.control_tokenizer: Any = None

    def replace(self, **fields: Any) -> World:
        world = super().replace(**fields)
        world.tokenizer, world.control_tokenizer = self.tokenizer, self.control_tokenizer
        return world

    # --- what a video needs ----------------------------------------------------------------------

    @property
    def endless(self) -> bool:
        """Whether the world streams; networks without controls make whole clips."""
        return super().endless and self.cfg.dit.control is not None

    @property
    def start_frames(self) -> int:
        """Pixel frames of the start clip; 0 for whole clips, which start from the prompt alone."""
        cfg = self.cfg
        return 0 if cfg.clip else 1 + (cfg.stream.frames - 1) * cfg.frames_per_control

    @property
    def max_seconds(self) -> int | None:
        return self.cfg.clip and self.cfg.clip.longest

    def round_up_controls(self, count: int) -> int:
        """Returns the symbols of the shortest video with at least `count`: whole steps of a stream,
        whole seconds of a clip."""
        cfg = self.cfg
        if not cfg.clip:
            return super().round_up_controls(count)
        seconds = max(1, math.ceil((count - 1) * cfg.frames_per_control / cfg.fps))
        if seconds > cfg.clip.longest:
            raise UsageError(
                f'--control: got {count} symbols, expected at most '
                f'{1 + cfg.clip.longest * cfg.fps // cfg.frames_per_control}: '
                'this model makes whole clips and does not stream'
            )
        return 1 + seconds * cfg.fps // cfg.frames_per_control

    def split_controls(self, controls: list[str]) -> tuple[list[str], list[list[str]]]:
        """Symbols of a whole video -> (those of the first window, those of each step)."""
        return swin.video_controls(self.cfg.stream, controls)

    def fit(self, frames: Array) -> Array:
        """Returns uint8 frames [F H W 3] of any size in the size of the world."""
        return video.fit(frames, self.cfg.height, self.cfg.width)

    def inputs(
        self, prompt: str, frames: Any, controls: list[str] | None = None
    ) -> tuple[tuple[Any, ...], str]:
        """Returns (inputs of `condition`, or of `sample_clip` for whole clips; the unread end of
        the prompt). Before any key is pressed, the car drives straight ahead."""
        controls = controls or ['D'] * self.cfg.stream.known_controls
        ids, cut = self.tokenize_and_cut([prompt])
        ids, symbols = np.asarray(ids, np.int32), driving.encode(controls)[None]
        return (ids, symbols) if self.cfg.clip else (ids, np.asarray(frames)[None], symbols), cut[0]

    # --- text and controls -----------------------------------------------------------------------

    def with_tokenizers(self, folder: str | Path | None) -> World:
        """Reads the tokenizers of a weights folder; None = byte tokenizers, for bundled worlds."""
        if folder is None:
            self.tokenizer, self.control_tokenizer = tokenizers.byte_pair()
        else:
            self.tokenizer = tokenizers.load(Path(folder) / 'tokenizer')
            self.control_tokenizer = None
            if self.cfg.dit.control:
                place = Path(*self.locate(folder, 'control_tokenizer'))
                # Stored programs hold the ids of the control prompts.
                late = stored_programs.present(folder)
                self.control_tokenizer = tokenizers.load(place, late)
        return self

    def tokenize(self, prompts: Iterable[str]) -> Array:
        """Prompts -> int32 ids [B L], cut or padded to the text length of the network."""
        return self.tokenize_and_cut(prompts)[0]

    def tokenize_and_cut(self, prompts: Iterable[str]) -> tuple[Array, tuple[str, ...]]:
        """Prompts -> (ids [B L], the end of each prompt that did not fit)."""
        return tokenizers.encode(self.tokenizer, list(prompts), self.cfg.dit.text_length)

    @functools.cached_property
    def empty_ids(self) -> Array:
        """Ids [1 L] of the empty prompt."""
        return self.tokenize([''])

    @functools.cached_property
    def control_ids(self) -> Array:
        """Ids of the nine control prompts and, last, of the empty one (the null control)."""
        prompts = [driving.PROMPTS[symbol] for symbol in driving.SYMBOLS] + ['']
        return tokenizers.encode(self.control_tokenizer, prompts, None)[0]

    def embed_ids(self, params: Params, ids: Any) -> Any:
        """Ids [B L] -> text [B L D]."""
        return t5.T5Encoder(self.cfg.text).apply({'params': params['text_encoder']}, ids)

    def embed_controls(self, params: Params) -> Any:
        """Returns the control table [10 A]: the nine controls, then the null control."""
        return clip.TextTower(self.cfg.control).apply(
            {'params': params['control_encoder']}, self.control_ids
        )

    # --- the stream ------------------------------------------------------------------------------

    def condition(self, params: Params, ids: Any, frames: Any, symbols: Any) -> swin.Cond:
        """Returns what a stream starts from.

        Args:
          params: parameters.
          ids: prompt ids [B L].
          frames: start clip uint8 [B F H W 3], F = 1 + 4k.
          symbols: int32 [B R], controls of the first window without its noisiest group.
        """
        return swin.Cond(
            latents=self.encode_frames(params, frames),
            text=self.embed_ids(params, ids),
            null_text=self.embed_ids(params, self.empty_ids),
            control_table=self.embed_controls(params),
            controls=jnp.asarray(symbols, jnp.int32),
        )

    def denoise(self, params: Params, x: Any, level: Any, text: Any, control: Any) -> Any:
        """v-prediction [B T H W C] of noisy latents at levels [B T]."""
        return self.net.apply({'params': params['transformer']}, x, text, level, control)

    def first_prediction(self, params: Params, carry: swin.Carry, control: jax.Array) -> jax.Array:
        """Of the whole window, as if the first control of the step were held throughout."""
        held = jnp.broadcast_to(control[:, :1], carry.window.shape[:2])
        level = jnp.broadcast_to(self.levels[0], carry.window.shape[:2])
        v: jax.Array = self.denoise(
            params, carry.window, level, carry.text, carry.control_table[held]
        )
        return v

    @property
    def levels(self) -> Array:
        """Noise levels of the solver steps of a shift, int32 [inner T]."""
        return swin.shift_table(self.cfg.stream, self.cfg.scheduler).levels

    def latents(self, control_binding: str | None = None) -> Stream:
        """Returns the Swin-DPM stream: symbols in, latents out; binding is 'late' or 'early'."""
        cfg = self.cfg.stream
        if control_binding:
            cfg = cfg.with_control_binding(control_binding)
        return swin.make(cfg, self.cfg.scheduler, self.denoise)

    def decoder_seed(self, cond: swin.Cond) -> jax.Array:
        """The decoder starts on the condition frames: the first frame shown continues the start
        clip, and every step is the same program."""
        return cond.latents[:, : self.cfg.stream.context]

    def sample_clip(self, params: Params, ids: Any, symbols: Any, key: jax.Array) -> jax.Array:
        """Returns a whole clip from the prompt alone, frames uint8 [B F H W 3].

        Args:
          params: parameters.
          ids: prompt ids [B L].
          symbols: int32 [B T], one control per latent frame; F = 4T - 3 for odd T.
          key: key of all noise.
        """
        cfg, batch = self.cfg, len(ids)
        scale = cfg.vae.spatial_compression
        size = cfg.height // scale, cfg.width // scale
        shape = batch, symbols.shape[1], *size, cfg.vae.latent_channels

        def draw(index: Any) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, index + 1), shape)

        control = self.embed_controls(params)[symbols] if cfg.dit.control else None
        null_text = jnp.broadcast_to(
            self.embed_ids(params, self.empty_ids), (batch, cfg.dit.text_length, cfg.dit.text_dim)
        )
        made = sampling.sample(
            cfg.clip,
            cfg.scheduler,
            self.denoise,
            params,
            draw(-1),
            draw,
            self.embed_ids(params, ids),
            null_text,
            control,
        )
        return self.to_uint8(vae.decode(cfg.vae, params['vae'], vae.unscaled(cfg.vae, made)))

    # --- weights folders -------------------------------------------------------------------------

    def needs(self, name: str) -> bool:
        """A network without controls needs no encoder of control prompts."""
        return self.cfg.dit.control is not None or not name.startswith('control_')

    def _read_configs(
        self, folder: str | Path, whole: bool, without: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        parts = ('transformer', 'control_encoder')
        if whole and [self.has_part(folder, name) for name in parts] == [True, False]:
            net = read_config(type(self.cfg.dit), *self.locate(folder, 'transformer'))
            without = without if net.control else ('control_encoder',)
        return super()._read_configs(folder, whole, without)

    def pipeline_index(self, folder: Path, parts: tuple[str, ...]) -> dict[str, Any]:
        """Names the classes of diffusers and transformers, if they have these networks."""
        if self.cfg.dit.control or not self.cfg.vae.in_diffusers:
            return super().pipeline_index(folder, parts)
        config = diffusers_layout.read_json(folder, 'tokenizer', 'tokenizer_config.json')
        classes = {
            'transformer': ('diffusers', 'CogVideoXTransformer3DModel'),
            'vae': ('diffusers', 'AutoencoderKLCogVideoX'),
            'scheduler': ('diffusers', schedules.SOLVERS[self.cfg.scheduler.solver]),
            'text_encoder': ('transformers', 'T5EncoderModel'),
            'tokenizer': ('transformers', config['tokenizer_class']),
        }
        return {
            '_class_name': 'CogVideoXPipeline',
            '_diffusers_version': '0.32.0',
            **{name: list(classes[name]) for name in parts if name in classes},
        }

    def described_by(self, folder: str | Path, whole: bool = False) -> World:
        """Also reads the noise schedule from the folder."""
        fields = self._read_configs(folder, whole)
        if whole or (Path(folder) / 'scheduler').is_dir():
            released = diffusers_layout.read_json(folder, 'scheduler', 'scheduler_config.json')
            try:
                schema.check_values(released)
                fields['scheduler'] = schedules.SchedulerConfig.from_released(released)
            except WRONG_VALUES as error:
                raise diffusers_layout.CheckpointError(
                    f'{folder}/scheduler/scheduler_config.json: {error}'
                ) from error
        return self.replace(**fields)

    def locate(self, folder: str | Path, name: str) -> tuple[str, str]:
        """Control prompts are encoded by `cfg.control_weights` if the folder has no encoder."""
        if name.startswith('control_') and not (Path(folder) / name).is_dir():
            return str(diffusers_layout.resolve(self.cfg.control_weights)), ''
        return super().locate(folder, name)

    def external_parts(self, folder: str | Path) -> tuple[str, ...]:
        """Released folders leave the encoder of control prompts to `cfg.control_weights`."""
        names = ('control_encoder', 'control_tokenizer')
        return () if any((Path(folder) / name).is_dir() for name in names) else names

    def can_load(self, folder: str | Path, name: str) -> bool:
        """A network without controls needs no encoder of control prompts."""
        return super().can_load(folder, name) or (
            self.cfg.dit.control is not None and name in self.external_parts(folder)
        )

    def write_extra(self, name: str, folder: str) -> None:
        if name == 'scheduler':
            diffusers_layout.write_json(
                folder, 'scheduler_config.json', self.cfg.scheduler.to_released()
            )
        elif name == 'tokenizer':
            tokenizers.write_byte_tokenizer(folder)
        else:
            tokenizers.write_clip_byte_tokenizer(folder)

    def shortened(self, layers: int | None, text_layers: int | None = None) -> World:
        cfg, fields = self.cfg, {}
        if layers is not None:
            fields['dit'] = fewer_layers(cfg.dit, layers, 'control')
            count = min(layers, cfg.control.layers)
            fields['control'] = dataclasses.replace(cfg.control, layers=count)
        fields['text'] = fewer_text_layers(cfg.text, layers, text_layers)
        return self.replace(**fields)

    def with_new_layers(self, cfg: Config) -> World:
        """A base model without control blocks gets those of `cfg`."""
        if cfg.dit.control is None or self.cfg.dit.control:
            return self
        return self.replace(dit=dataclasses.replace(self.cfg.dit, control=cfg.dit.control))

    def add_params(self, params: Params, before: World, seed: int) -> Params:
        """New control blocks start as the identity."""
        if self.cfg.dit == before.cfg.dit:
            return params
        name, table = 'transformer', dit.weights(self.cfg.dit)
        tensors = conversion.to_torch(dit.weights(before.cfg.dit), params[name])
        base = conversion.to_jax([row for row in table if 'control' not in row.torch], tensors)
        added = self.init(seed, only=(name,), paths='*control*')[name]
        both = conversion.flatten(base) | conversion.flatten(added)
        return params | {name: conversion.unflatten(both)}
