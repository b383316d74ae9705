"""Matrix-Game 3.0: a Wan 2.2 DiT of 5B with a memory of earlier frames, retrieved by camera.

    prompt --UMT5--> text      picture --VAE--> first latent frame
    actions -> cameras         cameras --overlap--> memory frames
    noise + memory + last frames + rays + actions + text --DiT--> segment --VAE--> frames

A stream makes segments: 57 frames, then 40 more per step. The distilled network makes a segment in
three solver steps, the base network in 50 with guidance, and two experts share the steps. The
decoder may be a light one with fewer channels, in a folder of its own; the full autoencoder encodes
the start picture. Without memory and actions the network is plain Wan 2.2, which makes whole clips.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.diffusion import unipc
from matrix_jax.dit import wan_memory as dit
from matrix_jax.encoders import t5, tokenizers
from matrix_jax.stream import memory
from matrix_jax.stream.base import PyTree, Stream, StreamDecoder
from matrix_jax.vae import condition as start
from matrix_jax.vae import wan as vae
from matrix_jax.weights import diffusers_layout
from matrix_jax.worlds import matrix_game_3_networks as networks
from matrix_jax.worlds.base import BaseWorld, round_up_clip
from matrix_jax.worlds.layer_counts import fewer_layers, fewer_text_layers
from matrix_jax.worlds.matrix_game_3_config import ClipConfig, Config
from matrix_jax.worlds.matrix_game_3_networks import EXPERTS, network
from matrix_jax.worlds.networks import Component, Params, summary_line

__all__ = ['ClipConfig', 'Config', 'World', 'clean_prompt', 'network']

Array = np.ndarray[Any, Any]

LOG = logging.getLogger(__name__)


class World(BaseWorld):
    """Pure functions of parameters around `Config`."""

    autoencoder = vae
    reads_text = True
    extras = ('tokenizer',)
    prediction = 'flow_prediction'
    evaluator = 'revisit'
    roofline = 'wan_memory'
    has_int8_layers = True
    tokenizer: Any = None

    @property
    def components(self) -> tuple[Component, ...]:  # type: ignore[override]
        """Networks, autoencoder, text encoder, and the light decoder if there is one."""
        return networks.components(self.cfg.light is not None, bool(self.cfg.stream.experts))

    @property
    def network_folders(self) -> tuple[str, ...]:  # type: ignore[override]
        """One transformer, or two experts."""
        return EXPERTS if self.cfg.stream.experts else EXPERTS[:1]

    @property
    def decoder_folder(self) -> str:  # type: ignore[override]
        """Folder of the light decoder if there is one, else of the autoencoder."""
        return 'vae_decoder' if self.cfg.light else 'vae'

    def replace(self, **fields: Any) -> World:
        world = super().replace(**fields)
        world.tokenizer = self.tokenizer
        return world

    # --- text ------------------------------------------------------------------------------------

    def with_tokenizers(self, folder: str | Path | None) -> World:
        """Returns the world with the tokenizer of a weights folder.

        Without a folder, or in one without text encoder and tokenizer, it is a byte tokenizer.
        """
        world = self.replace()
        names = 'text_encoder', 'tokenizer'
        if folder is None or not any(self.has_part(folder, name) for name in names):
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

    @functools.cached_property
    def vocabulary(self) -> KeyboardMouseVocabulary:
        """Keys and mouse; none for whole clips."""
        return KeyboardMouseVocabulary('no_actions' if self.cfg.clip else 'matrix_game_3')

    @property
    def start_is_optional(self) -> bool:  # type: ignore[override]
        """Whole clips may start from the prompt alone."""
        return self.cfg.clip is not None

    @property
    def first_step_controls(self) -> int:
        """Actions of the first segment, which is longer than the others."""
        return self.cfg.stream.first_actions

    @property
    def max_seconds(self) -> int | None:
        cfg = self.cfg
        return cfg.clip and (1 + cfg.stream.ratio * (cfg.clip.longest - 1)) // cfg.fps

    def round_up_controls(self, count: int) -> int:
        """Returns the frames of the shortest video with at least `count`: 57 + 40k for a stream,
        1 + 4k for a clip."""
        if clip := self.cfg.clip:
            return round_up_clip(count, self.cfg.stream.ratio, clip.longest)
        return super().round_up_controls(count)

    def fit(self, frames: Array) -> Array:
        """Returns uint8 frames [F H W 3] of any size in the size of the world, cropped in the
        middle and resized bicubically as in the reference."""
        size = self.cfg.height, self.cfg.width
        return np.stack([start.fit(frame, *size, resample='bicubic') for frame in frames])

    def inputs(
        self, prompt: str, frames: Any, controls: list[str] | None = None
    ) -> tuple[tuple[Any, ...], str]:
        """Returns (inputs of `condition`, or of `sample_clip` for whole clips; the unread end of
        the prompt). A stream takes no actions at its start."""
        ids, cut = self.tokenize_and_cut([prompt])
        ids, pictures = (
            np.asarray(ids, np.int32),
            None if frames is None else np.asarray(frames)[None],
        )
        if self.cfg.clip:
            return (ids, pictures, self.vocabulary.encode(controls or [])[None]), cut[0]
        return (ids, pictures), cut[0]

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
        cfg, name = self.decoder_vae, self.decoder_folder

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
        if self.cfg.stream.guided:
            null_text = self.null_text(params)
        return memory.Cond(self.encode_frames(params, frames), text, null_text)

    def null_text(self, params: Params) -> jax.Array:
        """Returns the encoded negative prompt [1 L D]."""
        return self.embed_ids(params, self._negative_ids)

    @functools.cached_property
    def _negative_ids(self) -> Any:
        return self.tokenize_and_cut([self.cfg.negative_prompt])[0]

    def latents(self, control_binding: str | None = None) -> Stream:
        """Returns the stream of segments: actions in, latents [B T H W C] out.

        Args:
          control_binding: has no effect; actions bind to the segment that takes them.
        """
        return memory.make(self.cfg.stream, self.network)

    @property
    def network(self) -> memory.MemoryNetwork:
        """The transformers as a stream calls them."""
        cfg = self.cfg
        return network(cfg.dit, cfg.vae.spatial_compression, cfg.stream.experts)

    def first_prediction(
        self, params: Params, carry: memory.Carry, control: jax.Array
    ) -> jax.Array:
        """Of the new frames of a segment, without guidance, by the first network."""
        cfg = self.cfg
        one = dataclasses.replace(
            cfg.stream,
            solver=dataclasses.replace(cfg.stream.solver, steps=1),
            guidance=1.0,
            experts=None,
        )
        shape = (len(carry.key), one.overlap + one.new, *carry.history.shape[2:])
        noise = jax.random.normal(jax.random.key(0), shape)
        net = network(cfg.dit, cfg.vae.spatial_compression)
        _, x, trace = memory.next_segment(one, net, params, carry, control, noise)
        # The only step ends at x0 = x - sigma v.
        return (trace.latents[0][:, one.overlap :] - x) / np.float32(unipc.sigmas(one.solver)[0])

    # --- whole clips -----------------------------------------------------------------------------

    def sample_clip(
        self, params: Params, ids: Any, frames: Any, actions: Any, key: jax.Array
    ) -> jax.Array:
        """Returns a whole clip of plain Wan 2.2, frames uint8 [B F H W 3].

        Args:
          params: parameters.
          ids: prompt ids [B L].
          frames: first frames uint8 [B 1 H W 3]; None = the clip is made from the prompt alone.
          actions: [B F 0], F = 1 + 4(T-1); only F is read.
          key: key of all noise.
        """
        cfg, clip, scale = self.cfg, self.cfg.clip, self.cfg.vae.spatial_compression
        assert clip is not None
        count = 1 + (actions.shape[1] - 1) // cfg.stream.ratio
        shape = count, cfg.height // scale, cfg.width // scale, cfg.dit.channels
        noise = jax.random.normal(key, (len(ids), *shape))
        clean = noise[:, :0] if frames is None else self.encode_frames(params, frames)
        text, null_text = self.embed_ids(params, ids), self.embed_ids(params, self._negative_ids)

        def predict(x: jax.Array, levels: jax.Array, text: jax.Array) -> jax.Array:
            variables = {'params': params['transformer']}
            net = dit.WanMemoryTransformer(cfg.dit)
            v: Any = net.apply(variables, x, levels, text, np.arange(count))
            return v

        def denoise(x: jax.Array, levels: jax.Array) -> jax.Array:
            null, v = predict(x, levels, null_text), predict(x, levels, text)
            return null + clip.guidance * (v - null)

        runs = [(unipc.step_table(clip.solver), lambda x: denoise)]
        made, _ = unipc.sample_after(clean, noise, runs)
        return self.to_uint8(vae.decode(cfg.vae, params['vae'], vae.unscaled(cfg.vae, made)))

    # --- devices ---------------------------------------------------------------------------------

    @property
    def offloads(self) -> bool:
        """Whether the two experts stay in host memory."""
        experts = self.cfg.stream.experts
        return bool(experts and experts.offload)

    def param_places(
        self, params: Params, mesh: jax.sharding.Mesh, decoder: jax.sharding.Mesh | None = None
    ) -> Any:
        places = super().param_places(params, mesh, decoder)
        for name in EXPERTS if self.offloads else ():
            if name in places:
                places[name] = jax.tree.map(
                    lambda place: place.with_memory_kind('pinned_host'), places[name]
                )
        return places

    def summary(self, mesh: Any) -> str:
        """Also says how much of two experts is on a device if they stay in host memory."""
        text = super().summary(mesh)
        if not self.offloads:
            return text
        sizes = {name: size for name, size in self.sizes(mesh).items() if name != EXPERTS[1]}
        counts, local = zip(*sizes.values(), strict=True)
        return f'{text}\n{summary_line("at a time", sum(counts), sum(local))}, one of two experts'

    # --- weights folders -------------------------------------------------------------------------

    def described_by(self, folder: str | Path, whole: bool = False) -> World:
        """Also finds out what a config.json may leave open.

        Whether the norms of action modules use their weights follows from the weights: the
        references differ, and only agree if all of these weights are one. How an autoencoder treats
        the first frame follows from the recipe, as diffusers has no key for it.
        """
        fields = self._read_configs(folder, whole)
        for name in ('vae', 'light'):
            if found := fields.get(name):
                place = self.locate(folder, self._folder_of(name))
                released = diffusers_layout.read_config(*place)
                fields[name] = networks.completed(found, getattr(self.cfg, name), released)
        net = fields.get('dit')
        if net is not None and net.actions is not None:
            places = [self.locate(folder, name) for name in self.network_folders]
            place = places[0]
            action_config = diffusers_layout.read_config(*place).get('action_config', {})
            unknown = 'norm_scale' not in action_config
            tensors = (diffusers_layout.Tensors(Path(*one)) for one in places)
            if unknown and any(map(networks.has_norm_scales, tensors)):
                LOG.warning(
                    '%s: norms of the action modules are multiplied by their weights, which '
                    'are not all one',
                    '/'.join(place),
                )
                actions = dataclasses.replace(net.actions, norm_scale=True)
                fields['dit'] = dataclasses.replace(net, actions=actions)
        return self.replace(**fields)

    def _folder_of(self, field: str) -> str:
        """Returns the folder of the component whose config is in this field."""
        return next(one.folder for one in self.components if one.field == field)

    def locate(self, folder: str | Path, name: str) -> tuple[str, str]:
        """The published folder has the networks and the tokenizer under other names."""
        return super().locate(folder, networks.published(self.cfg.kind, folder, name))

    def has_part(self, folder: str | Path, name: str) -> bool:
        return Path(*self.locate(folder, name)).is_dir()

    def write_extra(self, name: str, folder: str) -> None:
        tokenizers.write_byte_tokenizer(folder, self.cfg.dit.text_length)

    def shortened(self, layers: int | None, text_layers: int | None = None) -> World:
        fields = {'text': fewer_text_layers(self.cfg.text, layers, text_layers)}
        if layers is not None:
            fields['dit'] = fewer_layers(self.cfg.dit, layers, 'actions')
        return self.replace(**fields)


def clean_prompt(prompt: str) -> str:
    """Returns a prompt without HTML entities and with single spaces, as in training."""
    return re.sub(r'\s+', ' ', html.unescape(html.unescape(prompt))).strip()
