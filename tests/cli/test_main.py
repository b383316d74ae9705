"""The commands: their list, wrong names, and the scripts in tools/."""

import importlib
import importlib.util
from pathlib import Path

import pytest

from matrix_jax.cli.main import COMMANDS, dispatch
from tests.cli.command import run

ROOT = Path(__file__).parents[2]


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
