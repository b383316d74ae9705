import types

import jax
import numpy as np
import pytest

from matrix_jax.train.vae import MAX_WEIGHT, Autoencode, color_weights, random_crops
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


def test_pixels_of_rare_colours_weigh_more():
    frames = np.full((1, 1, 10, 10, 3), -0.9, np.float32)
    frames[0, 0, 0, :2] = 0.9, -0.9, -0.9
    weights = np.asarray(color_weights(frames, 0.5))
    assert weights.shape == (1, 1, 10, 10, 1)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(
        weights[0, 0, 0, 0] / weights[0, 0, 5, 5], (98 / 2) ** 0.5, rtol=1e-5
    )
    np.testing.assert_allclose(color_weights(frames, 0.0), 1, rtol=1e-5)
    assert color_weights(frames, 1.0).max() == MAX_WEIGHT


def test_rare_colours_change_the_loss():
    params = {'vae': wan.init(TINY, 0)}
    losses = [
        Autoencode(rare=rare).loss(World(), params, next(clips()), jax.random.key(0))[0]
        for rare in (0.0, 0.5)
    ]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'absolute': -1.0}, 'stage.absolute: got -1.0'),
        ({'kl': float('nan')}, 'stage.kl: got nan'),
        ({'absolute': 0.0, 'square': 0.0}, 'expected one of them above 0'),
        ({'rare': 1.5}, 'stage.rare: got 1.5'),
        ({'crop': (8,)}, 'expected none, or a height and a width'),
    ],
)
def test_invalid_loss_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Autoencode(**fields)


def test_random_crops_begin_at_whole_latent_pixels():
    frames = np.arange(2 * 3 * 6 * 9, dtype=np.uint16).reshape(2, 3, 6, 9, 1)
    corners = set()
    for seed in range(60):
        parts = np.asarray(random_crops(frames, (4, 4), 2, jax.random.key(seed)))
        assert parts.shape == (2, 3, 4, 4, 1)
        for clip, part in zip(frames, parts):
            found = [
                (y, x)
                for y in range(3)
                for x in range(6)
                if np.array_equal(clip[:, y : y + 4, x : x + 4], part)
            ]
            assert len(found) == 1
            corners.update(found)
    assert corners == {(y, x) for y in (0, 2) for x in (0, 2, 4)}
    with pytest.raises(ValueError, match=r'expected at most the frames \(6, 9\)'):
        random_crops(frames, (7, 5), 2, jax.random.key(0))
