"""The small training run that several scripts repeat: its clips and its command line."""

import os
import sys
from pathlib import Path

import numpy as np

RECIPE = 'the_matrix:TINY_SWIN'


def make_clips(folder: Path):
    """Writes three clips of a moving square to `folder`, which is made."""
    from matrix_jax.data import records

    def clip(index):
        frames = np.full((17, 32, 48, 3), 40 * index + 60, np.uint8)
        for step, frame in enumerate(frames):
            frame[8:20, step : step + 10] = 200
        return records.Clip(
            frames=frames,
            controls=np.full(17, index, np.int8),
            caption='A car on a road.',
            theme='meadow',
            seed=index,
            fps=16,
            telemetry=np.zeros((17, len(records.TELEMETRY)), np.float32),
        )

    folder.mkdir()
    records.write_shard(folder / f'train-0{records.SUFFIX}', map(clip, range(3)))


def command(data: Path, out: Path, **options) -> list[str]:
    """The command that trains `RECIPE`; each option `name=value` becomes `--name value`."""
    flags = [str(word) for name, value in options.items() for word in (f'--{name}', value)]
    train = [sys.executable, '-m', 'matrix_jax', 'train', RECIPE]
    return [*train, '--data', str(data), '--out', str(out), *flags]


def environment(**variables: str) -> dict[str, str]:
    """The environment of such a process: this one's, on the CPU."""
    return os.environ | {'JAX_PLATFORMS': 'cpu', **variables}
