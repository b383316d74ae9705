"""Measurements that take a machine for a while: `python -m matrix_jax.benchmark.scripts.NAME`."""
