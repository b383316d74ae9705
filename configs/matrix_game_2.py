"""Matrix-Game 2.0 as released: 352x640 at 25 fps, Wan 2.1 with 1.3B parameters; needs --weights.

    matrix-jax generate matrix_game_2:UNIVERSAL --weights DIR --image a.png --actions "W*48"
    matrix-jax play matrix_game_2:UNIVERSAL --weights DIR

DIR is the published folder. Its two pickles have to be converted once:

    matrix-jax convert DIR/Wan2.1_VAE.pth DIR/vae --recipe matrix_game_2:UNIVERSAL
    matrix-jax convert DIR/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth \\
        DIR/image_encoder --recipe matrix_game_2:UNIVERSAL

The first block of a stream has 9 frames and every other one 12, so a video has 9 + 12k frames.
UNIVERSAL has four keys and a mouse; in GTA_DRIVE the mouse steers (keys A and D); TEMPLERUN has no
mouse. FOUNDATION, the teacher, makes whole clips in many steps. To train:

    matrix-jax train matrix_game_2:FOUNDATION --weights DIR --data ...      whole clips
    matrix-jax train matrix_game_2:CAUSAL --weights FOUNDATION_DIR ...      blocks, flow matching
    matrix-jax train matrix_game_2:ODE --weights FOUNDATION_DIR ...         blocks, teacher's paths
    matrix-jax train matrix_game_2:DMD --weights ODE_DIR --stage.teacher FOUNDATION_DIR ...
"""

import dataclasses

from matrix_jax.config import Run, Train
from matrix_jax.dit import wan as dit
from matrix_jax.encoders import clip_image
from matrix_jax.recipes import change
from matrix_jax.stream.causal import Config as Causal
from matrix_jax.train.dmd import SelfForcing
from matrix_jax.train.flow_matching import CausalFlow, Foundation
from matrix_jax.train.ode import ODEPairs
from matrix_jax.train.optim import Optimizer
from matrix_jax.vae import wan as vae
from matrix_jax.worlds.matrix_game_2 import ClipConfig, Config

DEFAULT = 'UNIVERSAL'
VAE = dataclasses.replace(vae.PRESETS['wan_2_1'], dtype='bfloat16')
IMAGE = dataclasses.replace(clip_image.PRESETS['vit_h_14'], dtype='bfloat16')

UNIVERSAL = Run(world=Config(vae=VAE, image=IMAGE))
GTA_DRIVE = Run(world=Config(vae=VAE, image=IMAGE, dit=dit.PRESETS['gta_drive'], mode='gta_drive'))
TEMPLERUN = Run(
    world=Config(
        vae=VAE,
        image=IMAGE,
        dit=dit.PRESETS['templerun'],
        mode='templerun',
        stream=Causal(steps=(1000, 750, 500, 250)),
    )
)
FOUNDATION = Run(
    world=Config(vae=VAE, image=IMAGE, dit=dit.PRESETS['foundation'], clip=ClipConfig()),
    stage=Foundation(clip_frames=81),
    train=Train(steps=120000, batch=64),
)
# A student starts from the layers of FOUNDATION, all 30 of which read actions.
_STUDENT = Config(
    vae=VAE,
    image=IMAGE,
    dit=dataclasses.replace(dit.PRESETS['foundation'], local=6),
    stream=Causal(steps=(1000, 750, 500, 250)),
)
_SLOW = Optimizer(learning_rate=2e-6, weight_decay=0.0)
CAUSAL = Run(
    world=_STUDENT,
    stage=CausalFlow(clip_frames=81, optimizer=_SLOW),
    train=Train(steps=6000, batch=64),
)
ODE = Run(
    world=_STUDENT,
    stage=ODEPairs(clip_frames=81, optimizer=_SLOW),
    train=Train(steps=3000, batch=64),
)
DMD = Run(world=_STUDENT, stage=SelfForcing(clip_frames=81), train=Train(steps=3000, batch=64))

# Every component at test size: random weights, seconds to compile.
_TINY_IMAGE = clip_image.PRESETS['tiny']
_TINY_VAE = vae.Config(
    latent_channels=4,
    dim=4,
    multiples=(1, 2, 2),
    layers=1,
    halves_time=(True, True),
    latent_means=(),
    latent_stds=(),
)
_TINY_DIT = change(
    dit.PRESETS['tiny'],
    {
        'layers': 1,
        'image_dim': _TINY_IMAGE.dim,
        'image_length': _TINY_IMAGE.tokens,
        'actions.end': 1,
    },
)
TINY = Run(
    world=Config(
        dit=_TINY_DIT,
        vae=_TINY_VAE,
        image=_TINY_IMAGE,
        height=16,
        width=24,
        stream=Causal(steps=(1000, 500)),
    )
)
TINY_RUN = change(
    TINY,
    {'world.mode': 'templerun', 'world.dit.actions.keyboard': 7, 'world.dit.actions.mouse': None},
)
TINY_CLIP = change(TINY, {'world.clip': ClipConfig(steps=2), 'world.dit.local': None})
_ONE = Train(steps=2, batch=2, log_every=1)
_TINY_FEW = dict(clip_frames=21)  # two blocks
TINY_FOUNDATION = dataclasses.replace(
    TINY_CLIP, train=_ONE, stage=Foundation(**_TINY_FEW, train_encoders=True)
)
TINY_CAUSAL = dataclasses.replace(TINY, train=_ONE, stage=CausalFlow(**_TINY_FEW))
TINY_ODE = dataclasses.replace(TINY, train=_ONE, stage=ODEPairs(**_TINY_FEW, points=2))
TINY_DMD = dataclasses.replace(TINY, train=_ONE, stage=SelfForcing(**_TINY_FEW, ratio=2))
