"""The Matrix (arXiv 2412.03568): CogVideoX DiT + control blocks, streamed by Swin-DPM.

    prompt --T5--> text         control prompts --CLIP--> table of nine vectors and the null one
    start clip --VAE--> window  window + keys --Swin-DPM shift--> clean latents --VAE--> frames

The same class runs the released checkpoints (480x720) and the bundled worlds (a few MB): a folder
in the released layout decides all sizes. Bundled folders also hold `control_encoder/` and
`control_tokenizer/`, which the released ones leave to `openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import driving
from matrix_jax.diffusion import sampling, schedules
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5, tokenizers
from matrix_jax.nn import initializers, precompute
from matrix_jax.stream import base as streams
from matrix_jax.stream import swin
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion, diffusers_layout
from matrix_jax.worlds.base import BaseWorld, Component, check_frames, read_parts


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

    def __post_init__(self):
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
    """Pure functions of parameters around `Config`; nothing here holds weights."""

    components = (
        Component(
            'dit',
            'transformer',
            dit.weights,
            dit.shapes,
            still=(
                ('*norm?/linear/*', initializers.zeros),
                ('modulation_out/*', initializers.zeros),
                ('out/*', initializers.zeros),
            ),
        ),
        Component('vae', 'vae', vae.weights, vae.shapes, lambda cfg: vae.LAWS),
        # Logits of T5 are not scaled by 1/sqrt(E); its queries start smaller instead.
        Component(
            'text',
            'text_encoder',
            t5.weights,
            t5.shapes,
            lambda cfg: (
                ('embedding', initializers.normal(1.0)),
                ('relative_bias', initializers.normal(cfg.dim**-0.5)),
                ('layers/q/kernel', initializers.xavier(1 / cfg.head_dim)),
            ),
        ),
        Component(
            'control',
            'control_encoder',
            clip.weights,
            clip.shapes,
            lambda cfg: (
                ('token_embedding', initializers.normal(0.02)),
                ('position_embedding', initializers.normal(0.01)),
            ),
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

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.schedule = schedules.make(cfg.scheduler)
        self.net = dit.DiT(cfg.dit)
        self.decode_chunk = cfg.decode_chunk
        self.tokenizer = self.control_tokenizer = None

    # --- what a video needs ------------------------------------------------------------------

    @property
    def endless(self) -> bool:
        """Whether the world makes endless videos: networks without controls make whole clips."""
        return super().endless and self.cfg.dit.control is not None

    @property
    def start_frames(self) -> int:
        """Pixel frames of a start clip; 0 for networks that start from the prompt alone."""
        cfg = self.cfg
        return 0 if cfg.clip else 1 + (cfg.stream.frames - 1) * cfg.frames_per_control

    def fit(self, frames) -> np.ndarray:
        """uint8 [F H W 3] of any size -> the world's size."""
        return video.fit(frames, self.cfg.height, self.cfg.width)

    @property
    def longest(self) -> int | None:
        """Seconds of the longest video; None for a stream."""
        return self.cfg.clip and self.cfg.clip.longest

    def needed(self, length: int) -> int:
        """Symbols of a video of at least that many seconds."""
        cfg = self.cfg
        if cfg.clip is None:
            return self.whole(math.ceil(length * cfg.fps / cfg.frames_per_control))
        if length > self.longest:
            raise UsageError(
                f'--length: got {length}, expected at most {self.longest}: '
                'this model denoises whole clips (stages 3 and 4 stream)'
            )
        return 1 + length * cfg.fps // cfg.frames_per_control

    def whole(self, count: int) -> int:
        """Symbols of the shortest video that has at least `count` of them: whole groups of a
        stream, whole seconds of a clip."""
        cfg = self.cfg
        if cfg.clip:
            return self.needed(max(1, math.ceil((count - 1) * cfg.frames_per_control / cfg.fps)))
        return math.ceil(count / cfg.stream.group_frames) * cfg.stream.group_frames

    def split(self, symbols: list[str]):
        """Symbols of a whole video -> (those of the first window, those of each step)."""
        return swin.video_controls(self.cfg.stream, symbols)

    def inputs(self, prompt: str, frames, symbols: list[str] | None = None):
        """What `condition`, or for whole clips `sample_clip`, takes of a prompt, a start clip uint8
        [F H W 3] and the first symbols or all -> (inputs, the prompt's unread end)."""
        symbols = symbols or ['D'] * self.cfg.stream.remembered  # nobody has steered yet
        ids, cut = self.tokenize_and_cut([prompt])
        ids, indices = np.asarray(ids, np.int32), driving.encode(symbols)[None]
        return (ids, indices) if self.cfg.clip else (ids, np.asarray(frames)[None], indices), cut[0]

    # --- text and control --------------------------------------------------------------------

    def with_tokenizers(self, folder: str | None):
        """Reads the tokenizers of a weights folder; None = byte tokenizers, as bundled worlds have."""
        if folder is None:
            self.tokenizer, self.control_tokenizer = tokenizers.byte_pair()
        else:
            self.tokenizer = tokenizers.load(Path(folder) / 'tokenizer')
            self.control_tokenizer = None
            if self.cfg.dit.control:
                self.control_tokenizer = tokenizers.load(
                    Path(*self.locate(folder, 'control_tokenizer'))
                )
        return self

    def locate(self, folder, name):
        """Control prompts are encoded by `cfg.control_weights` where the folder does not do it."""
        if name.startswith('control_') and not (Path(folder) / name).is_dir():
            return str(diffusers_layout.resolve(self.cfg.control_weights)), ''
        return super().locate(folder, name)

    def external_parts(self, folder):
        """Released folders leave the encoder of control prompts to `cfg.control_weights`."""
        names = ('control_encoder', 'control_tokenizer')
        return () if any((Path(folder) / name).is_dir() for name in names) else names

    def can_load(self, folder, name):
        """A network without control needs no encoder of control prompts."""
        return super().can_load(folder, name) or (
            self.cfg.dit.control is not None and name in self.external_parts(folder)
        )

    def with_new_layers(self, cfg):
        """A base model without control blocks gets those of `cfg`."""
        if cfg.dit.control is None or self.cfg.dit.control:
            return self
        return self.replace(dit=dataclasses.replace(self.cfg.dit, control=cfg.dit.control))

    def add_params(self, params, narrow, seed):
        """Control blocks that `narrow` lacks start as the identity."""
        if self.cfg.dit == narrow.cfg.dit:
            return params
        name, table = 'transformer', dit.weights(self.cfg.dit)
        tensors = conversion.to_torch(dit.weights(narrow.cfg.dit), params[name])
        base = conversion.to_jax([row for row in table if 'control' not in row.torch], tensors)
        added = self.init(seed, only=(name,), paths='*control*')[name]
        both = conversion.flatten(base) | conversion.flatten(added)
        return params | {name: conversion.unflatten(both)}

    def replace(self, **fields):
        world = super().replace(**fields)
        world.tokenizer, world.control_tokenizer = self.tokenizer, self.control_tokenizer
        return world

    def tokenize(self, prompts) -> np.ndarray:
        """Prompts -> int32 ids [B L]; the model's text length, cut or padded."""
        return self.tokenize_and_cut(prompts)[0]

    def tokenize_and_cut(self, prompts):
        """Prompts -> (ids [B L], the text of each prompt that did not fit)."""
        return tokenizers.encode(self.tokenizer, list(prompts), self.cfg.dit.text_length)

    @functools.cached_property
    def empty_ids(self) -> np.ndarray:
        """Ids [1 L] of the empty prompt."""
        return self.tokenize([''])

    @functools.cached_property
    def control_ids(self) -> np.ndarray:
        """Ids of the nine control prompts and, last, of the empty one (the null control)."""
        prompts = [driving.PROMPTS[symbol] for symbol in driving.SYMBOLS] + ['']
        return tokenizers.encode(self.control_tokenizer, prompts, None)[0]

    def embed_ids(self, params, ids):
        """Ids [B L] -> text [B L D]; as the network's tokens where `params` are precomputed."""
        text = t5.T5Encoder(self.cfg.text).apply({'params': params['text_encoder']}, ids)
        return self.as_tokens(params, text)

    def as_tokens(self, params, text):
        """Encoded text [B L D] as `denoise` takes it with these parameters."""
        if precompute.COLLECTION not in params:
            return text
        return dit.embed_text(self.cfg.dit, params['transformer'], text)

    def embed_controls(self, params):
        """Control table [10 A]: the nine controls in vocabulary order, then null."""
        return clip.TextTower(self.cfg.control).apply(
            {'params': params['control_encoder']}, self.control_ids
        )

    # --- the stream --------------------------------------------------------------------------

    def denoise(self, params, x, level, text, control):
        """v-prediction [B T H W C] of noisy latents at levels [B T].

        Where `params` are precomputed, levels are those of the stream, and controls are symbols.
        """
        net = {'params': params['transformer']}
        if precompute.COLLECTION not in params:
            return self.net.apply(net, x, text, level, control)
        step = jnp.argmax((self.levels == level[:1]).all(axis=1))
        net[precompute.COLLECTION] = jax.tree.map(
            lambda leaf: leaf[step], params[precompute.COLLECTION]
        )
        return dit.DiT(self.cfg.dit, ready=True).apply(net, x, text, level, symbols=control)

    @property
    def levels(self) -> np.ndarray:
        """Noise levels of the calls of a shift, int32 [calls T]."""
        return swin.shift_table(self.cfg.stream, self.cfg.scheduler).levels

    def precompute(self, params, table=None):
        """Parameters for streaming, with a part for what no step changes, made once.

        The part holds all that the levels of the stream modulate with, and the keys and values of
        the controls; and `embed_ids` then gives text as the network's tokens. Networks whose
        controls modulate, and those that do not stream, stay as they are.

        Args:
          params: parameters.
          table: control vectors [symbols+1 A]; encoded anew by default.
        """
        control = self.cfg.dit.control
        if self.cfg.clip is not None or control is None or control.modulate:
            return params

        @jax.jit
        def make(params, table):
            table = self.embed_controls(params) if table is None else table
            net = params['transformer']
            return jax.lax.map(
                lambda level: dit.make_once(self.cfg.dit, net, level, table),
                jnp.asarray(self.levels),
            )

        needed = {
            name: params[name] for name in ('transformer', 'control_encoder') if name in params
        }
        return params | {precompute.COLLECTION: make(needed, table)}

    def precompute_for(self, params, cond):
        params = self.precompute(params, cond.control_table)
        if precompute.COLLECTION in params:
            cond = dataclasses.replace(
                cond,
                text=self.as_tokens(params, cond.text),
                null_text=self.as_tokens(params, cond.null_text),
                control_table=self.control_table(params),
            )
        return params, cond

    def latents(self, *, control_binding: str | None = None) -> streams.Stream:
        """The stream before its decoder: keys in, latents [B T H W C] out; see `stream`."""
        cfg = self.cfg.stream
        return swin.make(
            cfg.with_control_binding(control_binding or cfg.control_binding),
            self.cfg.scheduler,
            self.denoise,
        )

    def stream(self, control_binding: str | None = None) -> streams.Stream:
        """Keys in, uint8 frames out: one Swin-DPM shift and its decoding, one program.

        The decoder starts on the condition frames, so the first frame shown continues the start
        clip and every shift is the same program.

        Args:
          control_binding: where keys bind, 'late' or 'early'; the recipe's choice by default.
        """
        return streams.chain(**self.stages(control_binding))

    def stages(self, control_binding: str | None = None) -> dict:
        """What `stream` is made of: `stream` of latents, `decoder`, and `decoder_seed`, condition ->
        latents that the decoder starts on."""
        context = self.cfg.stream.context
        return {
            'stream': self.latents(control_binding=control_binding),
            'decoder': self.decoder(),
            'decoder_seed': lambda cond: cond.latents[:, :context],
        }

    def sample_clip(self, params, ids, symbols, key):
        """A whole clip from nothing: -> frames uint8 [B F H W 3].

        Args:
          params: parameters.
          ids: prompt ids [B L].
          symbols: int32 [B T], one control per latent frame; F = 4T - 3 for odd T.
          key: of all noise.
        """
        cfg, batch = self.cfg, len(ids)
        scale = cfg.vae.spatial_compression
        shape = (
            batch,
            symbols.shape[1],
            cfg.height // scale,
            cfg.width // scale,
            cfg.vae.latent_channels,
        )

        def draw(index):
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

    def condition(self, params, ids, frames, symbols) -> swin.Cond:
        """What a stream starts from.

        Args:
          params: parameters.
          ids: prompt ids [B L].
          frames: start clip uint8 [B F H W 3], F = 1 + 4k.
          symbols: int32 [B T], controls of the first window but its newest group.
        """
        return swin.Cond(
            latents=self.encode_frames(params, frames),
            text=self.embed_ids(params, ids),
            null_text=self.embed_ids(params, self.empty_ids),
            control_table=self.control_table(params),
            controls=jnp.asarray(symbols, jnp.int32),
        )

    def control_table(self, params):
        """What a stream looks symbols up in: their vectors, or where `params` are precomputed, which
        know those, the symbols themselves."""
        if precompute.COLLECTION in params:
            return jnp.arange(len(driving.SYMBOLS) + 1)
        return self.embed_controls(params)

    # --- folders -----------------------------------------------------------------------------

    def write_extra(self, name, folder):
        if name == 'scheduler':
            diffusers_layout.write_json(
                folder, 'scheduler_config.json', self.cfg.scheduler.to_released()
            )
        elif name == 'tokenizer':
            tokenizers.write_byte_tokenizer(folder)
        else:
            tokenizers.write_clip_byte_tokenizer(folder)


def read_folder(cfg: Config, folder: str, whole: bool = False) -> Config:
    """The world that a weights folder describes (`read_parts`); the rest comes from `cfg`.

    Args:
      cfg: the recipe's world.
      folder: in the released layout.
      whole: whether every part is to be loaded; else the parts that are not there are the recipe's.
    """
    fields = read_parts(
        World(cfg),
        folder,
        whole,
        {
            'dit': ('dtype', 'remat', 'scan_unroll', 'int8', 'exchange'),
            'vae': ('dtype', 'single_latent_frames'),
        },
    )
    if whole or (Path(folder) / 'scheduler').is_dir():
        released = diffusers_layout.read_json(folder, 'scheduler', 'scheduler_config.json')
        fields['scheduler'] = schedules.SchedulerConfig.from_released(released)
    return dataclasses.replace(cfg, **fields)
