"""The command `matrix-jax convert`, for a checkout that is not installed as a command."""

from matrix_jax.cli.convert import main
from matrix_jax.cli.parser import main_guard

if __name__ == '__main__':
    main_guard(main)
