"""`convert` on TINY, and its errors for wrong input."""

import importlib
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.cli.command import run

WEIGHTS = 'transformer/diffusion_pytorch_model.safetensors'


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def test_convert_there_and_back_is_the_same_folder(tiny, tmp_path, capsys):
    assert run('convert', tiny, tmp_path / 'ours') == 0
    ours = content(tmp_path / 'ours')
    assert not any(name.endswith('.safetensors') for name in ours)
    assert any(name.startswith('transformer/params/') for name in ours)
    assert run('convert', tmp_path / 'ours', tmp_path / 'back') == 0
    assert content(tmp_path / 'back') == content(tiny)
    assert 'control_encoder in the diffusers layout' in capsys.readouterr().out


def test_random_weights_follow_the_seed(tiny, tmp_path):
    assert run('convert', '--random', 'the_matrix:TINY', tmp_path / 'again') == 0
    assert content(tmp_path / 'again') == content(tiny)
    assert (
        run(
            'convert',
            '--random',
            'the_matrix:TINY',
            tmp_path / 'short',
            '--seed',
            1,
            '--layers',
            2,
            '--text-layers',
            1,
        )
        == 0
    )
    tensors = load_file(tmp_path / 'short' / WEIGHTS)
    layers = {name.split('.')[1] for name in tensors if name.startswith('transformer_blocks.')}
    assert layers == {'0', '1'}
    made = json.loads((tmp_path / 'short/text_encoder/config.json').read_text())
    assert made['num_layers'] == 1
    same = load_file(tiny / WEIGHTS)['proj_out.weight']
    assert (tensors['proj_out.weight'] != same).any()


@pytest.mark.parametrize(
    'argv, said',
    [
        (['TINY'], 'expected SRC and DST'),
        (['TINY', 'TINY'], 'is there already'),
        (['--random', 'the_matrix:TINY', 'new', '--layers', '0'], '--layers: got 0'),
        (['--random', 'the_matrix:TINY', ''], "DST: got '', expected a new name"),
        (['--random', 'the_matrix:TINY', 'empty/..'], "DST: got 'empty/..', expected a new name"),
        (['--random', 'the_matrix:TINY', 'model.pth/new'], 'model.pth is not a folder'),
        (
            ['--random', 'the_matrix:TINY', 'new', '--seed', '-1'],
            '--seed: got -1, expected a whole',
        ),
        (
            ['--random', 'doom', 'new', '--text-layers', '1'],
            '--text-layers: got 1, expected a world',
        ),
        (['TINY', 'new', '--recipe', 'doom'], 'got a CogVideoXTransformer3DModel, expected a C'),
        (['TINY', ''], "DST: got '', expected a new name"),
        (['nowhere', 'new'], 'no folder nowhere'),
        (['empty', 'new'], 'expected parts in one of them'),
        (['model.pth', 'new.safetensors'], 'a pickle needs torch'),
        (['pickled', 'new'], 'a pickle needs torch'),
    ],
)
def test_convert_refuses(argv, said, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name, *more: None if name == 'torch' else find(name, *more),
    )
    Path('empty').mkdir()
    Path('model.pth').write_bytes(pickle.dumps({'weight': 1}))
    shutil.copytree(tiny, 'pickled')
    Path('pickled', WEIGHTS).rename(Path('pickled', WEIGHTS).with_suffix('.bin'))
    before = content(tmp_path)
    assert run('convert', *[str(tiny) if word == 'TINY' else word for word in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
    assert content(tmp_path) == before


@pytest.mark.skipif(not importlib.util.find_spec('torch'), reason='torch is not installed')
def test_convert_reads_pickles_of_tensors_alone(tiny, tmp_path):
    import torch
    from safetensors.torch import load_file as load_torch

    folder = tmp_path / 'pickled'
    shutil.copytree(tiny, folder)
    torch.save(load_torch(folder / WEIGHTS), (folder / WEIGHTS).with_suffix('.bin'))
    (folder / WEIGHTS).unlink()
    assert run('convert', folder, tmp_path / 'ours') == 0
    assert run('convert', tmp_path / 'ours', tmp_path / 'back') == 0
    assert content(tmp_path / 'back') == content(tiny)
    (folder / WEIGHTS).with_suffix('.bin').write_bytes(pickle.dumps(Path('a class')))
    assert run('convert', folder, tmp_path / 'new') == 2
