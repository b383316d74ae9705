"""Ablations of the streaming stages (3 and 4 of the paper) on the driving world.

Each recipe changes one setting of `carracing:SWIN` (or `:STREAM`) and starts from the same weights,
those of `carracing:BASE` (or `:SWIN`). `python -m matrix_jax.benchmark.scripts.ablations` trains
and measures them one after the other.

    matrix-jax train ablations:G8 --out runs/g8 --weights runs/base/weights
"""

from matrix_jax.recipes import change, load

DEFAULT = 'SWIN'
# The baseline, shorter than the trained world. Error recycling would double the cost of a step.
SWIN = change(load('carracing:SWIN'), {'train.steps': 300, 'stage.recycle': 0.0})
# Number of noise groups: one latent frame each, 20 (or 24) solver steps from noise to image.
G2 = change(
    SWIN, {'world.stream.groups': 2, 'world.stream.head_group': 1, 'stage.binding_groups': (0, 1)}
)
G8 = change(
    SWIN, {'world.stream.groups': 8, 'world.stream.head_group': 4, 'world.stream.steps': 24}
)
# Labels: half or a tenth of the recordings keep their controls; the others count as unlabelled.
LABELS_50 = change(SWIN, {'stage.label_share': 0.5})
LABELS_10 = change(SWIN, {'stage.label_share': 0.1})
# The same tenth, without unlabelled footage.
LABELS_10_ALONE = change(LABELS_10, {'stage.labelled': 1.0})
STREAM = change(load('carracing:STREAM'), {'train.steps': 300})
# Recorded windows only, without rollouts; then with the other objective.
STREAM_NO_ROLLOUT = change(STREAM, {'stage.rollout': 0})
STREAM_WINDOW = change(STREAM_NO_ROLLOUT, {'stage.objective': 'window'})
