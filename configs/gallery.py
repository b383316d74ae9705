"""Gallery, coloured rooms to walk in: 96x160 at 16 fps, with networks of `doom` or with memory.

    matrix-jax collect vizdoom --out data/gallery --hours 10 --themes gallery
    matrix-jax train gallery:VAE        --out runs/vae
    matrix-jax train gallery:VAE_LONG   --out runs/long --weights runs/vae/weights
    matrix-jax train gallery:FOUNDATION --out runs/base --weights runs/long/weights
    matrix-jax train gallery:CAUSAL     --out runs/causal --weights runs/base/weights
    matrix-jax train gallery:FOUNDATION --out runs/teacher --weights runs/causal/weights
    matrix-jax train gallery:DMD        --out runs/dmd --weights runs/causal/weights \\
        --stage.teacher runs/teacher/weights
    matrix-jax generate gallery:DMD     --weights runs/dmd/weights --prompt gallery-unseen

A Matrix-Game 3.0 of this size, on the same recordings and autoencoder:

    matrix-jax train gallery:MEMORY     --out runs/memory --weights runs/long/weights
    matrix-jax train gallery:MEMORY_DMD --out runs/memory_dmd --weights runs/memory/weights
    matrix-jax evaluate gallery:MEMORY_DMD --weights runs/memory_dmd/weights --data data/gallery
    matrix-jax train gallery:LIGHT_50   --out runs/light_50 --weights runs/memory_dmd/weights
    matrix-jax generate gallery:MEMORY_LIGHT --weights runs/light_50/weights --image a.png

REWARD trains what agents are paid for, to reach a picture or a pillar:

    matrix-jax train gallery:REWARD --out runs/reward

NO_MEMORY is the same network without memory, NO_ERRORS that without error buffer. No world has been
trained with these recipes yet; only the reward is bundled.
"""

import dataclasses

from matrix_jax.config import Run, Train
from matrix_jax.diffusion import unipc
from matrix_jax.dit.wan_actions import ActionConfig
from matrix_jax.dit.wan_memory_config import Config as Dit
from matrix_jax.encoders import t5
from matrix_jax.nn.camera import Config as Camera
from matrix_jax.recipes import change, load
from matrix_jax.stream.memory import Config as Memory
from matrix_jax.train.light_decoder import LightDecoder
from matrix_jax.train.memory_dmd import MemorySelfForcing
from matrix_jax.train.memory_flow import MemoryFlow
from matrix_jax.train.optim import Optimizer
from matrix_jax.worlds.matrix_game_3 import Config as MemoryConfig

DEFAULT = 'DMD'


def _recipe(name: str) -> Run:
    return change(load(f'doom:{name}'), {'data': 'data/gallery', 'world.name': 'Gallery'})


VAE = _recipe('VAE')
VAE_LONG = _recipe('VAE_LONG')
FOUNDATION = _recipe('FOUNDATION')
CAUSAL = _recipe('CAUSAL')
DMD = _recipe('DMD')


# --- with memory -------------------------------------------------------------------------------

TEXT = t5.PRESETS['carracing']
# 60 tokens per latent frame, six latent frames per call: two of memory, two of history, two new.
MEMORY_DIT = Dit(
    heads=4,
    head_dim=48,
    in_channels=16,
    channels=16,
    layers=6,
    mlp=576,
    time_dim=64,
    text_dim=TEXT.dim,
    text_length=64,
    camera_channels=6 * VAE.world.vae.spatial_compression**2,
    actions=ActionConfig(
        end=3,
        keyboard=6,
        embed=16,
        keyboard_width=128,
        mouse_width=128,
        heads=4,
        axes=(8, 12, 12),
        gain=10.0,
    ),
)
# The walker's camera, measured on recordings: 16 map units per frame, focal length of 80 pixels.
# A room is at most 7.7 world units wide.
CAMERA = Camera(step=16.0, diagonal=14.0, degrees=37.5, focal=(80 / 160, 80 / 96), far=10.0)
# Segments of half a second. The bank holds the last minute, the length of a recording.
STREAM = Memory(
    first=4,
    overlap=2,
    new=2,
    capacity=242,
    reference_offsets=(0, 4),
    fixed_memory=None,
    furthest=240,
    camera=CAMERA,
    solver=unipc.Config(steps=8, shift=3.0),
)
MEMORY_WORLD = MemoryConfig(
    name='GalleryMemory',
    dit=MEMORY_DIT,
    vae=VAE.world.vae,
    light=None,
    text=TEXT,
    stream=STREAM,
    height=96,
    width=160,
    fps=16,
    prompt='Walking through a bright gallery, first person.',
)
MUON = Optimizer(
    kind='muon', learning_rate=3e-3, adam_rate=1e-3, schedule='cosine', warmup=100, weight_decay=0.0
)
MEMORY = Run(
    world=MEMORY_WORLD,
    data='data/gallery',
    stage=MemoryFlow(clip_frames=961, ema=0.995, train_encoders=True, optimizer=MUON),
    train=Train(steps=30000, batch=2, save_every=200),
)
# The same network without memory, and with memory but without error buffer.
NO_MEMORY = change(MEMORY, {'world.stream.reference_offsets': ()})
NO_ERRORS = change(MEMORY, {'stage.error_frames': 0})
# Three steps per segment, trained on segments that the student makes itself.
_SLOW = Optimizer(learning_rate=5e-5, b1=0.0, b2=0.999, weight_decay=0.0)
MEMORY_DMD = change(
    MEMORY,
    {
        'world.stream.solver.steps': 3,
        'stage': MemorySelfForcing(
            clip_frames=961,
            rollout=8,
            ratio=3,
            ema=0.98,
            optimizer=_SLOW,
            critic=dataclasses.replace(_SLOW, learning_rate=1e-4),
        ),
        'train.steps': 1500,
    },
)
NO_MEMORY_DMD = change(MEMORY_DMD, {'world.stream.reference_offsets': ()})
# Decoders with half and a quarter of the channels, distilled from the full one.
LIGHT_50 = change(
    MEMORY_DMD,
    {
        'stage': LightDecoder(ema=0.99, optimizer=dataclasses.replace(MUON, warmup=50)),
        'train': Train(steps=2000, batch=2, save_every=200),
    },
)
LIGHT_75 = change(LIGHT_50, {'stage.rate': 0.75})
# The world with a light decoder; its weights folder says how many channels that has.
MEMORY_LIGHT = change(
    MEMORY_DMD, {'world.light': dataclasses.replace(VAE.world.vae, decoder_dim=8), 'stage': None}
)
# What agents are paid for: to reach a picture or a pillar, read from frames.
REWARD = change(
    load('carracing:REWARD'), {'world': DMD.world, 'data': DMD.data, 'stage.task': 'landmark'}
)
