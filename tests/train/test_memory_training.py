"""The stages of a world with memory, one after the other, from recordings to a stream."""

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


def test_stages_follow_one_another(clips, tmp_path, capsys):
    def weights(out, part):
        return flatten({part: read_component(str(tmp_path / out / 'weights'), part)[1]})

    def run(recipe, out, *more):
        train.main(
            [f'matrix_game_3:{recipe}', '--data', str(clips), '--out', str(tmp_path / out), *more]
        )
        assert 'step 2 loss' in capsys.readouterr().out

    run('TINY_MEMORY', 'memory')
    start = ['--weights', str(tmp_path / 'memory/weights')]
    run('TINY_MEMORY_DMD', 'dmd', *start)
    before, after = weights('memory', 'transformer'), weights('dmd', 'transformer')
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    run('TINY_LIGHT', 'light', *start)
    assert {path.name for path in (tmp_path / 'light/weights').iterdir()} >= {
        'transformer',
        'vae',
        'vae_decoder',
        'text_encoder',
        'tokenizer',
    }
