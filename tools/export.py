"""The command `matrix-jax export`, for a checkout that is not installed as a command."""

from matrix_jax.cli.export import main
from matrix_jax.cli.parser import main_guard

if __name__ == '__main__':
    main_guard(main)
