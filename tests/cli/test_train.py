"""`train` on TINY, and its errors for wrong input."""

import json

import pytest

from matrix_jax import recipes, worlds
from tests.cli.command import run


def test_both_stages_train_one_after_the_other(clips, tmp_path, capsys):
    def train(recipe, *more):
        assert run('train', recipe, '--data', clips, *more) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith('step 2 loss ')

    train('the_matrix:TINY_VAE', '--out', tmp_path / 'vae')
    trained = json.loads((tmp_path / 'vae/weights/vae/config.json').read_text())
    assert trained['scaling_factor'] != 1.15258426
    assert not (tmp_path / 'vae/weights/transformer').exists()
    train('the_matrix:TINY_SWIN', '--out', tmp_path / 'swin', '--weights', tmp_path / 'vae/weights')
    run_ = recipes.load('the_matrix:TINY', ['--weights', str(tmp_path / 'swin/weights')])
    world, params = worlds.open_run(run_)
    assert world.cfg.vae.scaling_factor == trained['scaling_factor']
    assert set(params) == set(world.tables)
    assert list((tmp_path / 'swin').glob('events.*'))


@pytest.mark.parametrize(
    'argv, said',
    [
        (['the_matrix:LIVE', '--data', '.'], 'has no training stage'),
        (['the_matrix:TINY_VAE'], '--data: needs a folder'),
        (['the_matrix:TINY_VAE', '--data', '.'], 'no train-*'),
        (['the_matrix:TINY_VAE', '--data', '.', '--stage.ema', '2'], 'stage.ema: got 2'),
        (
            ['the_matrix:TINY_VAE', '--data', '.', '--out', __file__],
            'test_train.py is not a folder',
        ),
        (['the_matrix:TINY_VAE', '--data', 'CLIPS', '--process', '3'], '--coordinator: got None'),
        (
            ['the_matrix:TINY_VAE', '--data', 'CLIPS', '--processes', '1', '--process', '1'],
            '--coordinator: got None, expected HOST:PORT',
        ),
    ],
)
def test_train_refuses_before_there_are_weights(argv, said, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(worlds, 'start')
    argv = [str(clips) if word == 'CLIPS' else word for word in argv]
    assert run('train', argv[0], '--out', tmp_path / 'out', *argv[1:]) == 2
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
