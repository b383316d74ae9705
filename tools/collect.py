"""The command `matrix-jax collect`, for a checkout that is not installed as a command."""

from matrix_jax.cli.collect import main
from matrix_jax.cli.parser import main_guard

if __name__ == '__main__':
    main_guard(main)
