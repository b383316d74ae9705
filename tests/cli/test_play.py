"""`play`: its errors for wrong input."""

import pytest

from tests.cli.command import run


@pytest.mark.parametrize(
    'argv, said',
    [
        (
            ['--players', '99999999'],
            '--players: got 99999999, expected a whole number from 1 to 1024',
        ),
        (['--together', '0'], '--together: got 0'),
        (['--entry', 'never'], "--entry: got 'never', expected one of 'early', 'late'"),
        (['--entry', 'head', '--together', '9'], '--together: got 9'),
        (['--players', '2', '--together', '3'], '--together: got 3, expected 1 to the players, 2'),
        (['--drain', 'nan'], '--drain: got nan, expected --ray'),
        (
            ['--worlds', 'garbage', '--gpus', '1'],
            '--worlds: got garbage and --gpus: got 1.0, expected --ray',
        ),
        (['--ray', '--drain', 'nan'], '--drain: got nan, expected at least 0'),
        (['--ray', '--worlds', ''], "--worlds: got ''"),
        (['carracing', 'carracing:PLAY'], 'RECIPE: got carracing:PLAY twice'),
        (['carracing', 'carracing:CLIPS', '--ray'], '--ray: got 2 recipes, expected one with it'),
        (['carracing', 'the_matrix:TINY'], 'the_matrix:TINY: has no weights, expected the_matrix'),
        (
            ['carracing', 'the_matrix:TINY', '--weights', 'some'],
            '--weights: got 2 recipes, expected',
        ),
        (['carracing', 'the_matrix:NONE=some'], 'unknown recipe the_matrix:NONE'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_play_refuses_before_it_compiles(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run('play', *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err and not printed.out
