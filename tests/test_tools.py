"""The command line: every command on TINY, every recipe, and the errors for wrong input."""

import importlib
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from matrix_jax import recipes, video, worlds
from matrix_jax.cli.main import COMMANDS, dispatch
from matrix_jax.cli.parser import main_guard
from matrix_jax.train.light_decoder import LIGHT, LightDecoder

ROOT = Path(__file__).parents[1]
WEIGHTS = 'transformer/diffusion_pytorch_model.safetensors'


def run(command, *argv):
    """Exit code of a command, in this process."""
    with pytest.raises(SystemExit) as stop:
        main_guard(dispatch, [command, *map(str, argv)])
    return stop.value.code


@pytest.mark.parametrize('argv', [[], ['--help']])
def test_help_lists_the_commands(argv, capsys):
    assert dispatch(argv) == 0
    printed = capsys.readouterr().out
    assert all(f'\n  {name} ' in printed for name in COMMANDS)


def test_a_wrong_command_is_one_line(capsys):
    assert run('genrate') == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown command 'genrate' (did you mean generate?); there are: generate, play"
    )


@pytest.mark.parametrize('command', COMMANDS)
def test_tools_run_the_commands(command):
    path = ROOT / 'tools' / f'{command}.py'
    spec = importlib.util.spec_from_file_location(f'tools_{command}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is importlib.import_module(f'matrix_jax.cli.{command}').main


# --- generate ----------------------------------------------------------------------------------


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
        (['the_matrix:TINY', '--out', f'{__file__}/x/y.mp4'], 'test_tools.py is not a folder'),
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


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize('recipe', recipes.list_recipes())
def test_every_recipe_builds(recipe):
    found = recipes.load(recipe)
    world = worlds.build(found.world)
    if world.endless:
        world.stream()
    assert set(world.shapes()) == set(world.tables)
    if found.stage is not None:
        made = {LIGHT} if isinstance(found.stage, LightDecoder) else set()  # by the stage itself
        assert set(found.stage.components) <= set(world.tables) | made


@pytest.mark.parametrize('recipe', ['the_matrix:STAGE2', 'the_matrix:STAGE3', 'the_matrix:STAGE4'])
def test_a_summary_counts_without_weights_or_devices(recipe, capsys):
    def summary(*mesh):
        assert run('generate', recipe, '--summary', *mesh) == 0
        lines = capsys.readouterr().out.splitlines()
        return {
            line.split()[0]: (
                int(line.split()[1].replace(',', '')),
                float(line.split()[3].replace(',', '')),
            )
            for line in lines
        }

    one, many = summary(), summary('--mesh.fsdp', '8', '--mesh.tensor', '2')
    assert one['transformer'][0] == 2_009_546_304
    assert one['vae'][0] == 215_583_907
    assert one['total'][0] == many['total'][0] == 7_111_091_171
    assert one['total'][1] == pytest.approx(7_111_091_171 * 2 / 2**20, abs=0.1)
    assert many['transformer'][1] < one['transformer'][1] / 4


# --- convert -------------------------------------------------------------------------------------


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


# --- play ----------------------------------------------------------------------------------------


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


def test_recipes_name_their_weights(tmp_path):
    runs = recipes.load_several(['the_matrix:TINY=a/b=c', 'carracing'], [])
    assert [(run.name, run.weights) for run in runs] == [
        ('the_matrix:TINY', 'a/b=c'),
        ('carracing:PLAY', 'carracing'),
    ]
    assert recipes.load_several([], []) == [recipes.load()]
    assert recipes.load_several(['the_matrix:TINY'], ['--weights', 'a', '--train.seed=3']) == [
        recipes.load('the_matrix:TINY', ['--weights=a', '--train.seed=3'])
    ]


# --- train ---------------------------------------------------------------------------------------


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
            'test_tools.py is not a folder',
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
