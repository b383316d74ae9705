"""`generate` on TINY, and its errors for wrong input."""

import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from matrix_jax import video
from tests.cli.command import run

WEIGHTS = 'transformer/diffusion_pytorch_model.safetensors'


def test_generate_writes_the_same_frames_twice(tiny, start_image, tmp_path, compiled_once, capsys):
    def frames(name, *more):
        code = run(
            'generate',
            'the_matrix:TINY',
            '--weights',
            tiny,
            '--image',
            start_image,
            '--length',
            1,
            '--out',
            tmp_path / name,
            *more,
        )
        assert code == 0
        return video.read_video(tmp_path / name)

    first = frames('a.mp4', '--control', 'D,D,D,D')
    printed = capsys.readouterr().out
    assert "the model reads 12 tokens; cut off: 's along a road.'" in printed
    assert f'{tmp_path / "a.mp4"}: 16 frames' in printed
    assert first.shape == (16, 256, 384, 3)  # 32x48, enlarged to be seen
    np.testing.assert_array_equal(frames('b.mp4', '--control', 'D,D,D,D'), first)
    left = frames('c.mp4', '--control', 'DL,DL,DL,DL,DL', '--no-overlay')
    assert 'the last 1 are not used' in capsys.readouterr().out
    assert (left != first).mean() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.mp4', 'b.mp4', 'c.mp4']


def test_models_that_do_not_stream_make_a_whole_clip(tiny, tmp_path, compiled_once, capsys):
    assert (
        run(
            'generate',
            'the_matrix:TINY_CLIP',
            '--weights',
            tiny,
            '--length',
            1,
            '--out',
            tmp_path / 'a.mp4',
        )
        == 0
    )
    assert f'{tmp_path / "a.mp4"}: 17 frames' in capsys.readouterr().out
    assert video.read_video(tmp_path / 'a.mp4').shape == (17, 256, 384, 3)


@pytest.mark.parametrize(
    'argv, said',
    [
        (['the_matrix:NONE'], 'unknown recipe the_matrix:NONE'),
        (['the_matrx:TINY'], "unknown world 'the_matrx' (did you mean the_matrix?)"),
        (['the_matrix:TINY', '--world.heigth', '32'], "no field 'heigth' (did you mean height?)"),
        (
            ['the_matrix:TINY', '--world.height', '33'],
            'got 33x48 pixels, expected positive multiples',
        ),
        (['the_matrix:TINY', '--control', 'D,X,DL'], "'X' at position 2 of 3"),
        (['the_matrix:TINY', '--control', 'D,D'], 'got 2 symbols, expected 4; positions 3 to 4'),
        (['the_matrix:TINY', '--length', '0'], '--length: got 0'),
        (
            ['the_matrix:TINY', '--length', 'long'],
            "got 'long', expected whole seconds from 1 to 8640",
        ),
        (['the_matrix:TINY', '--length', ''], "--length: got '', expected whole seconds"),
        (['the_matrix:TINY', '--control-seed', '-1'], '--control-seed: got -1, expected a whole'),
        (['the_matrix:TINY', '--out', '/proc/x.mp4'], 'expected a place to write to; /'),
        (['the_matrix:TINY', '--out', f'{__file__}/x/y.mp4'], 'test_generate.py is not a folder'),
        (['the_matrix:TINY', '--world.dit.heads', '0'], 'heads: got 0, expected at least 1'),
        (['the_matrix:'], "RECIPE: got 'the_matrix:'"),
        ([''], "RECIPE: got ''"),
        (['the_matrix:TINY', '--out', 'video.txt'], "got suffix '.txt', expected .mp4 or .gif"),
        (['the_matrix:TINY'], 'needs --weights'),
        (['the_matrix:TINY', '--weights', 'nowhere'], 'no folder nowhere'),
        (
            ['the_matrix:TINY', '--weights', 'TINY', '--image', 'nowhere.png'],
            'nowhere.png: no such',
        ),
        (['the_matrix:TINY', '--weights', 'TINY', '--lora', 'nowhere'], 'nowhere: no such file'),
        (['the_matrix:TINY', '--weights', 'TINY', '--lora', 'TINY'], 'no adapter; expected'),
        (['the_matrix:TINY', '--weights', 'TINY'], 'give --video or --image'),
        (['the_matrix:TINY_CLIP', '--weights', 'TINY', '--length', '5'], 'expected at most 4'),
        (
            ['the_matrix:TINY_CLIP', '--weights', 'TINY', '--image', 'a.png'],
            'from the prompt alone',
        ),
        (['the_matrix:TINY', '--weights', 'TINY', '--mesh.fsdp', '16'], 'expected at most 8'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_generate_refuses(argv, said, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(tiny) if word == 'TINY' else word for word in argv]
    length = [] if '--length' in argv else ['--length', '1']
    assert run('generate', *argv, *length) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
    assert list(tmp_path.iterdir()) == []


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def overwrite(folder, edit):
    (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


@pytest.mark.parametrize(
    'damage, said',
    [
        (lambda folder: (folder / WEIGHTS).unlink(), ['transformer: no weights']),
        (lambda folder: shutil.rmtree(folder / 'vae'), ['no component vae']),
        (lambda folder: overwrite(folder, lambda data: data[:-100]), ['truncated']),
        (
            lambda folder: overwrite(folder, lambda data: data[:9] + b'#' * 50 + data[59:]),
            ['corrupt'],
        ),
        (lambda folder: overwrite(folder, lambda data: pickle.dumps({'weight': 1})), ['pickle']),
        (
            lambda folder: change(folder, lambda tensors: tensors.pop('proj_out.bias')),
            ['missing key proj_out.bias'],
        ),
        (
            lambda folder: change(
                folder,
                lambda tensors: tensors.update({'proj_out.bais': tensors.pop('proj_out.bias')}),
            ),
            ['unknown key proj_out.bais', 'nearest: proj_out.bias'],
        ),
        (
            lambda folder: (folder / 'transformer/config.json').write_text(
                '{"num_layers": "four"}'
            ),
            ['transformer/config.json'],
        ),
    ],
    ids=['missing', 'part', 'truncated', 'corrupt', 'pickle', 'less', 'renamed', 'config'],
)
def test_generate_refuses_damaged_weights(damage, said, tiny, start_image, tmp_path, capsys):
    folder = tmp_path / 'weights'
    shutil.copytree(tiny, folder)
    damage(folder)
    out = tmp_path / 'out' / 'video.mp4'
    assert (
        run(
            'generate',
            'the_matrix:TINY',
            '--weights',
            folder,
            '--image',
            start_image,
            '--length',
            1,
            '--out',
            out,
        )
        == 2
    )
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert all(word in printed.err for word in said), printed.err
    assert not out.parent.exists()
