"""What the door to a world of keyboard and mouse refuses; tests/test_tools.py has the other one."""

import pytest

from tests.test_tools import run


@pytest.mark.parametrize('argv, said', [
    (['--actions', 'W*20,hop*13'], "unknown action 'hop' of universal; expected W, S, A, D, up"),
    (['--actions', 'W*24'], 'got 24 frames, expected 33; positions 25 to 33 are missing'),
    (['--actions', 'right:3*33'], 'right:3, expected an amount above 0, at most 1'),
    (['matrix_game_2:TINY_RUN', '--actions', 'jump*20,right*13'],
     "'right' moves the mouse, and templerun has none; expected jump"),
    (['--weights', 'TINY', '--image', 'empty.png'], 'empty.png: not readable as a picture'),
    (['--weights', 'TINY', '--image', 'flat.bmp'], 'flat.bmp: not readable as a picture'),
    (['--weights', 'TINY', '--image', 'notes.txt'], 'notes.txt: not readable as a picture'),
    (['--weights', 'TINY', '--image', '.'], 'is a folder'),
    (['--weights', 'TINY'], 'give --video or --image'),
    (['--weights', 'TINY', '--image', 'a.png', '--prompt', 'a wood'], 'reads no text'),
], ids=lambda value: value[-1] if isinstance(value, list) else '')
def test_what_cannot_be_walked_is_one_line(argv, said, tiny_walk, tmp_path, monkeypatch, capsys):
    given, out = tmp_path / 'given', tmp_path / 'out'
    given.mkdir()
    (given / 'empty.png').touch()
    (given / 'notes.txt').write_text('A walk.')
    # A header that tells of 5x0 pixels.
    (given / 'flat.bmp').write_bytes(b'BM6\0\0\0\0\0\0\0006\0\0\0(\0\0\0\5\0\0\0\0\0\0\0\1\0\x18'
                                     + bytes(25))
    monkeypatch.chdir(given)
    argv = [str(tiny_walk) if word == 'TINY' else word for word in argv]
    recipe = [] if ':' in argv[0] else ['matrix_game_2:TINY']
    assert run('generate', *recipe, *argv, '--length', '1', '--out', out / 'walk.mp4') == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
    assert not out.exists()
