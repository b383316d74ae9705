"""Ablations of the streaming stages (3 and 4 of the paper) on the driving world.

Each recipe changes one setting of `carracing:SWIN` (or `:STREAM`) and starts from the same weights,
those of `carracing:BASE` (or `:SWIN`). `python -m matrix_jax.benchmark.scripts.ablations` trains
and measures them one after the other.

    matrix-jax train ablations:G8 --out runs/g8 --weights runs/base/weights
"""

import dataclasses

from matrix_jax.recipes import load

DEFAULT = 'SWIN'


def _changed(recipe, stream=None, steps=300, **stage):
    run = load(recipe)
    world = dataclasses.replace(
        run.world, stream=dataclasses.replace(run.world.stream, **stream or {})
    )
    train = dataclasses.replace(run.train, steps=steps)
    return dataclasses.replace(
        run, world=world, stage=dataclasses.replace(run.stage, **stage), train=train
    )


def _swin(stream=None, **stage):
    # Error recycling would double the cost of a step.
    return _changed('carracing:SWIN', stream, recycle=0.0, **stage)


SWIN = _swin()  # the baseline
# Number of noise groups: one latent frame each, 20 (or 24) solver steps from noise to image.
G2 = _swin({'groups': 2, 'head_group': 1})
G8 = _swin({'groups': 8, 'steps': 24, 'head_group': 4})
# Labels: half or a tenth of the recordings keep their controls; the others count as unlabelled.
LABELS_50 = _swin(label_share=0.5)
LABELS_10 = _swin(label_share=0.1)
# The same tenth, without unlabelled footage.
LABELS_10_ALONE = _swin(label_share=0.1, labelled=1.0)
STREAM = _changed('carracing:STREAM')
# Recorded windows only, without rollouts; then with the other objective.
STREAM_NO_ROLLOUT = _changed('carracing:STREAM', rollout=0)
STREAM_WINDOW = _changed('carracing:STREAM', rollout=0, objective='window')
