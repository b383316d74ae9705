"""The open questions of the paper's stage 3 and of our stage 4, on the driving world, one by one.

Each recipe changes one thing of `carracing:SWIN` (or `:STREAM`) and starts from the same weights,
those of `carracing:BASE` (or `:SWIN`). `matrix_jax.benchmark.scripts.ablations` trains and measures them in turn.

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
    # Without error recycling, which doubles the cost of a step.
    return _changed('carracing:SWIN', stream, recycle=0.0, **stage)


SWIN = _swin()  # what the others differ from
# Window and groups: one latent frame each, 20 solver steps from noise to picture in all of them.
G2 = _swin({'groups': 2, 'head_group': 1})
G8 = _swin({'groups': 8, 'steps': 24, 'head_group': 4})
# Labels: half or a tenth of the recordings keep theirs; the others stay in as plain footage.
LABELS_50 = _swin(label_share=0.5)
LABELS_10 = _swin(label_share=0.1)
# The same tenth, and no footage without labels.
LABELS_10_ALONE = _swin(label_share=0.1, labelled=1.0)
STREAM = _changed('carracing:STREAM')
# Recorded windows only; and the other objective on them.
STREAM_NO_ROLLOUT = _changed('carracing:STREAM', rollout=0)
STREAM_WINDOW = _changed('carracing:STREAM', rollout=0, objective='window')
