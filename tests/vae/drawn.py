"""Random frames and parameters, and functions that compile once per test module."""

import functools

import jax
import numpy as np


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(scale)


@functools.cache
def params_of(vae, cfg):
    """Random parameters of an autoencoder without zeros."""
    draws = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: draws.normal(size=leaf.shape).astype(np.float32) * 0.3, vae.shapes(cfg)
    )


@functools.cache
def compiled(function, cfg):
    return jax.jit(functools.partial(function, cfg))
