"""Recipes, typed overrides, and the one-line message of a user's error."""

import dataclasses
import os
import signal
import subprocess
import sys
import types
from typing import Any, ClassVar, Literal

import pytest

from matrix_jax import config, recipes
from matrix_jax.cli.parser import Parser, main_guard
from matrix_jax.config import Mesh, Run, UsageError
from matrix_jax.weights.conversion import ConversionError


@dataclasses.dataclass(frozen=True)
class Net:
    ALIASES: ClassVar[dict[str, str]] = {'speed': 'rate'}
    width: int = 8
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    patch: tuple[int, int] = (1, 2)
    rate: float = 0.5
    kernels: tuple[int, ...] = (3,)
    cap: float | None = None
    remat: bool = False
    table: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f'net.width: got {self.width}, expected an even number')


@dataclasses.dataclass(frozen=True)
class World:
    dit: Net = Net()
    size: Any = 96


RUN = Run(world=World(), stage=None, weights='tiny')


@pytest.fixture(autouse=True)
def configs(monkeypatch):
    """Two worlds that stand in for configs/."""
    modules = {
        'carracing': types.SimpleNamespace(DEFAULT='SWIN', SWIN=RUN, VAE=Run(World()), OTHER=3),
        'doom': types.SimpleNamespace(TINY=Run(World(dit=Net(width=4)))),
    }
    real = recipes._module
    monkeypatch.setattr(recipes, '_worlds', lambda: sorted(modules))
    monkeypatch.setattr(recipes, '_module', lambda world: modules.get(world) or real(world))
    return monkeypatch


def test_names_of_recipes():
    assert recipes.load().name == 'carracing:SWIN'
    assert recipes.load('carracing').name == 'carracing:SWIN'
    assert recipes.load('carracing:vae').name == 'carracing:VAE'
    assert recipes.load('doom:TINY').world.dit.width == 4
    assert recipes.list_recipes() == ['carracing:SWIN', 'carracing:VAE', 'doom:TINY']


def test_recipes_are_read_from_a_folder(configs, tmp_path):
    configs.undo()
    configs.setattr(recipes, '_folder', lambda: tmp_path)
    configs.delitem(sys.modules, 'matrix_jax_recipes.toy', raising=False)
    (tmp_path / 'toy.py').write_text(
        'from matrix_jax.config import Run\nDEFAULT = "SMALL"\nSMALL = Run(world=None)\n'
    )
    assert recipes.load('toy').name == 'toy:SMALL'
    assert recipes.list_recipes() == ['toy:SMALL']
    with pytest.raises(UsageError, match='unknown world'):
        recipes.load('../toy')


@pytest.mark.parametrize(
    'overrides, path, value',
    [
        (['--mesh.seq', '4'], 'mesh.seq', 4),
        (['--mesh.seq=4'], 'mesh.seq', 4),
        (['--steps', '7'], 'train.steps', 7),
        (['--train.log-every=5'], 'train.log_every', 5),
        (['--world.dit.rate', '1e-3'], 'world.dit.rate', 1e-3),
        (['--world.dit.speed', '2'], 'world.dit.rate', 2.0),
        (['--world.dit.dtype=bfloat16'], 'world.dit.dtype', 'bfloat16'),
        (['--world.dit.width', '16'], 'world.dit.width', 16),
        (['--world.dit.patch', '2, 4'], 'world.dit.patch', (2, 4)),
        (['--world.dit.patch=(2,4)'], 'world.dit.patch', (2, 4)),
        (['--world.dit.kernels=3,5,7'], 'world.dit.kernels', (3, 5, 7)),
        (['--world.dit.cap=-1.5'], 'world.dit.cap', -1.5),
        (['--world.dit.cap', 'none'], 'world.dit.cap', None),
        (['--world.dit.remat', '--mesh.seq=2'], 'world.dit.remat', True),
        (['--world.dit.remat', 'no'], 'world.dit.remat', False),
        (['--world.size=48'], 'world.size', 48),
        (['--weights', 'none'], 'weights', None),
        (['--out', 'a=b/c'], 'out', 'a=b/c'),
    ],
)
def test_override_is_typed_by_its_field(overrides, path, value):
    found = recipes.load('carracing', overrides)
    for part in path.split('.'):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_last_override_wins_and_others_stay():
    run = recipes.load('carracing', ['--mesh.seq=2', '--mesh.data=4', '--mesh.seq=3'])
    assert run.mesh == Mesh(data=4, seq=3)
    assert run.world is RUN.world


@pytest.mark.parametrize(
    'recipe, overrides, words',
    [
        ('carracng', [], ["unknown world 'carracng' (did you mean carracing?)", 'carracing, doom']),
        ('carracing:SWIM', [], ['carracing:SWIM (did you mean SWIN?)', 'SWIN, VAE']),
        ('doom', [], ['unknown recipe doom:', 'TINY']),
        ('doom', ['x'], ['unknown recipe doom']),
        (
            'carracing',
            ['--mesh.sequ=2'],
            [
                "--mesh.sequ: no field 'sequ' (did you mean seq?)",
                'fields of Mesh: data, fsdp, tensor, seq',
            ],
        ),
        ('carracing', ['--stepz=2'], ["no field 'stepz' (did you mean steps?)"]),
        ('carracing', ['--stage.groups=2'], ['--stage.groups: this recipe has none']),
        ('carracing', ['--weights.x=2'], ["'tiny' has no fields"]),
        ('carracing', ['--mesh=2'], ['--mesh: is a group', '--mesh.seq']),
        ('carracing', ['--mesh.seq=two'], ["--mesh.seq: got 'two', expected int"]),
        ('carracing', ['--mesh.seq=1.5'], ["got '1.5', expected int"]),
        ('carracing', ['--mesh.seq'], ['--mesh.seq: needs a value']),
        ('carracing', ['--mesh.seq=0'], ['--mesh.seq 0: mesh.seq: got 0, expected at least 1']),
        ('carracing', ['--world.dit.rate=nan'], ["got 'nan', expected float"]),
        ('carracing', ['--steps=-1'], ['train.steps: got -1, expected at least 0']),
        ('carracing', ['--world.dit.patch=9'], ["got '9' with 1 values, expected 2"]),
        ('carracing', ['--world.dit.dtype=int8'], ["got 'int8', expected float32 | bfloat16"]),
        ('carracing', ['--world.dit.remat=maybe'], ["got 'maybe', expected bool"]),
        ('carracing', ['--world.dit.width=3'], ['net.width: got 3, expected an even number']),
        ('carracing', ['--world.dit.table=3'], ['type dict is set in a recipe']),
        ('carracing', ['stray'], ["unexpected argument 'stray'"]),
        ('carracing', ['--weights='], ["--weights: got '', expected a value, or none"]),
        ('', [], ["RECIPE: got '', expected one of carracing, doom"]),
        ('carracing:', [], ["RECIPE: got 'carracing:', expected"]),
        (':VAE', [], ["RECIPE: got ':VAE', expected"]),
    ],
)
def test_wrong_name_or_value_is_one_clear_line(recipe, overrides, words):
    with pytest.raises(UsageError) as error:
        recipes.load(recipe, overrides)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert '\n' not in message


@pytest.mark.parametrize(
    'recipe, option',
    [
        ('the_matrix:TINY', 'world.dit.heads'),
        ('the_matrix:TINY', 'world.dit.control.dim'),
        ('the_matrix:TINY', 'world.vae.norm_groups'),
        ('the_matrix:TINY', 'world.text.heads'),
        ('the_matrix:TINY', 'world.control.heads'),
        ('doom', 'world.dit.channels'),
        ('doom', 'world.dit.actions.heads'),
        ('doom', 'world.image.patch'),
        ('doom', 'world.vae.dim'),
    ],
)
def test_sizes_are_at_least_one(configs, recipe, option):
    configs.undo()
    with pytest.raises(UsageError) as error:
        recipes.load(recipe, [f'--{option}=0'])
    assert str(error.value).startswith(f'--{option} 0: ')
    assert str(error.value).endswith(f'{option.rpartition(".")[2]}: got 0, expected at least 1')


@pytest.mark.parametrize(
    'recipe, old, new, value',
    [
        ('carracing', '--world.stream.entry=tail', 'control_binding', 'late'),
        ('carracing', '--world.stream.control_binding=late', 'control_binding', 'late'),
        ('doom', '--world.stream.tell_last=no', 'condition_on_last_frame', False),
    ],
)
def test_former_names_of_fields_still_work(configs, recipe, old, new, value):
    configs.undo()
    assert getattr(recipes.load(recipe, [old]).world.stream, new) == value


def test_describe_names_what_can_be_set():
    text = recipes.describe(recipes.load())
    for field in ('--mesh.seq', '--world.dit.patch', '--world.dit.dtype', '--weights', '--stage'):
        assert field in text
    assert 'float32 | bfloat16' in text and '--name' not in text


def parser():
    made = Parser('thing', 'Does a thing.')
    made.add_argument('--length', type=float, default=8)
    made.add_argument('--prompt', default='')
    made.add_argument('--pad', choices=('random', 'hold'))
    return made


@pytest.mark.parametrize(
    'argv',
    [
        ['carracing:VAE', '--length', '2', '--mesh.seq', '4', '--prompt=x'],
        ['--length=2', '--mesh.seq=4', '--prompt', 'x', 'carracing:VAE'],
    ],
)
def test_parser_splits_options_from_fields(argv):
    options, run = parser().parse_run(argv)
    assert (options.length, options.prompt) == (2, 'x')
    assert (run.name, run.mesh.seq) == ('carracing:VAE', 4)


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--length', 'long'], "^--length: got 'long', expected float$"),
        (['--lenght', '3'], 'the command has an option --length'),
        (['--length'], '^--length: got nothing, expected one argument$'),
        (['--pad', 'up'], "^--pad: got 'up', expected one of 'random', 'hold'$"),
    ],
)
def test_parser_errors_are_usage_errors(argv, words):
    with pytest.raises(UsageError, match=words):
        parser().parse_run(argv)


def test_help_lists_options_recipes_and_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_run(['doom:TINY', '--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in ('--length', 'carracing:VAE', '--world.dit.width'))


@pytest.mark.parametrize(
    'raised, code, line',
    [
        (UsageError('mesh: too\n  many'), 2, 'error: mesh: too; many\n'),
        (ConversionError('no key'), 2, 'error: no key\n'),
        (
            PermissionError(13, 'Permission denied', 'x.mp4'),
            2,
            "error: [Errno 13] Permission denied: 'x.mp4'\n",
        ),
        (KeyboardInterrupt(), 130, 'interrupted\n'),
        (signal.SIGTERM, 143, 'terminated\n'),
        (None, 0, ''),
    ],
)
def test_main_guard(capsys, raised, code, line):
    def main(argv):
        assert argv == ['a']
        if raised == signal.SIGTERM:
            os.kill(os.getpid(), raised)
        elif raised:
            raise raised

    with pytest.raises(SystemExit) as stop:
        main_guard(main, ['a'])
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    def main(argv):
        raise ValueError('a bug')

    with pytest.raises(ValueError, match='a bug'):
        main_guard(main, [])
    with pytest.raises(UsageError, match='user input'), config.usage_errors():
        raise ValueError('user input')


def test_importing_config_imports_nothing_heavy():
    code = (
        'import sys, matrix_jax.recipes, matrix_jax.cli.main\n'
        "print(sorted({'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / 'runs' / 'one'
    with config.lock_folder('--out', folder):
        with pytest.raises(UsageError) as refused, config.lock_folder('--out', folder):
            pass
        assert str(refused.value) == (
            f'--out: got {str(folder)!r}, expected a folder that no other process writes to now; '
            f'process {os.getpid()} does'
        )
    assert not folder.parent.exists()
    code = (
        'import os, sys; from matrix_jax import config\n'
        'with config.lock_folder("--out", sys.argv[1]): os.kill(os.getpid(), 9)'
    )
    assert subprocess.run([sys.executable, '-c', code, folder]).returncode == -9
    assert (folder / '.lock').exists()
    with config.lock_folder('--out', folder):  # the lock of a killed process is free
        assert (folder / '.lock').read_text() == str(os.getpid())
