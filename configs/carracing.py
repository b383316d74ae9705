"""CarRacing, the bundled driving world: 64x96 at 16 fps, playable on a laptop CPU.

    matrix-jax collect CarRacing-v3 --out data/carracing --hours 1 --themes all
    matrix-jax train carracing:VAE      --out runs/vae
    matrix-jax train carracing:VAE_LONG --out runs/long --weights runs/vae/weights
    matrix-jax train carracing:BASE     --out runs/base --weights runs/long/weights
    matrix-jax train carracing:SWIN     --out runs/swin --weights runs/base/weights
    matrix-jax train carracing:STREAM   --out runs/stream --weights runs/swin/weights
    matrix-jax generate carracing:STREAM --weights runs/stream/weights
    matrix-jax train carracing:REWARD   --out runs/reward      # for agents

The weights of the last three stages are bundled: PLAY uses those of STREAM, TEACHER those of SWIN,
and CLIPS those of BASE, which makes clips of two seconds from noise.
"""

import dataclasses

from matrix_jax.config import Run, Train
from matrix_jax.diffusion.sampling import Config as ClipConfig
from matrix_jax.dit import cogvideox as dit
from matrix_jax.encoders import clip, t5
from matrix_jax.recipes import change
from matrix_jax.stream.swin import Config as Swin
from matrix_jax.train.consistency import StreamConsistency
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.reward import Reward
from matrix_jax.train.swin_dpm import SwinDPM
from matrix_jax.train.vae import Autoencode
from matrix_jax.train.whole_clip import WholeClip
from matrix_jax.vae import cogvideox as vae
from matrix_jax.worlds.the_matrix import Config

DEFAULT = 'PLAY'
# Three clean latent frames of context, because one does not show speed and turn rate.
WORLD = Config(
    name='CarRacing',
    dit=dit.PRESETS['carracing'],
    text=t5.PRESETS['carracing'],
    vae=vae.PRESETS['carracing'],
    control=clip.PRESETS['carracing'],
    height=64,
    width=96,
    decode_chunk=1,
    prompt='A red car drives on a grey road through a green meadow.',
    stream=Swin(
        groups=4,
        group_frames=1,
        context=3,
        steps=20,
        solver='ddim',
        control_binding='early',
        head_group=0,
    ),
)

MUON = Optimizer(
    kind='muon', learning_rate=3e-3, adam_rate=1e-3, schedule='cosine', warmup=50, weight_decay=0.0
)

# Quarters of many short clips first, because they are cheap and differ more; then whole frames of
# longer clips.
VAE = Run(
    world=WORLD,
    data='data/carracing',
    stage=Autoencode(frames=9, crop=(32, 48), absolute=0.5, square=4.0, ema=0.99, optimizer=MUON),
    train=Train(steps=1000, batch=16, save_every=100),
)
VAE_LONG = Run(
    world=WORLD,
    data='data/carracing',
    stage=Autoencode(
        frames=17,
        absolute=0.25,
        square=6.0,
        edges=0.25,
        rare=0.2,
        ema=0.99,
        optimizer=dataclasses.replace(MUON, learning_rate=2e-3, adam_rate=3e-4),
    ),
    train=Train(steps=5000, batch=2, save_every=100),
)
# Stage 2: whole clips of two seconds from text and keys alone.
BASE = Run(
    world=dataclasses.replace(
        WORLD, clip=ClipConfig(steps=20, guidance=1.0, solver='ddim', longest=2)
    ),
    data='data/carracing',
    stage=WholeClip(
        clip_frames=(33,),
        ema=0.995,
        text_dropout=0.05,
        train_encoders=True,
        optimizer=dataclasses.replace(MUON, warmup=100),
    ),
    train=Train(steps=900, batch=8),
)
SWIN = Run(
    world=WORLD,
    data='data/carracing',
    stage=SwinDPM(
        ema=0.995,
        text_dropout=0.05,
        condition_noise=100,
        late_binding=0.7,
        binding_groups=(0, 1, 2),
        stale=0.5,
        uniform=0.35,
        recycle=1.0,
        train_encoders=True,
        optimizer=dataclasses.replace(MUON, warmup=100),
    ),
    train=Train(steps=4800, batch=8),
)
# One network call per shift, distilled from the stream of SWIN with guidance by the keys.
STREAM = Run(
    world=change(WORLD, {'stream.steps': 4, 'stream.solver': 'lcm'}),
    data='data/carracing',
    stage=StreamConsistency(
        ema=0.99,
        rollout=8,
        control_guidance=3.0,
        binding_groups=(0, 1, 2),
        optimizer=dataclasses.replace(MUON, learning_rate=5e-4, adam_rate=1e-4),
    ),
    train=Train(steps=1500, batch=8),
)
# What agents are paid for: the road and the speed, read from frames.
REWARD = Run(
    world=WORLD,
    data='data/carracing',
    stage=Reward(ema=0.99, optimizer=Optimizer(learning_rate=2e-3, schedule='cosine', warmup=20)),
    train=Train(steps=1000, batch=32, save_every=200),
)

PLAY = Run(world=STREAM.world, weights='carracing')
# Twenty steps from noise to image; guidance calls the network twice per step.
TEACHER = Run(world=change(WORLD, {'stream.control_guidance': 3.0}), weights='carracing_swin')
CLIPS = Run(world=BASE.world, weights='carracing_base')
