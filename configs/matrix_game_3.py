"""Matrix-Game 3.0 as released: 704x1280, Wan 2.2 of 5B. Weights come with --weights.

    matrix-jax generate matrix_game_3:DISTILLED --weights DIR --image a.png --prompt "A castle" \\
        --actions "W*60,right*77"
    matrix-jax play matrix_game_3:DISTILLED --weights DIR

DIR is the published folder. Convert its pickles once:

    matrix-jax convert DIR/models_t5_umt5-xxl-enc-bf16.pth DIR/text_encoder \\
        --recipe matrix_game_3:DISTILLED
    matrix-jax convert DIR/Wan2.2_VAE.pth DIR/vae --recipe matrix_game_3:DISTILLED
    matrix-jax convert DIR/MG-LightVAE_v2.pth DIR/vae_decoder --recipe matrix_game_3:DISTILLED

The first segment of a stream has 57 frames and every other one 40, so a video has 57 + 40k frames.
DISTILLED uses the light decoder with a quarter of the channels, LIGHT the one with half of them,
FULL the full one. BASE is the network before distillation, with guidance. MOE has two networks of
14B, one for high noise levels and one for low ones; its sizes are those of the public code, and
no weights are published. WAN is plain Wan 2.2 of 5B: whole clips from a prompt, with or without a
picture.

    matrix-jax generate matrix_game_3:WAN --weights DIR --prompt "A castle" --length 5
"""

import dataclasses

from matrix_jax.config import Run, Train
from matrix_jax.diffusion import unipc
from matrix_jax.dit import wan_memory as dit
from matrix_jax.encoders import t5
from matrix_jax.recipes import change
from matrix_jax.stream.memory import Config as Memory
from matrix_jax.stream.memory import Experts
from matrix_jax.train.light_decoder import LightDecoder
from matrix_jax.train.memory_dmd import MemorySelfForcing
from matrix_jax.train.memory_flow import MemoryFlow
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.matrix_game_3 import ClipConfig, Config

DEFAULT = 'DISTILLED'


def _half(config):
    return dataclasses.replace(config, dtype='bfloat16')


_WORLD = Config(
    vae=_half(vae.PRESETS['wan_2_2']),
    light=_half(vae.PRESETS['light_v2']),
    text=_half(t5.PRESETS['umt5_xxl']),
)
DISTILLED = Run(world=_WORLD)
LIGHT = Run(world=dataclasses.replace(_WORLD, light=_half(vae.PRESETS['light'])))
FULL = Run(world=dataclasses.replace(_WORLD, light=None))
BASE = Run(
    world=dataclasses.replace(
        _WORLD, light=None, stream=Memory(solver=unipc.Config(steps=50), guidance=5.0)
    )
)
# Steps, guidance and boundary are those of Wan 2.2 of 14B for a start picture.
MOE = Run(
    world=dataclasses.replace(
        _WORLD,
        dit=dit.PRESETS['14b'],
        light=None,
        stream=Memory(solver=unipc.Config(steps=40), guidance=3.5, experts=Experts()),
    )
)
WAN = Run(
    world=Config(
        dit=dit.PRESETS['wan_2_2_5b'],
        vae=_half(vae.PRESETS['wan_2_2_plain']),
        light=None,
        text=_half(t5.PRESETS['umt5_xxl']),
        clip=ClipConfig(),
        fps=24,
        negative_prompt=(
            '色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，'
            '低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，'
            '毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走'
        ),
    )
)

# All networks at test size, for random weights.
_TINY_VAE = vae.Config(
    latent_channels=4,
    dim=4,
    multiples=(1, 2, 2),
    layers=1,
    halves_time=(True, True),
    residual=True,
    time_sees_first=True,
    norm_eps=1e-6,
    latent_means=(),
    latent_stds=(),
)
_TINY_TEXT = dataclasses.replace(t5.PRESETS['tiny'], layer_bias=True)
_TINY_DIT = dataclasses.replace(
    dit.PRESETS['tiny'],
    text_dim=_TINY_TEXT.dim,
    text_length=24,
    camera_channels=6 * _TINY_VAE.spatial_compression**2,
)
TINY = Run(
    world=Config(
        dit=_TINY_DIT,
        vae=_TINY_VAE,
        light=dataclasses.replace(_TINY_VAE, dim=2),
        text=_TINY_TEXT,
        height=16,
        width=24,
        stream=Memory(
            first=4, overlap=2, new=2, capacity=16, reference_offsets=(0, 8), solver=unipc.Config(2)
        ),
    )
)
TINY_BASE = dataclasses.replace(
    TINY,
    world=dataclasses.replace(
        TINY.world, light=None, stream=dataclasses.replace(TINY.world.stream, guidance=5.0)
    ),
)
TINY_MOE = change(TINY, {'world.light': None, 'world.stream.experts': Experts()})
TINY_WAN = change(
    TINY,
    {
        'world.dit.memory': False,
        'world.dit.camera_channels': dit.Config().camera_channels,
        'world.dit.sigma_theta': 0.0,
        'world.dit.actions': None,
        'world.vae.time_sees_first': False,
        'world.light': None,
        'world.clip': ClipConfig(solver=unipc.Config(2), longest=5),
    },
)
_FEW = Train(steps=2, batch=2, log_every=1)
TINY_LIGHT = dataclasses.replace(TINY_BASE, stage=LightDecoder(frames=9), train=_FEW)
TINY_MEMORY = dataclasses.replace(
    TINY_BASE, stage=MemoryFlow(clip_frames=33, null_share=0.2, error_frames=8), train=_FEW
)
TINY_MEMORY_DMD = change(
    TINY_MEMORY,
    {'world.stream.guidance': 1.0, 'stage': MemorySelfForcing(clip_frames=33, rollout=2, ratio=2)},
)
