"""The command `matrix-jax benchmark`, for a checkout that is not installed as a command."""

from matrix_jax.cli.benchmark import main
from matrix_jax.cli.parser import main_guard

if __name__ == '__main__':
    main_guard(main)
