"""Matrix-Game 2.0 (arXiv 2508.13009): a causal Wan DiT that obeys keyboard and mouse.

    picture --CLIP--> tokens                  what the scene is
    picture + grey clip --VAE--> latents      where it begins
    noise + keys --blocks on caches--> clean latents --VAE--> frames

Streaming networks make a block of three latent frames in three or four steps; the foundation, which
sees all frames at once, makes whole clips in many. A block is 12 frames, the first one 9.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.diffusion import flow
from matrix_jax.dit import wan as dit
from matrix_jax.encoders import clip_image
from matrix_jax.stream import base as streams
from matrix_jax.stream import causal
from matrix_jax.vae import condition as start
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.base import BaseWorld, Component, check_frames, read_parts

# Where the published folder has the transformer of each mode; ours is called 'transformer'.
PUBLISHED = {
    'universal': 'base_distilled_model',
    'gta_drive': 'gta_distilled_model',
    'templerun': 'templerun_distilled_model',
}
FOUNDATION = 'base_model'


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """How whole clips are made.

    Attributes:
      steps: network calls.
      longest: latent frames of the longest clip.
    """

    steps: int = 50
    longest: int = 21

    def __post_init__(self):
        for name in ('steps', 'longest'):
            if getattr(self, name) < 1:
                raise ValueError(f'clip.{name}: got {getattr(self, name)}, expected at least 1')


@dataclasses.dataclass(frozen=True)
class Config:
    """A Matrix-Game world.

    Attributes:
      name: `_class_name` of model_index.json.
      dit, vae, image: configs of the parts; a weights folder overrides them.
      flow: the noise schedule.
      stream: the stream of blocks.
      clip: how whole clips are made, by a network that does not stream; None = it streams.
      mode: what can be pressed, one of `actions.MODES`.
      height, width: pixels of a frame.
      fps: frames per second; the reference writes its files at 12, trained on 25.
      prompt: which of the start pictures is the usual one; the networks read no text.
      mirror: whether a mirrored clip with mirrored keys and mouse is a valid example.
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

    def __post_init__(self):
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
    """Pure functions of parameters around `Config`; nothing here holds weights."""

    autoencoder = vae
    prediction = 'flow_prediction'
    evaluator = 'first_person'
    roofline = 'wan'
    components = (
        Component('dit', 'transformer', dit.weights, dit.shapes, dit.laws, still=dit.STILL),
        Component('vae', 'vae', vae.weights, vae.shapes, lambda cfg: vae.LAWS),
        Component(
            'image',
            'image_encoder',
            clip_image.weights,
            clip_image.shapes,
            lambda cfg: clip_image.LAWS,
        ),
    )

    @functools.cached_property
    def vocabulary(self) -> KeyboardMouseVocabulary:
        """Words for what can be pressed."""
        return KeyboardMouseVocabulary(self.cfg.mode)

    def locate(self, folder, name):
        """The published folder holds the transformers of all modes."""
        published = FOUNDATION if self.cfg.clip else PUBLISHED[self.cfg.mode]
        if (
            name == 'transformer'
            and not (Path(folder) / name).is_dir()
            and (Path(folder) / published).is_dir()
        ):
            name = published
        return super().locate(folder, name)

    def has_part(self, folder, name):
        return Path(*self.locate(folder, name)).is_dir()

    # --- what a video needs ----------------------------------------------------------------------

    start_frames = 1  # it begins with a picture
    one_mesh = True  # the first block is not made like the others

    @property
    def warmup_steps(self) -> int:
        """Steps behind the first block whose caches have empty slots."""
        return max(0, -(-self.cfg.dit.local // self.cfg.stream.frames) - 2)

    def fit(self, frames) -> np.ndarray:
        """uint8 [F H W 3] of any size -> the world's size, as the reference cuts pictures."""
        cfg = self.cfg
        return np.stack([start.fit(frame, cfg.height, cfg.width) for frame in frames])

    @property
    def longest(self) -> int | None:
        """Whole seconds of the longest video; None for a stream."""
        cfg = self.cfg
        return cfg.clip and (1 + cfg.stream.ratio * (cfg.clip.longest - 1)) // cfg.fps

    def needed(self, length: int) -> int:
        """Actions of a video of at least that many seconds."""
        if self.longest and length > self.longest:
            raise UsageError(
                f'--length: got {length}, expected at most {self.longest}: this '
                'model makes whole clips (the distilled ones stream)'
            )
        return self.whole(length * self.cfg.fps)

    def whole(self, count: int) -> int:
        """Actions of the shortest video that has at least `count`: 9 + 12k frames, or 1 + 4k of a
        clip.

        Raises:
          UsageError: no clip is that long.
        """
        cfg = self.cfg
        if cfg.clip is None:
            first, block = cfg.stream.first_actions, cfg.stream.block_actions
            return first + block * max(0, -(-(count - first) // block))
        most = 1 + cfg.stream.ratio * (cfg.clip.longest - 1)
        if count > most:
            raise UsageError(
                f'actions: got {count} frames, expected at most {most}: this model '
                'makes whole clips (the distilled ones stream)'
            )
        return 1 + cfg.stream.ratio * (-(-(count - 1) // cfg.stream.ratio))

    def split(self, actions: list[str]):
        """Actions of a whole video -> (none for its start, those of each block)."""
        first, block = self.cfg.stream.first_actions, self.cfg.stream.block_actions
        return [], [
            actions[:first],
            *(actions[at : at + block] for at in range(first, len(actions), block)),
        ]

    @property
    def first_step_controls(self) -> int:
        """Actions of the first block, which is shorter than the others."""
        return self.cfg.stream.first_actions

    def inputs(self, prompt: str, frames, actions=None):
        """What `condition` takes besides parameters -> (inputs, the prompt's unread end).

        Args:
          prompt: has chosen the picture, and is not read.
          frames: the picture, uint8 [1 H W 3].
          actions: of all frames for a whole clip; the start of a stream takes none.
        """
        given = (np.asarray(frames)[None],)
        if self.cfg.clip:
            given += (self.vocabulary.encode(actions)[None],)
        return given, ''

    def condition(self, params, frames) -> causal.Cond:
        """What a stream starts from: of pictures uint8 [B 1 H W 3]."""
        return self._condition(params, frames, self.cfg.vae.settled + 1)

    def _condition(self, params, frames, count: int):
        return causal.Cond(
            self.image_condition(params, frames, count), self.image_features(params, frames)
        )

    def image_condition(self, params, frames, count: int):
        """What `count` latent frames take as their condition from pictures uint8 [B 1 H W 3]: [B T H W Cc]."""
        return start.condition(self.cfg.vae, params['vae'], start.pixels(frames[:, 0]), count)

    def image_features(self, params, frames):
        """Features of pictures uint8 [B 1 H W 3]: [B L D]."""
        return clip_image.encode(
            self.cfg.image, params['image_encoder'], start.pixels(frames[:, 0])
        )

    # --- pixels and latents ----------------------------------------------------------------------

    pixels = staticmethod(start.pixels)

    @staticmethod
    def to_uint8(frames):
        """Frames in [-1, 1] -> uint8, cut off."""
        return jnp.clip((frames + 1) * 127.5, 0, 255).astype(jnp.uint8)

    # --- the network and its stream --------------------------------------------------------------

    def denoise(self, params, x, level, cond: causal.Cond, actions, block: int | None = None):
        """Velocity [B T H W C] of whole clips.

        Args:
          params: parameters.
          x: noisy latents [B T H W C].
          level: [B T].
          cond: of T latent frames.
          actions: float32 [B F A], F = 1 + 4(T-1).
          block: latent frames that are made together; None = every frame sees all.
        """
        keyboard, mouse = split_actions(self.cfg.dit, actions)
        return dit.DiT(self.cfg.dit).apply(
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
        self, *, change=lambda net: net, table: causal.StepTable | None = None
    ) -> streams.Stream:
        """The stream before its decoder: actions in, latents [B T H W C] out.

        Args:
          change: `Network -> Network`, what training changes about it.
          table: the calls of a block, if they are others than `causal.step_table`.
        """
        cfg = self.cfg
        net = causal.with_action_guidance(
            cfg.stream, change(network(cfg.dit)), self.vocabulary.encode([self.vocabulary.idle])[0]
        )
        return causal.make(cfg.stream, cfg.flow, net, table)

    def stream(self, control_binding: str | None = None) -> streams.Stream:
        """Actions float32 [B F A] in, uint8 frames out: 9 in `prefill`, 12 in each `step`.

        Args:
          control_binding: where keys bind in worlds with a queue; here they bind at once.
        """
        return streams.chain(self.latents(), self.decoder())

    def stages(self, control_binding: str | None = None) -> dict:
        """What a pipeline of two meshes is made of.

        Raises:
          UsageError: always; the first block is not made like the others.
        """
        raise UsageError('--mesh.pipeline: this world streams on one mesh')

    def sample_clip(self, params, frames, actions, key):
        """A whole clip from a picture: -> frames uint8 [B F H W 3].

        Args:
          params: parameters.
          frames: pictures uint8 [B 1 H W 3].
          actions: float32 [B F A], F = 1 + 4(T-1).
          key: of all noise.
        """
        cfg = self.cfg
        cond = self._condition(params, frames, 1 + (actions.shape[1] - 1) // cfg.stream.ratio)
        noise = jax.random.normal(key, (*cond.latents.shape[:-1], cfg.dit.channels))
        made = flow.sample(cfg.flow, cfg.clip.steps, self.denoise, params, noise, cond, actions)
        return self.to_uint8(vae.decode(cfg.vae, params['vae'], vae.unscaled(cfg.vae, made)))


def network(cfg: dit.Config) -> causal.Network:
    """What the stream asks of a network; parameters are those of a world."""
    net = dit.DiT(cfg)

    def denoise(params, caches, x, level, cond, actions):
        keyboard, mouse = split_actions(cfg, actions)
        return net.apply(
            {'params': params['transformer']},
            caches,
            x,
            level,
            cond,
            mouse,
            keyboard,
            method='cached',
        )

    def read(params, cond):
        batch, _, height, width, _ = cond.latents.shape
        caches = dit.init_caches(cfg, batch, height, width)
        return net.apply({'params': params['transformer']}, cond.image, caches, method='read_image')

    return causal.Network(
        denoise, read, dit.advance, cfg.channels, cfg.actions.keyboard + (cfg.actions.mouse or 0)
    )


def split_actions(cfg: dit.Config, actions):
    """Actions [B F A] -> (keyboard, mouse or None)."""
    keys = cfg.actions.keyboard
    return actions[..., :keys], actions[..., keys:] if cfg.actions.mouse else None


def read_folder(cfg: Config, folder: str, whole: bool = False) -> Config:
    """The world that a weights folder describes; see `the_matrix.read_folder`.

    Training may begin a stream with a network of whole clips, which only lacks the window, and
    whole clips with one that streams.
    """
    found = read_parts(
        World(cfg),
        folder,
        whole,
        {
            'dit': ('dtype', 'remat', 'scan_unroll', 'exchange'),
            'vae': ('dtype', 'chunk'),
            'image': ('dtype',),
        },
    )
    if not whole and 'dit' in found and (cfg.dit.local is None) != (found['dit'].local is None):
        found['dit'] = dataclasses.replace(found['dit'], local=cfg.dit.local, sink=cfg.dit.sink)
    return dataclasses.replace(cfg, **found)
