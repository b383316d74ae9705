"""`python -m matrix_jax COMMAND ...`, the same as `matrix-jax COMMAND ...`."""

from matrix_jax.cli.main import main

if __name__ == '__main__':
    main()
