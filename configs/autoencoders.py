"""Autoencoders of the driving world, compared at the same cost.

`LEAN` has the sizes of `carracing:VAE`; each other recipe changes one thing of it.
`python -m matrix_jax.benchmark.scripts.autoencoders` trains and measures them one after the other.

    matrix-jax train autoencoders:LEAN --data data/carracing --out runs/lean
"""

import dataclasses

from matrix_jax.recipes import change, load
from matrix_jax.train.vae import Autoencode

DEFAULT = 'LEAN'

BASELINE = load('carracing:VAE')
WHOLE_CLIPS = {
    'stage.frames': 17,
    'stage.crop': (),
    'stage.absolute': 0.5,
    'stage.square': 4.0,
    'train.batch': 2,
}
# Quarters of sixteen clips cost as much as two whole clips, and differ more.
QUARTERS = {'stage.frames': 9, 'stage.crop': (32, 48), 'train.batch': 16}
LOSS = {'stage.absolute': 0.25, 'stage.square': 6.0, 'stage.edges': 0.25, 'stage.rare': 0.2}


def _variant(steps, fields=None, **sizes):
    vae = dataclasses.replace(BASELINE.world.vae, **sizes)
    height, width = (
        size // vae.spatial_compression for size in (BASELINE.world.height, BASELINE.world.width)
    )
    changes = {
        'world.vae': vae,
        'world.dit.channels': vae.latent_channels,
        'world.dit.sample': (width, height, *BASELINE.world.dit.sample[2:]),
        'train.steps': steps,
    }
    return change(BASELINE, changes | WHOLE_CLIPS | (fields or {}))


# As many steps as six minutes of one core allow.
LEAN = _variant(640)
WIDE = _variant(340, block_out_channels=(64, 96, 128))
SQUARE = _variant(640, {'stage.absolute': 0.0, 'stage.edges': 0.0})
CROPS = _variant(640, QUARTERS)
EIGHT = _variant(640, QUARTERS, latent_channels=8)
SHORTCUTS = _variant(640, QUARTERS, resampling='shortcut')
TOKENS = _variant(320, QUARTERS, block_out_channels=(48, 64, 64), spatial_levels=0)

# That of the first driving world, with the default loss.
_FIRST = Autoencode()
FIRST = _variant(
    1440,
    {'stage.frames': 9, 'stage.absolute': _FIRST.absolute, 'stage.square': _FIRST.square},
    latent_channels=8,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    patch_size=2,
    spatial_levels=None,
    time_taps=(),
    resampling='average',
    norm_frames='chunk',
    modulated=True,
)

# A long training of CROPS, then on whole frames:
#     matrix-jax train autoencoders:LONG  --out runs/long --weights runs/crops/weights
#     matrix-jax train autoencoders:WHOLE --out runs/whole --weights runs/long/weights
LONG = _variant(3400, QUARTERS | LOSS | {'stage.ema': 0.995})
WHOLE = _variant(
    1200, LOSS | {'stage.optimizer.learning_rate': 1e-3, 'stage.optimizer.adam_rate': 3e-4}
)
