"""Matrix-Game 2.0 (arXiv 2508.13009): a causal Wan DiT that obeys keyboard and mouse.

    picture --CLIP--> tokens                  what the scene is
    picture + grey clip --VAE--> latents      where it begins
    noise + keys --blocks on caches--> clean latents --VAE--> frames

Streaming networks make a block of three latent frames (12 pixel frames; the first block has 9) in
three or four network calls. The foundation model sees all frames at once, and makes whole clips in
many calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.diffusion import flow
from matrix_jax.dit import segments
from matrix_jax.dit import wan as dit
from matrix_jax.encoders import clip_image
from matrix_jax.stream import causal
from matrix_jax.stream.base import PyTree, Stream
from matrix_jax.vae import condition as start
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.base import BaseWorld, check_frames, round_up_clip
from matrix_jax.worlds.layer_counts import fewer_layers
from matrix_jax.worlds.networks import Component, Params

Array = np.ndarray[Any, Any]

# Folder of the transformer of each mode in the published weights; ours is called 'transformer'.
PUBLISHED = {
    'universal': 'base_distilled_model',
    'gta_drive': 'gta_distilled_model',
    'templerun': 'templerun_distilled_model',
}
FOUNDATION = 'base_model'


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sampling of whole clips.

    Attributes:
      steps: network calls.
      longest: latent frames of the longest clip.

    Raises:
      ValueError: a value is below 1.
    """

    steps: int = 50
    longest: int = 21

    def __post_init__(self) -> None:
        for name in ('steps', 'longest'):
            if getattr(self, name) < 1:
                raise ValueError(f'clip.{name}: got {getattr(self, name)}, expected at least 1')


@dataclasses.dataclass(frozen=True)
class Config:
    """A Matrix-Game world.

    Attributes:
      name: `_class_name` of model_index.json.
      dit, vae, image: configs of the networks; a weights folder overrides their sizes.
      flow: the noise schedule.
      stream: the stream of blocks.
      clip: sampling of whole clips, for a network that does not stream; None = it streams.
      mode: what can be pressed, a key of `controls.modes.MODES`.
      height, width: pixels of a frame.
      fps: frames per second. The reference trains on 25 and writes its files at 12.
      prompt: chooses the default start picture by its caption; the networks read no text.
      mirror: whether a mirrored clip with mirrored actions is a valid training example.

    Raises:
      ValueError: mode, network, VAE and stream do not fit each other.
    """

    dit: dit.Config = dit.PRESETS['universal']
    vae: vae.Config = vae.PRESETS['wan_2_1']
    image: clip_image.Config = clip_image.PRESETS['vit_h_14']
    flow: flow.Config = flow.Config()
    stream: causal.Config = causal.Config()
    clip: ClipConfig | None = None
    mode: str = 'universal'
    height: int = 352
    width: int = 640
    fps: int = 25
    prompt: str = ''
    mirror: bool = True
    name: str = 'MatrixGame2'

    def __post_init__(self) -> None:
        keys, actions = KeyboardMouseVocabulary(self.mode).mode, self.dit.actions
        if actions is None or (actions.keyboard, bool(actions.mouse)) != (
            len(keys.keys),
            keys.mouse,
        ):
            raise ValueError(
                f'world.mode: got {self.mode}, which has {len(keys.keys)} keys and '
                f'{"a" if keys.mouse else "no"} mouse; the network expects '
                f'{actions and (actions.keyboard, actions.mouse)}'
            )
        check_frames(self)
        if (self.dit.local is None) != (self.clip is not None):
            raise ValueError(
                f'world.clip: got {self.clip}, but the network has '
                f'{"no" if self.dit.local is None else "a"} window (dit.local)'
            )
        ratios = {self.vae.temporal_compression, actions.ratio, self.stream.ratio}
        if len(ratios) > 1 or actions.span != self.stream.window:
            raise ValueError(
                f'world.stream: got ratio {self.stream.ratio} and window '
                f'{self.stream.window}, expected {self.vae.temporal_compression} of '
                f'the VAE, and {actions.ratio} and {actions.span} of the network'
            )


class World(BaseWorld):
    """Pure functions of parameters around `Config`."""

    components = (
        Component(
            'dit',
            'transformer',
            dit.weights,
            dit.shapes,
            dit.init_rules,
            zero_init=dit.ZERO_INIT,
            stream_layer=dit.stream_layer,
            run_fields=('dtype', 'remat', 'scan_unroll', 'exchange'),
        ),
        Component(
            'vae',
            'vae',
            vae.weights,
            vae.shapes,
            lambda cfg: vae.INIT_RULES,
            run_fields=('dtype', 'chunk'),
        ),
        Component(
            'image',
            'image_encoder',
            clip_image.weights,
            clip_image.shapes,
            lambda cfg: clip_image.INIT_RULES,
            run_fields=('dtype',),
        ),
    )
    autoencoder = vae
    prediction = 'flow_prediction'
    evaluator = 'first_person'
    roofline = 'wan'

    @functools.cached_property
    def vocabulary(self) -> KeyboardMouseVocabulary:
        """Keys and mouse of the mode."""
        return KeyboardMouseVocabulary(self.cfg.mode)

    # --- what a video needs ----------------------------------------------------------------------

    @property
    def warmup_steps(self) -> int:
        """Steps after the first block until all cache slots are in use."""
        return max(0, math.ceil(self.cfg.dit.local / self.cfg.stream.frames) - 2)

    @property
    def first_step_controls(self) -> int:
        """Actions of the first block, which is shorter than the others."""
        return self.cfg.stream.first_actions

    @property
    def max_seconds(self) -> int | None:
        cfg = self.cfg
        return cfg.clip and self._max_clip_frames // cfg.fps

    @property
    def _max_clip_frames(self) -> int:
        return 1 + self.cfg.stream.ratio * (self.cfg.clip.longest - 1)

    def round_up_controls(self, count: int) -> int:
        """Returns the actions of the shortest video with at least `count`: 9 + 12k for a stream,
        1 + 4k for a clip."""
        cfg = self.cfg
        if not cfg.clip:
            return super().round_up_controls(count)
        return round_up_clip(count, cfg.stream.ratio, cfg.clip.longest)

    def fit(self, frames: Array) -> Array:
        """Returns uint8 frames [F H W 3] of any size in the size of the world, cropped in the
        middle as in the reference."""
        cfg = self.cfg
        return np.stack([start.fit(frame, cfg.height, cfg.width) for frame in frames])

    def inputs(
        self, prompt: str, frames: Any, controls: list[str] | None = None
    ) -> tuple[tuple[Any, ...], str]:
        """Returns (inputs of `condition`, or of `sample_clip` for whole clips; ''). The prompt only
        chooses the picture; a stream takes no actions at its start."""
        picture = np.asarray(frames)[None]
        if self.cfg.clip:
            return (picture, self.vocabulary.encode(controls or [])[None]), ''
        return (picture,), ''

    # --- pixels ----------------------------------------------------------------------------------

    @staticmethod
    def pixels(frames: Any) -> jax.Array:
        """Frames uint8 -> float32 in [-1, 1], rounded as in the reference."""
        return start.pixels(frames)

    @staticmethod
    def to_uint8(frames: jax.Array) -> jax.Array:
        """Frames in [-1, 1] -> uint8, rounded down."""
        return jnp.clip((frames + 1) * 127.5, 0, 255).astype(jnp.uint8)

    # --- the stream ------------------------------------------------------------------------------

    def condition(self, params: Params, frames: Any) -> causal.Cond:
        """Returns what a stream starts from, of pictures uint8 [B 1 H W 3]."""
        return self._condition(params, frames, self.cfg.vae.settled + 1)

    def _condition(self, params: Params, frames: Any, count: int) -> causal.Cond:
        condition = self.image_condition(params, frames, count)
        return causal.Cond(condition, self.image_features(params, frames))

    def image_condition(self, params: Params, frames: Any, count: int) -> jax.Array:
        """Pictures uint8 [B 1 H W 3] -> condition of the first `count` latent frames [B T H W C']:
        latents of the picture followed by grey, and a mask."""
        return start.condition(self.cfg.vae, params['vae'], start.pixels(frames[:, 0]), count)

    def image_features(self, params: Params, frames: Any) -> jax.Array:
        """Pictures uint8 [B 1 H W 3] -> CLIP features [B L D]."""
        return clip_image.encode(
            self.cfg.image, params['image_encoder'], start.pixels(frames[:, 0])
        )

    def denoise(
        self,
        params: Params,
        x: Any,
        level: Any,
        cond: causal.Cond,
        actions: Any,
        block: int | None = None,
    ) -> Any:
        """Returns the velocity [B T H W C] of whole clips.

        Args:
          params: parameters.
          x: noisy latents [B T H W C].
          level: [B T].
          cond: of T latent frames.
          actions: float32 [B F A], F = 1 + 4(T-1).
          block: latent frames of a block; frames see their own and earlier blocks. None = every
            frame sees all frames.
        """
        keyboard, mouse = split_actions(self.cfg.dit, actions)
        return dit.WanTransformer(self.cfg.dit).apply(
            {'params': params['transformer']},
            x,
            level,
            cond.latents,
            cond.image,
            mouse,
            keyboard,
            block,
        )

    def latents(
        self,
        control_binding: str | None = None,
        *,
        change: Callable[[causal.CachedNetwork], causal.CachedNetwork] = lambda net: net,
        table: causal.StepTable | None = None,
    ) -> Stream:
        """Returns the causal stream: actions in, latents [B T H W C] out.

        Args:
          control_binding: has no effect; actions bind to the block that takes them.
          change: what training changes about the network.
          table: calls on a block; those of `causal.step_table` by default.
        """
        cfg = self.cfg
        idle = self.vocabulary.encode([self.vocabulary.idle])[0]
        net = causal.with_action_guidance(cfg.stream, change(network(cfg.dit)), idle)
        return causal.make(cfg.stream, cfg.flow, net, table)

    def sample_clip(self, params: Params, frames: Any, actions: Any, key: jax.Array) -> jax.Array:
        """Returns a whole clip from a picture, frames uint8 [B F H W 3].

        Args:
          params: parameters.
          frames: pictures uint8 [B 1 H W 3].
          actions: float32 [B F A], F = 1 + 4(T-1).
          key: key of all noise.
        """
        cfg = self.cfg
        cond = self._condition(params, frames, 1 + (actions.shape[1] - 1) // cfg.stream.ratio)
        noise = jax.random.normal(key, (*cond.latents.shape[:-1], cfg.dit.channels))
        made = flow.sample(cfg.flow, cfg.clip.steps, self.denoise, params, noise, cond, actions)
        return self.to_uint8(vae.decode(cfg.vae, params['vae'], vae.unscaled(cfg.vae, made)))

    # --- weights folders -------------------------------------------------------------------------

    def described_by(self, folder: str | Path, whole: bool = False) -> World:
        """A stream may start training from a network of whole clips, which only lacks the window,
        and whole clips from a network that streams."""
        fields, cfg = self._read_configs(folder, whole), self.cfg
        found = fields.get('dit')
        if not whole and found and (cfg.dit.local is None) != (found.local is None):
            fields['dit'] = dataclasses.replace(found, local=cfg.dit.local, sink=cfg.dit.sink)
        return self.replace(**fields)

    def shortened(self, layers: int | None, text_layers: int | None = None) -> World:
        if text_layers is not None:
            raise UsageError(f'--text-layers: got {text_layers}, expected a world that reads text')
        if layers is None:
            return self
        # The image encoder needs two layers: its last one is not used.
        count = max(2, min(layers, self.cfg.image.layers))
        return self.replace(
            dit=fewer_layers(self.cfg.dit, layers, 'actions'),
            image=dataclasses.replace(self.cfg.image, layers=count),
        )

    def locate(self, folder: str | Path, name: str) -> tuple[str, str]:
        """The published folder has a transformer for each mode, under another name."""
        published = FOUNDATION if self.cfg.clip else PUBLISHED[self.cfg.mode]
        if name == 'transformer' and not (Path(folder) / name).is_dir():
            name = published if (Path(folder) / published).is_dir() else name
        return super().locate(folder, name)

    def has_part(self, folder: str | Path, name: str) -> bool:
        return Path(*self.locate(folder, name)).is_dir()


def network(cfg: dit.Config) -> causal.CachedNetwork:
    """Returns the transformer as a stream calls it, with the parameters of a world."""
    net = dit.WanTransformer(cfg)
    sizes: Any = cfg.actions

    def separate(params: Params) -> bool:
        return segments.is_separate(params['transformer'][next(iter(cfg.segments))])

    def begin(params: Params, caches: PyTree, actions: Any) -> tuple[PyTree, Any]:
        if not separate(params) or sizes.modulate or not sizes.keyboard:
            return caches, actions
        keyboard, mouse = split_actions(cfg, actions)
        variables = {'params': params['transformer']}
        caches, reads = net.apply(variables, caches, keyboard, method='read_keyboard')
        return caches, (reads, mouse)

    def denoise(
        params: Params, caches: PyTree, x: Any, level: Any, cond: Any, actions: Any
    ) -> tuple[jax.Array, PyTree]:
        begun = isinstance(actions, tuple)
        keyboard, mouse = actions if begun else split_actions(cfg, actions)
        variables = {'params': params['transformer']}
        return net.apply(variables, caches, x, level, cond, mouse, keyboard, method='cached')

    def read(params: Params, cond: causal.Cond) -> PyTree:
        batch, _, height, width, _ = cond.latents.shape
        caches = dit.init_caches(cfg, batch, height, width, separate(params))
        variables = {'params': params['transformer']}
        return net.apply(variables, cond.image, caches, method='read_image')

    width = sizes.keyboard + (sizes.mouse or 0)
    return causal.CachedNetwork(denoise, read, dit.advance, cfg.channels, width, begin)


def split_actions(cfg: dit.Config, actions: Any) -> tuple[Any, Any]:
    """Actions [B F A] -> (keyboard [B F A'], mouse [B F 2] or None)."""
    sizes: Any = cfg.actions
    keyboard, mouse = actions[..., : sizes.keyboard], actions[..., sizes.keyboard :]
    return keyboard, mouse if sizes.mouse else None
