import types

import jax
import numpy as np

from matrix_jax.train.vae import Autoencode
from matrix_jax.vae import wan
from matrix_jax.weights import conversion

TINY = wan.PRESETS['tiny']


class World:
    """Stands in for a world that has an autoencoder."""

    def __init__(self, vae=TINY):
        self.cfg = types.SimpleNamespace(vae=vae)

    replace = staticmethod(lambda vae: World(vae))


def clips():
    draws = np.random.default_rng(0)
    while True:
        yield {'frames': draws.integers(0, 255, (2, 3, 4, 4, 3), np.uint8)}


def test_every_weight_learns_from_the_loss():
    params = {'vae': wan.init(TINY, 0)}
    (loss, metrics), grads = jax.jit(
        jax.value_and_grad(
            lambda params, key: Autoencode().loss(World(), params, next(clips()), key), has_aux=True
        ),
        compiler_options={'xla_backend_optimization_level': 0},
    )(params, jax.random.key(0))
    assert np.isfinite(loss) and set(metrics) == {'psnr', 'kl', 'latent_std'}
    grads = conversion.flatten(grads)
    assert all(np.isfinite(leaf).all() for leaf in grads.values())
    assert not [path for path, leaf in grads.items() if not leaf.any()]


def test_latents_are_standard_in_the_end():
    params, loader = {'vae': wan.init(TINY, 0)}, clips()
    world, made = Autoencode().finish(World(), params, loader)
    assert made['vae'] is params['vae']
    frames = np.concatenate([next(loader)['frames'] for _ in range(8)]) / 127.5 - 1
    latents = wan.scaled(world.cfg.vae, wan.encode(TINY, params['vae'], frames)[0])
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.3)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.3)
    same, kept = Autoencode(train_encoder=False).finish(world, params, None)
    assert same is world and kept is params
