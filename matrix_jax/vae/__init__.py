"""Video autoencoders: one module per kind, with the same functions."""

from matrix_jax.vae import cogvideox, wan


def network(cfg):
    """The module of a config."""
    return {cogvideox.Config: cogvideox, wan.Config: wan}[type(cfg)]
