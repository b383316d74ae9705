"""Runs a command of `matrix-jax` in this process."""

import pytest

from matrix_jax.cli.main import dispatch
from matrix_jax.cli.parser import main_guard


def run(command, *argv):
    """Exit code of a command, in this process."""
    with pytest.raises(SystemExit) as stop:
        main_guard(dispatch, [command, *map(str, argv)])
    return stop.value.code
