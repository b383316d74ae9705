"""BaseWorld: what every world is made of.

A world joins networks to a stream. In reading order:

    Networks              parameters: drawn, counted, placed on devices
    WeightsFolders        the same in folders: described, read, written
    BaseWorld             what a video needs: start frames, number of controls, inputs
                          pixels and latents: encoding, streaming decoder
                          the stream: latents, frames, its stages on two meshes
    protocols.World       the same as a contract: all that other rooms read of a world

A world subclasses `BaseWorld`, lists its components, and defines `vocabulary`, `fit`, `inputs`,
`condition` and `latents`; `docs/adding_a_world.md` goes through an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.controls.vocabulary import Vocabulary
from matrix_jax.stream.base import PyTree, Stream, StreamDecoder, chain
from matrix_jax.worlds.networks import Component, Params
from matrix_jax.worlds.weights_folders import WeightsFolders

__all__ = ['BaseWorld', 'Component', 'check_frames', 'round_up_clip']


class BaseWorld(WeightsFolders):
    """Pure functions of parameters around a config; a world holds no weights.

    Attributes:
      start_is_optional: whether a video can start from the prompt alone as well.
      autoencoder: module of the component 'vae'.
      decode_chunk: latent frames that are decoded at once; None = those of a step.
      decoder_seed: `cond -> latents` that the decoder is filled with at the start, or None if it
        starts on the first latents made.
      prediction: what the network predicts, 'v_prediction' or 'flow_prediction'.
      evaluator: name of the evaluation, a key of `evals.report.EVALUATORS`.
      roofline: name of the FLOP count, a key of `benchmark.roofline.NETWORKS`.
      has_int8_layers: whether the network has 8-bit layers.
      has_torch_baseline: whether diffusers has the same network.
    """

    start_is_optional = False
    autoencoder: Any = None
    decode_chunk: int | None = None
    decoder_seed: Callable[[Any], jax.Array] | None = None
    prediction = ''
    evaluator = ''
    roofline = ''
    has_int8_layers = False
    has_torch_baseline = False

    def with_tokenizers(self, folder: Any) -> Any:
        """Returns the world with the tokenizers of a weights folder, if it reads text."""
        return self

    # --- what a video needs ----------------------------------------------------------------------

    @property
    def vocabulary(self) -> Vocabulary:
        """Controls that the world takes."""
        raise NotImplementedError

    @property
    def endless(self) -> bool:
        """Whether the world streams; else it makes whole clips."""
        return self.cfg.clip is None

    @property
    def warmup_steps(self) -> int:
        """Steps of a stream before its memory is full."""
        return 0

    @property
    def start_frames(self) -> int:
        """Pixel frames that a video starts from; 0 if the prompt is enough."""
        return 1

    @property
    def first_step_controls(self) -> int:
        """Controls that the first step of a stream takes."""
        return int(self.cfg.stream.controls_per_step)

    @property
    def max_seconds(self) -> int | None:
        """Length of the longest video in whole seconds; None for a stream."""
        return None

    def controls_for_seconds(self, seconds: int) -> int:
        """Returns the controls of the shortest video of at least `seconds`.

        Raises:
          UsageError: no video is that long.
        """
        if self.max_seconds is not None and seconds > self.max_seconds:
            raise UsageError(
                f'--length: got {seconds}, expected at most {self.max_seconds}: '
                'this model makes whole clips and does not stream'
            )
        frames = seconds * self.cfg.fps
        return self.round_up_controls(math.ceil(frames / self.vocabulary.frames_per_control))

    def round_up_controls(self, count: int) -> int:
        """Returns the controls of the shortest video that has at least `count`: whole steps.

        Raises:
          UsageError: no video is that long.
        """
        first, step = self.first_step_controls, self.cfg.stream.controls_per_step
        return first + step * max(0, math.ceil((count - first) / step))

    def split_controls(self, controls: list[str]) -> tuple[list[str], list[list[str]]]:
        """Controls of a whole video -> (those of its start, those of each step)."""
        first, step = self.first_step_controls, self.cfg.stream.controls_per_step
        rest = range(first, len(controls), step)
        return [], [controls[:first], *(controls[at : at + step] for at in rest)]

    def fit(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns uint8 frames [F H W 3] of any size in the size of the world."""
        raise NotImplementedError

    def inputs(
        self, prompt: str, frames: Any, controls: list[str] | None = None
    ) -> tuple[tuple[Any, ...], str]:
        """Returns what `condition` and `sample_clip` take after the parameters.

        Args:
          prompt: text.
          frames: start frames uint8 [F H W 3], F = `start_frames`.
          controls: of the start of a stream, or of a whole clip; None before any key is pressed.

        Returns:
          (inputs, the end of the prompt that the network does not read).
        """
        raise NotImplementedError

    def condition(self, params: Params, *inputs: Any) -> Any:
        """Returns what a stream starts from, the `cond` of `Stream.init`."""
        raise NotImplementedError

    def sample_clip(self, params: Params, *inputs: Any) -> jax.Array:
        """Returns a whole clip, frames uint8 [B F H W 3]; the last input is a key."""
        raise NotImplementedError

    # --- pixels and latents ----------------------------------------------------------------------

    @property
    def decoder_vae(self) -> Any:
        """Config of the autoencoder whose decoder streams."""
        return self.cfg.vae

    @staticmethod
    def pixels(frames: Any) -> jax.Array:
        """Frames uint8 -> float32 in [-1, 1]."""
        return jnp.asarray(frames, jnp.float32) / 127.5 - 1

    @staticmethod
    def to_uint8(frames: jax.Array) -> jax.Array:
        """Frames in [-1, 1] -> uint8, rounded."""
        return jnp.round(jnp.clip(frames / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def encode_frames(self, params: Params, frames: Any) -> jax.Array:
        """Frames uint8 [B F H W 3], F = 1 + 4k -> scaled latents [B T H W C] (posterior mean)."""
        mean, _ = self.autoencoder.encode(self.cfg.vae, params['vae'], self.pixels(frames))
        latents: jax.Array = self.autoencoder.scaled(self.cfg.vae, mean)
        return latents

    def encode_step(self, params: Params, cache: PyTree, frames: Any) -> tuple[PyTree, jax.Array]:
        """Encodes a chunk of a long clip: uint8 [B F H W 3] -> (cache, latents [B T H W C])."""
        cfg = self.cfg.vae
        cache, mean, _ = self.autoencoder.encode_step(
            cfg, params['vae'], cache, self.pixels(frames)
        )
        return cache, self.autoencoder.scaled(cfg, mean)

    def decoder(self) -> StreamDecoder:
        """Returns the streaming decoder: latents of a step -> uint8 frames."""
        vae, cfg = self.autoencoder, self.cfg.vae

        def prefill(params: Params, latents: jax.Array) -> tuple[PyTree, jax.Array]:
            cache, frames = vae.prefill(cfg, params['vae'], vae.unscaled(cfg, latents))
            return cache, self.to_uint8(frames)

        def step(params: Params, cache: PyTree, latents: jax.Array) -> tuple[PyTree, jax.Array]:
            count = latents.shape[1] // (self.decode_chunk or latents.shape[1])
            frames = []
            for chunk in jnp.split(vae.unscaled(cfg, latents), count, axis=1):
                cache, made = vae.step(cfg, params['vae'], cache, chunk)
                frames.append(made)
            return cache, self.to_uint8(jnp.concatenate(frames, axis=1))

        return StreamDecoder(prefill, step)

    # --- the stream ------------------------------------------------------------------------------

    def latents(self, control_binding: str | None = None) -> Stream:
        """Returns the stream without its decoder: controls in, latents [B T H W C] out.

        Args:
          control_binding: where controls take effect, if the stream has a choice; the config's
            choice by default.
        """
        raise NotImplementedError

    def stream(self, control_binding: str | None = None) -> Stream:
        """Returns the stream: controls in, frames uint8 [B F H W 3] out, one program per step."""
        return chain(self.latents(control_binding), self.decoder(), self.decoder_seed)

    def first_prediction(self, params: Params, carry: PyTree, control: jax.Array) -> jax.Array:
        """Returns the prediction of the network in the first call of the next step of a stream.

        Args:
          params: parameters.
          carry: of `latents`, after its prefill.
          control: encoded controls of the step.
        """
        raise NotImplementedError

    def stages(self, control_binding: str | None = None) -> dict[str, Any]:
        """Returns the parts of `stream` for `stream.pipeline.Pipeline`."""
        return {
            'stream': self.latents(control_binding),
            'decoder': self.decoder(),
            'decoder_seed': self.decoder_seed,
        }


def round_up_clip(count: int, ratio: int, longest: int) -> int:
    """Returns the frames 1 + ratio*k of the shortest whole clip with at least `count` frames.

    Args:
      count: wanted frames.
      ratio: pixel frames of a latent frame.
      longest: latent frames of the longest clip.

    Raises:
      UsageError: no clip is that long.
    """
    if count > 1 + ratio * (longest - 1):
        raise UsageError(
            f'actions: got {count} frames, expected at most {1 + ratio * (longest - 1)}: '
            'this model makes whole clips and does not stream'
        )
    return 1 + ratio * math.ceil((count - 1) / ratio)


def check_frames(cfg: Any) -> None:
    """Checks that the networks of a world's config can make its frames.

    Raises:
      ValueError: height or width is no multiple of a token's pixels, or fps is not positive.
    """
    scale = cfg.vae.spatial_compression * cfg.dit.patch
    if cfg.height <= 0 or cfg.width <= 0 or cfg.height % scale or cfg.width % scale:
        raise ValueError(
            f'world: got {cfg.height}x{cfg.width} pixels, expected positive multiples of {scale} '
            f'(VAE {cfg.vae.spatial_compression}, patch {cfg.dit.patch})'
        )
    if cfg.fps <= 0:
        raise ValueError(f'world.fps: got {cfg.fps}, expected at least 1')
