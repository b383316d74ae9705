"""A stage of a world with memory, from recordings to weights."""

import numpy as np
import pytest

from matrix_jax.cli import train
from matrix_jax.data import records
from matrix_jax.weights.conversion import flatten
from matrix_jax.weights.diffusers_layout import read_component


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """A folder of clips whose view turns to the right, in the size of TINY."""
    folder, draw = tmp_path_factory.mktemp('clips'), np.random.default_rng(0)

    def clip(seed):
        known = records.unknown(41)
        known['keyboard'][:], known['mouse'][:], known['pose'][:] = 0, (0, 0.1), 0
        known['pose'][:, 3] = -np.deg2rad(1.5) * np.arange(41)
        return records.Clip(
            frames=draw.integers(0, 256, (41, 16, 24, 3), np.uint8),
            caption='a room',
            theme='',
            seed=seed,
            fps=17,
            **known,
        )

    records.write_shard(folder / f'train-0{records.SUFFIX}', [clip(0), clip(2)])
    return folder


def test_a_stage_trains_from_recordings_and_resumes(clips, tmp_path, capsys):
    def run(*more):
        train.main(
            [
                *('matrix_game_3:TINY_MEMORY', '--data', str(clips), '--out', str(tmp_path)),
                # One layer and one kind of segment, which compile in a fraction of the time.
                *('--world.dit.layers', '1', '--world.dit.actions.end', '1'),
                *('--stage.first_share', '0', '--stage.null_share', '0', *more),
            ]
        )
        return capsys.readouterr()

    assert 'step 2 loss' in run().out
    found = flatten(read_component(str(tmp_path / 'weights'), 'transformer')[1])
    assert any(np.any(np.asarray(leaf, np.float32)) for leaf in found.values())
    assert {path.name for path in (tmp_path / 'weights').iterdir()} >= {
        'transformer',
        'vae',
        'text_encoder',
        'tokenizer',
    }
    again = run()
    assert 'resumes from step 2' in again.err and 'step 2 loss' in again.out
