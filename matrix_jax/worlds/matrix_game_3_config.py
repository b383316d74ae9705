"""Config of a Matrix-Game 3.0 world, and of plain Wan 2.2."""

from __future__ import annotations

import dataclasses

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.diffusion import unipc
from matrix_jax.dit import wan_memory as dit
from matrix_jax.encoders import t5
from matrix_jax.stream import memory
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.base import check_frames

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
class ClipConfig:
    """Sampling of whole clips; the defaults are Wan 2.2 of 5B.

    Attributes:
      solver: denoising steps.
      guidance: scale of classifier-free guidance; 1 switches it off.
      longest: latent frames of the longest clip.

    Raises:
      ValueError: a value is out of range.
    """

    solver: unipc.Config = unipc.Config(steps=50)
    guidance: float = 5.0
    longest: int = 31

    def __post_init__(self) -> None:
        if not self.guidance >= 1:
            raise ValueError(f'clip.guidance: got {self.guidance:g}, expected at least 1')
        if self.longest < 1:
            raise ValueError(f'clip.longest: got {self.longest}, expected at least 1')


@dataclasses.dataclass(frozen=True)
class Config:
    """A Matrix-Game 3 world.

    Attributes:
      name: `_class_name` of model_index.json.
      dit, vae, text: configs of the networks; a weights folder overrides their sizes.
      light: autoencoder whose decoder streams, in the folder `vae_decoder`; None = that of `vae`.
      stream: segments, memory and solver.
      clip: sampling of whole clips, for a network without memory and actions; None = it streams.
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
    clip: ClipConfig | None = None
    height: int = 704
    width: int = 1280
    fps: int = 17
    prompt: str = 'A view of a large open world, seen by someone who walks through it.'
    negative_prompt: str = NEGATIVE
    mirror: bool = True
    name: str = 'MatrixGame3'

    def __post_init__(self) -> None:
        net, size = self.dit, self.dit.actions
        if self.clip and (size or net.memory):
            raise ValueError(
                'world.clip: got whole clips of a network with memory or actions, expected none'
            )
        if not self.clip:
            self._check_stream()
        check_frames(self)
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
        of_network = size.ratio if size else self.stream.ratio
        if {self.vae.temporal_compression, of_network} != {self.stream.ratio}:
            raise ValueError(
                f'world.stream.ratio: got {self.stream.ratio}, expected '
                f'{self.vae.temporal_compression} of the VAE and {of_network} of the network'
            )

    def _check_stream(self) -> None:
        """Checks that the network has what a stream needs."""
        net, keys = self.dit, KeyboardMouseVocabulary('matrix_game_3').mode.keys
        size = net.actions
        if size is None or (size.keyboard, size.mouse) != (len(keys), 2):
            got = size and (size.keyboard, size.mouse)
            raise ValueError(
                f'world.dit.actions: got {got} keys and mouse entries, expected ({len(keys)}, 2)'
            )
        if not net.memory:
            raise ValueError('world.dit.memory: got False, expected True in a world that streams')
        rays = 6 * self.vae.spatial_compression**2
        if net.camera_channels != rays:
            raise ValueError(
                f'world.dit.camera_channels: got {net.camera_channels}, expected '
                f'{rays}, the ray map of a latent pixel'
            )

    @property
    def kind(self) -> str:
        """Key of `matrix_game_3_networks.PUBLISHED`; a distilled network needs no guidance."""
        if self.clip:
            return 'clip'
        if self.stream.experts:
            return 'experts'
        return 'base' if self.stream.guided else 'distilled'
