"""Video autoencoders. One module for each kind, all with the same functions."""

from matrix_jax.vae import cogvideox, wan


def network(cfg):
    """The module whose `Config` this is."""
    return {cogvideox.Config: cogvideox, wan.Config: wan}[type(cfg)]
