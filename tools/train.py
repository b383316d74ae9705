"""The command `matrix-jax train`, for a checkout that is not installed as a command."""

from matrix_jax.cli.parser import main_guard
from matrix_jax.cli.train import main

if __name__ == '__main__':
    main_guard(main)
