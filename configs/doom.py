"""Doom, the bundled first-person world: 96x160 at 16 fps, keyboard and mouse, on a laptop CPU.

    matrix-jax collect vizdoom --out data/doom --hours 0.5 --themes hall
    matrix-jax train doom:VAE        --out runs/vae
    matrix-jax train doom:VAE_LONG   --out runs/long --weights runs/vae/weights
    matrix-jax train doom:FOUNDATION --out runs/base --weights runs/long/weights
    matrix-jax train doom:CAUSAL     --out runs/causal --weights runs/base/weights
    matrix-jax generate doom:CAUSAL  --weights runs/causal/weights
    matrix-jax train doom:FOUNDATION --out runs/teacher --weights runs/causal/weights
    matrix-jax train doom:DMD        --out runs/dmd --weights runs/causal/weights \\
        --stage.teacher runs/teacher/weights
    matrix-jax generate doom:DMD     --weights runs/dmd/weights

CAUSAL learns to stream from recordings. ODE learns from the denoising paths of FOUNDATION, as
published, which takes longer. PLAY is the bundled world: the weights of DMD, four steps per block.
The weights of CAUSAL play best with `--world.stream.action_guidance 1.5`.
"""

import dataclasses

from matrix_jax.config import Run, Train
from matrix_jax.diffusion import flow
from matrix_jax.dit.wan_actions import ActionConfig
from matrix_jax.dit.wan_config import Config as Dit
from matrix_jax.encoders.clip_image import Config as Image
from matrix_jax.recipes import change
from matrix_jax.stream.causal import Config as Causal
from matrix_jax.train.dmd import SelfForcing
from matrix_jax.train.flow_matching import CausalFlow, Foundation
from matrix_jax.train.ode import ODEPairs
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.vae import Autoencode
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.matrix_game_2 import ClipConfig, Config

DEFAULT = 'PLAY'
IMAGE = Image(image=56, dim=64, heads=2, layers=3)
# 60 tokens per latent frame. A block is one latent frame (4 frames) and attends to the eight (2
# seconds) before it. Published blocks have three; one is easier for so small a network.
DIT = Dit(
    heads=4,
    head_dim=48,
    layers=6,
    mlp=576,
    time_dim=64,
    image_dim=IMAGE.dim,
    image_length=IMAGE.tokens,
    local=9,
    actions=ActionConfig(
        end=3,
        embed=16,
        keyboard_width=128,
        mouse_width=128,
        heads=4,
        axes=(8, 12, 12),
        gain=10.0,
        modulate=True,
    ),
)
# Small frames need less noise than large ones: a shift of 3 instead of 5.
WORLD = Config(
    name='Doom',
    dit=DIT,
    vae=vae.PRESETS['doom'],
    image=IMAGE,
    height=96,
    width=160,
    fps=16,
    flow=flow.Config(shift=3.0, weighting='even'),
    stream=Causal(frames=1, steps=(1000, 750, 500, 250), condition_on_last_frame=True),
)

MUON = Optimizer(
    kind='muon', learning_rate=3e-3, adam_rate=1e-3, schedule='cosine', warmup=50, weight_decay=0.0
)
# Short clips first, because they are cheap; then longer ones, because all but the first latent
# frames are encoded with the frames before them.
VAE = Run(
    world=WORLD,
    data='data/doom',
    stage=Autoencode(ema=0.99, optimizer=MUON),
    train=Train(steps=2400, batch=2, save_every=200),
)
VAE_LONG = Run(
    world=WORLD,
    data='data/doom',
    stage=Autoencode(
        frames=25, ema=0.99, optimizer=dataclasses.replace(MUON, learning_rate=2e-3, adam_rate=5e-4)
    ),
    train=Train(steps=600, batch=1, save_every=100),
)
FOUNDATION = Run(
    world=change(WORLD, {'clip': ClipConfig(steps=20, longest=12), 'dit.local': None}),
    data='data/doom',
    stage=Foundation(
        ema=0.995, train_encoders=True, optimizer=dataclasses.replace(MUON, warmup=100)
    ),
    train=Train(steps=3000, batch=4, save_every=100),
)
# Directly from recordings, with eight steps per block.
CAUSAL = Run(
    world=change(WORLD, {'stream.steps': tuple(range(1000, 0, -125))}),
    data='data/doom',
    stage=CausalFlow(
        ema=0.995,
        train_encoders=True,
        history_noise=0.2,
        optimizer=dataclasses.replace(MUON, warmup=100),
    ),
    train=Train(steps=3000, batch=4, save_every=100),
)
SLOW = Optimizer(learning_rate=1e-4, schedule='cosine', warmup=20, weight_decay=0.0)
ODE = Run(
    world=WORLD,
    data='data/doom',
    stage=ODEPairs(ema=0.99, points=5, paths=512, optimizer=SLOW),
    train=Train(steps=1000, batch=8, save_every=100),
)
# The teacher is guided by actions; the student learns the result and needs no guidance.
DMD = Run(
    world=WORLD,
    data='data/doom',
    stage=SelfForcing(
        ratio=3,
        ema=0.98,
        action_guidance=1.5,
        optimizer=Optimizer(learning_rate=5e-5, b1=0.0, b2=0.999, weight_decay=0.0),
        critic=Optimizer(learning_rate=1e-4, b1=0.0, b2=0.999, weight_decay=0.0),
    ),
    train=Train(steps=600, batch=2, save_every=50),
)

PLAY = Run(world=WORLD, weights='doom')
