"""The Matrix as released: 480x720 at 16 fps, sizes of CogVideoX-2b; needs --weights.

Each stage trains from the weights of the one before, the first three with the published settings:

    matrix-jax train the_matrix:STAGE1 --data DIR --out runs/1 --weights THUDM/CogVideoX-2b
    matrix-jax train the_matrix:STAGE2 --data DIR --out runs/2 --weights runs/1/weights
    matrix-jax train the_matrix:STAGE3 --data DIR --out runs/3 --weights runs/2/weights
    matrix-jax train the_matrix:STAGE4 --data DIR --out runs/4 --weights runs/3/weights
"""

import dataclasses

from matrix_jax.config import Mesh, Run, Train
from matrix_jax.diffusion.sampling import Config as ClipConfig
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5
from matrix_jax.recipes import change
from matrix_jax.stream.swin import Config as Swin
from matrix_jax.train.consistency import StreamConsistency
from matrix_jax.train.reward import Reward
from matrix_jax.train.swin_dpm import SwinDPM
from matrix_jax.train.vae import Autoencode
from matrix_jax.train.whole_clip import ControlSFT, LoRA, WholeClip
from matrix_jax.vae import cogvideox as vae
from matrix_jax.worlds.the_matrix import Config

DEFAULT = 'STAGE4'
# Norms still compute in float32.
VAE = dataclasses.replace(vae.PRESETS['released'], single_latent_frames=4, dtype='bfloat16')

# 8 clips on each of 8 devices. Sharding the frozen text encoder would gather it in every update.
PUBLISHED = Train(steps=100_000, batch=64, seed=42, save_every=200, shard_frozen=False)

# Stages 1 and 2 make whole clips of 65 frames; STAGE3 and STAGE4 stream.
STAGE2 = Run(
    world=Config(
        vae=vae.PRESETS['released'], stream=Swin(groups=1, group_frames=16), clip=ClipConfig()
    ),
    stage=ControlSFT(),
    train=PUBLISHED,
)
STAGE1 = change(STAGE2, {'world.dit': dit.PRESETS['2b'], 'stage': LoRA()})
STAGE3 = Run(
    world=Config(
        vae=VAE, stream=Swin(groups=4, group_frames=4, steps=20, solver='dpm', guidance=6.0)
    ),
    stage=SwinDPM(clip_frames=(33, 65)),
    train=PUBLISHED,
)
STAGE4 = Run(
    world=Config(
        vae=VAE, stream=Swin(groups=4, group_frames=2, steps=4, solver='lcm', original_steps=40)
    ),
    stage=StreamConsistency(guidance=6.0, rollout=8),
    train=PUBLISHED,
)
# The published interactive setting: one latent frame per shift, decoded alone.
LIVE = Run(
    world=Config(
        vae=VAE,
        decode_chunk=1,
        stream=Swin(
            groups=4,
            group_frames=1,
            steps=4,
            solver='lcm',
            original_steps=40,
            control_binding='early',
        ),
    )
)
# LIVE on eight devices: five for the network, three for its decoder.
LIVE8 = dataclasses.replace(LIVE, mesh=Mesh(pipeline='5dit_3vae'))
# About 100 million parameters and random weights, for comparisons on a CPU.
MEDIUM = Run(
    world=Config(
        dit=dit.Config(
            heads=10,
            layers=12,
            time_dim=256,
            text_dim=64,
            text_length=64,
            spatial_scale=1.0,
            sample=(20, 12, 33),
            control=dit.ControlConfig(dim=64, start=6, end=12),
        ),
        vae=vae.Config(
            block_out_channels=(32, 64, 64, 128),
            layers_per_block=2,
            norm_groups=8,
            sample_height=96,
            sample_width=160,
        ),
        text=t5.PRESETS['carracing'],
        control=clip.PRESETS['carracing'],
        height=96,
        width=160,
        stream=Swin(groups=4, group_frames=2, steps=4, solver='ddim'),
    )
)
# Every component at test size: random weights, seconds to compile.
TINY = Run(
    world=Config(
        dit=dataclasses.replace(
            dit.PRESETS['tiny'],
            text_dim=16,
            text_length=12,
            control=dit.ControlConfig(dim=16, start=1, end=3),
        ),
        vae=dataclasses.replace(vae.PRESETS['tiny'], single_latent_frames=4),
        text=t5.PRESETS['tiny'],
        control=clip.PRESETS['tiny'],
        height=32,
        width=48,
        stream=Swin(groups=4, group_frames=2, steps=4, solver='ddim'),
    )
)
_FEW = Train(steps=2, batch=2, log_every=1)
TINY_CLIP = change(TINY, {'world.clip': ClipConfig(steps=2)})
TINY_VAE = change(TINY, {'stage': Autoencode(), 'train': Train(steps=2, batch=1, log_every=1)})
TINY_LORA = change(
    TINY,
    {'stage': LoRA(clip_frames=(9,), rank=4, alpha=4.0), 'train': _FEW, 'world.dit.control': None},
)
TINY_CONTROL = change(TINY, {'stage': ControlSFT(clip_frames=(9,)), 'train': _FEW})
TINY_WHOLE = change(TINY, {'stage': WholeClip(clip_frames=(9,)), 'train': _FEW})
TINY_SWIN = change(
    TINY,
    {
        'stage': SwinDPM(),
        'train': _FEW,
        'world.decode_chunk': 1,
        'world.stream.groups': 2,
        'world.stream.group_frames': 1,
    },
)
TINY_REWARD = change(TINY, {'stage': Reward(), 'train': _FEW})
TINY_CONSISTENCY = change(
    TINY_SWIN,
    {'stage': StreamConsistency(points=2), 'world.stream.steps': 2, 'world.stream.solver': 'lcm'},
)
