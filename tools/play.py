"""The command `matrix-jax play`, for a checkout that is not installed as a command."""

from matrix_jax.cli.parser import main_guard
from matrix_jax.cli.play import main

if __name__ == '__main__':
    main_guard(main)
