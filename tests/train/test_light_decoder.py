"""train/light_decoder.py: a decoder with fewer channels learns to draw what the full one draws."""

import dataclasses
import functools
import types

import jax
import numpy as np
import optax
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.benchmark.scripts import light_decoders
from matrix_jax.config import UsageError
from matrix_jax.train import state as states
from matrix_jax.train.light_decoder import HEADS, LIGHT, LightDecoder
from matrix_jax.vae import wan
from matrix_jax.weights import conversion

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
STAGE = LightDecoder(frames=5)
VAE = wan.PRESETS['tiny']


class World:
    """Stands in for a world with a tiny autoencoder."""

    def __init__(self, light=None):
        self.cfg = types.SimpleNamespace(name='Toy', vae=VAE, light=light)
        self.tables = {'vae': wan.weights(VAE)}
        if light:
            self.tables['vae_decoder'] = wan.weights(light)

    replace = staticmethod(lambda light: World(light))

    def init(self, seed, only):
        return {'vae_decoder': {'decoder': wan.init(self.cfg.light, seed)['decoder']}}


@pytest.fixture(scope='module')
def world():
    return World()


@pytest.fixture(scope='module')
def params():
    return {'vae': wan.init(VAE, 0)}


def batch(frames=5):
    return {'frames': np.random.default_rng(0).integers(0, 256, (2, frames, 8, 12, 3), np.uint8)}


def test_features_are_those_of_the_decoder(world, params):
    cfg = world.cfg.vae
    latents = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 4)).astype(np.float32)
    frames, features = jit(functools.partial(wan.decode_with_features, cfg))(params['vae'], latents)
    want = jit(functools.partial(wan.decode, cfg))(params['vae'], latents)
    np.testing.assert_allclose(frames, want, atol=1e-5)
    assert {name: one.shape[-1] for name, one in features.items()} == wan.feature_widths(cfg)
    assert [one.shape[1] for one in features.values()] == [2, 4, 4]
    assert [one.shape[2] for one in features.values()] == [4, 8, 8]
    shortcuts = recipes.load('matrix_game_3:TINY').world.vae
    shapes = jax.eval_shape(
        functools.partial(wan.decode_with_features, shortcuts), wan.shapes(shortcuts), latents
    )[1]
    assert {name: one.shape[-1] for name, one in shapes.items()} == wan.feature_widths(shortcuts)


def test_the_full_decoder_itself_has_no_loss(world, params):
    stage = dataclasses.replace(STAGE, rate=0.01)  # of four channels, none
    own = stage.start(world, params, 0)
    heads = {
        name: {'kernel': np.eye(len(head['kernel']), dtype=np.float32)}
        for name, head in own[HEADS].items()
    }
    own |= {LIGHT: {'decoder': params['vae']['decoder']}, HEADS: heads}
    loss, metrics = jit(lambda own: stage.loss(world, own, batch(), None))(own)
    assert loss < 1e-5 and metrics['features'] < 1e-6


def test_a_light_decoder_learns_and_the_full_autoencoder_stays(world, params):
    stage, tx = dataclasses.replace(STAGE, features=1.0), optax.adam(1e-2)
    state = states.init(stage.start(world, params, 0), stage.trainable, tx, 0)
    assert {path.split('/')[0] for path in state.student} == {LIGHT, HEADS}
    assert set(conversion.flatten(params)) == set(state.frozen)
    assert set(STAGE.axes(world)) >= {path for path in state.student if path.startswith(LIGHT)}
    step = jit(states.make_step(functools.partial(stage.loss, world), tx, 0.9))
    found = []
    for _ in range(12):
        state, metrics = step(state, batch())
        found.append(metrics)
    assert found[-1]['psnr_full'] > found[0]['psnr_full']
    assert found[-1]['features'] < found[0]['features']
    light, final = STAGE.finish(world, states.merged(state, 'student'), None)
    assert light.cfg.light.decoder_dim == 2 and set(final) == {LIGHT}


def test_the_table_compares_decoders_of_weights_folders(tmp_path, monkeypatch):
    def rebuild(world, params, clips, count, frames, first, group):
        true = np.arange(100, 124, dtype=np.uint8)[:, None].repeat(3, -1)
        true = np.broadcast_to(true, (1, 4, 16, 24, 3))
        return true + np.uint8(world.decoder_vae.decoder_widths[-1]), true

    monkeypatch.setattr(light_decoders, 'rebuild', rebuild)
    monkeypatch.setattr(light_decoders, 'speed', lambda world, params: 20.0)
    run = recipes.load('matrix_game_3:TINY_LIGHT')
    world = worlds.build(run.world).with_tokenizers(None)
    world.save(tmp_path / 'full', world.init(0, only=('vae',)))
    light = STAGE.light(world)
    drawn = light.init(0, only=(LIGHT,))
    light.save(tmp_path / 'light', drawn, start=str(tmp_path / 'full'))
    opened = {
        name: light_decoders.read('matrix_game_3:TINY', str(tmp_path / name))
        for name in ('full', 'light')
    }
    full, half = light_decoders.rows(opened, None, 1)
    # The errors are 4 and 2 of 255, and their difference is 2.
    assert full[:2] == ['full', '4'] and full[3:5] == ['36.1', ''] and full[6] == '20'
    assert half[:2] == ['light', '2'] and half[3:5] == ['42.1', '42.1']
    assert float(full[2][:-2]) > float(half[2][:-2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='stage.rate: got 1'):
        LightDecoder(rate=1)
    with pytest.raises(ValueError, match='stage.frames: got 8'):
        LightDecoder(frames=8)
    tiny, other = (
        worlds.build(recipes.load(name).world)
        for name in ('matrix_game_3:TINY_LIGHT', 'the_matrix:TINY')
    )
    with pytest.raises(UsageError, match='world.light: got a light decoder'):
        STAGE.check_world(STAGE.light(tiny))
    with pytest.raises(UsageError, match='may have a light decoder'):
        STAGE.check_world(other)
