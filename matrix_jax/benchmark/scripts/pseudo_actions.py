"""Compares keys and mouse estimated from camera poses with the recorded ones, on held-out clips.

    python -m matrix_jax.benchmark.scripts.pseudo_actions data/doom

The walker is fitted twice: to training recordings with known keys (`curate.calibrate`), and to the
same recordings without labels (`curate.estimate`).
"""

import argparse
from pathlib import Path

import numpy as np

from matrix_jax.config import UsageError, main_guard
from matrix_jax.data import curate, records

LEARN = 60  # clips that the walker is fitted to
RISE = 2.0  # units per frame above which the camera is on stairs or a lift, or falls


def clips(data, split):
    """All clips of a split with keys, mouse and poses."""
    for path in records.shards(Path(data), split):
        shard = records.Shard(path)
        for index in range(len(shard)):
            clip = shard[index]
            if all(map(clip.knows, ('keyboard', 'mouse', 'pose'))):
                yield clip


def first(clips, count):
    return [clip for clip, _ in zip(clips, range(count))]


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', help='recordings of matrix-jax collect vizdoom')
    data = parser.parse_args(argv).data
    learned, judged = first(clips(data, 'train'), LEARN), list(clips(data, 'heldout'))
    if not (learned and judged):
        raise UsageError(
            f'{data}: got no clips with keys, mouse and poses in both splits, '
            'expected recordings of matrix-jax collect vizdoom'
        )
    walkers = {
        'calibrated': curate.calibrate(learned),
        'estimated': curate.estimate([clip.pose for clip in learned], learned[0].fps),
    }
    truth = np.concatenate([clip.keyboard for clip in judged])
    turns = np.concatenate([clip.mouse for clip in judged])
    print(f'{len(judged)} held-out clips, {len(truth)} frames')
    for name, walker in walkers.items():
        if walker is None:
            print(f'{name}: no walker fits')
            continue
        made = [curate.label(clip, walker) for clip in judged]
        found = np.concatenate([clip.keyboard for clip in made])
        free = np.concatenate(
            [~curate.blocked(clip.pose, clip.fps, clip.keyboard, walker) for clip in judged]
        )
        rise = np.concatenate(
            [np.abs(np.diff(clip.pose[:, 2], prepend=clip.pose[0, 2])) > RISE for clip in judged]
        )
        print(f'{name}: speed {walker.speed:.0f} units a second, drag {walker.drag:.3f}')
        for what, where in (
            ('all frames', None),
            ('nothing in the way', free),
            ('nothing in the way, height changes', free & rise),
        ):
            scores = curate.agreement(found, truth, where)
            keys = '  '.join(
                f'{key} {one["recall"]:.3f}/{one["precision"]:.3f}'
                for key, one in scores.items()
                if key != 'all'
            )
            count = len(truth) if where is None else int(where.sum())
            print(
                f'  {what}, {count} frames: all four keys right {scores["all"]["accuracy"]:.3f}; '
                f'recall/precision {keys}'
            )
        error = np.abs(np.concatenate([clip.mouse for clip in made]) - turns)
        print(
            f'  mouse: mean error {error.mean():.4f}, 99th percentile '
            f'{np.quantile(error, 0.99):.4f}, of a mean turn of {np.abs(turns[:, 1]).mean():.3f}'
        )


if __name__ == '__main__':
    main_guard(main)
