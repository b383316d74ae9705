"""Lengths of videos, and invalid input of `generate` for keyboard and mouse."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matrix_jax import recipes, video, worlds
from matrix_jax.pipelines import generate
from tests.cli.command import run


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


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('ending', ['mp4', 'gif'])
def test_a_video_that_is_stopped_has_the_frames_made_so_far(
    number, ending, tiny_walk, start_image, tmp_path, monkeypatch, capsys
):
    def frames():
        for index in range(33):
            if index == 20:
                os.kill(os.getpid(), number)
            yield np.full((16, 24, 3), 7 * index, np.uint8)

    before = signal.getsignal(number)
    clip = generate.GeneratedVideo(['W'] * 33, [], run_seconds=1.0)
    monkeypatch.setattr(generate, 'generate', lambda *_, **__: (frames(), clip))
    out = tmp_path / 'new' / f'walk.{ending}'
    code = run(
        *('generate', 'matrix_game_2:TINY', '--weights', tiny_walk, '--image', start_image),
        *('--length', '1', '--out', out),
    )
    assert code == 128 + number
    assert f'{out}: 20 frames, stopped early' in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if ending == 'gif':
        assert Image.open(out).n_frames == 20
    else:
        assert len(video.read_video(out, recipes.load('matrix_game_2:TINY').world.fps)) == 20
    assert signal.getsignal(number) is before


def test_videos_get_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(str(generate.free_path('carracing-stream-42')))
        Path(names[-1]).parent.mkdir(exist_ok=True)
        Path(names[-1]).touch()
    assert names == [f'outputs/carracing-stream-42{end}.mp4' for end in ('', '-2', '-3')]
