"""Lengths of videos, and invalid input of `generate` for keyboard and mouse."""

import pytest

from matrix_jax import recipes, worlds
from matrix_jax.pipelines import generate
from tests.test_tools import run


@pytest.mark.parametrize(
    'argv, said',
    [
        (
            ['--actions', 'W*20,hop*13'],
            "unknown action 'hop' of universal; expected W, S, A, D, up",
        ),
        (['--actions', 'W*24'], 'got 24 frames, expected 33; positions 25 to 33 are missing'),
        (['--actions', 'right:3*33'], 'right:3, expected an amount above 0, at most 1'),
        (
            ['matrix_game_2:TINY_RUN', '--actions', 'jump*20,right*13'],
            "'right' moves the mouse, and templerun has none; expected jump",
        ),
        (['--weights', 'TINY', '--image', 'empty.png'], 'empty.png: not readable as an image'),
        (['--weights', 'TINY', '--image', 'flat.bmp'], 'flat.bmp: not readable as an image'),
        (['--weights', 'TINY', '--image', 'notes.txt'], 'notes.txt: not readable as an image'),
        (['--weights', 'TINY', '--image', '.'], 'is a folder'),
        (['--weights', 'TINY'], 'give --video or --image'),
        (['--weights', 'TINY', '--image', 'a.png', '--prompt', 'a wood'], 'reads no text'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_invalid_input_is_one_line(argv, said, tiny_walk, tmp_path, monkeypatch, capsys):
    given, out = tmp_path / 'given', tmp_path / 'out'
    given.mkdir()
    (given / 'empty.png').touch()
    (given / 'notes.txt').write_text('A walk.')
    # A header of 5x0 pixels.
    (given / 'flat.bmp').write_bytes(
        b'BM6\0\0\0\0\0\0\0006\0\0\0(\0\0\0\5\0\0\0\0\0\0\0\1\0\x18' + bytes(25)
    )
    monkeypatch.chdir(given)
    argv = [str(tiny_walk) if word == 'TINY' else word for word in argv]
    recipe = [] if ':' in argv[0] else ['matrix_game_2:TINY']
    assert run('generate', *recipe, *argv, '--length', '1', '--out', out / 'walk.mp4') == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
    assert not out.exists()


@pytest.mark.parametrize(
    'recipe, given, pad, count, note',
    [
        (
            'matrix_game_2:TINY',
            'W*24,right*24,W*48',
            None,
            105,
            '96 frames, 105 needed; 9 added by',
        ),
        ('matrix_game_2:TINY', 'W*33', None, 33, None),
        ('matrix_game_2:TINY', 'W', None, 9, '1 frames, 9 needed'),
        ('matrix_game_2:TINY', 'W', 'hold', 201, '1 frames, 201 needed'),  # 8 seconds
        ('matrix_game_2:TINY', 'benchmark:3', None, 201, None),
        ('matrix_game_2:TINY', None, None, 201, None),
        ('matrix_game_2:TINY_CLIP', 'W*24', None, 25, '24 frames, 25 needed'),
        ('the_matrix:TINY', 'D,DL,D', None, 4, '3 symbols, 4 needed; 1 added by pad=hold'),
        ('the_matrix:TINY_CLIP', 'D,DL', None, 5, '2 symbols, 5 needed'),
        ('the_matrix:TINY', 'D', 'hold', 32, '1 symbols, 32 needed'),
    ],
)
def test_without_a_length_a_video_lasts_as_its_controls(recipe, given, pad, count, note):
    world = worlds.build(recipes.load(recipe).world)
    controls, notes = generate.plan(world, None, given, 42, pad)
    assert len(controls) == count
    assert [note in line for line in notes] == ([True] if note else [])
    if given and pad is None and note:
        assert set(controls[world.vocabulary.count(given) :]) == {
            given.split(',')[-1].split('*')[0]
        }


@pytest.mark.parametrize(
    'recipe, given, said',
    [
        (
            'matrix_game_2:TINY',
            'W*9999999',
            'got 9999999 controls, expected a video of at most 86400',
        ),
        ('matrix_game_2:TINY', 'hop*9', "unknown action 'hop'"),
        ('matrix_game_2:TINY', '', 'actions: got none'),
        ('matrix_game_2:TINY_CLIP', 'W*99', 'got 99 frames, expected at most'),
        ('the_matrix:TINY_CLIP', ','.join('D' * 99), '--control: got 99 symbols, expected at most'),
    ],
)
def test_too_many_controls_for_a_clip_raise(recipe, given, said):
    with pytest.raises(ValueError, match=said):
        generate.plan(worlds.build(recipes.load(recipe).world), None, given, 42, None)
