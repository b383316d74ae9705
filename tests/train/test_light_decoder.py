"""train/light_decoder.py: a decoder with fewer channels learns to draw what the full one draws."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.benchmark.scripts import light_decoders
from matrix_jax.config import UsageError
from matrix_jax.data import records
from matrix_jax.data.loader import Clips
from matrix_jax.train import state as states
from matrix_jax.train.light_decoder import HEADS, LIGHT, LightDecoder
from matrix_jax.vae import wan
from matrix_jax.weights import conversion

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
STAGE = LightDecoder(frames=9)


@pytest.fixture(scope='module')
def world():
    return worlds.build(recipes.load('matrix_game_3:TINY_LIGHT').world)


@pytest.fixture(scope='module')
def params(world):
    return world.init(0, only=('vae',))


def batch(frames=9):
    return {'frames': np.random.default_rng(0).integers(0, 256, (2, frames, 16, 24, 3), np.uint8)}


def test_features_are_those_of_the_decoder(world, params):
    cfg = world.cfg.vae
    latents = np.random.default_rng(0).normal(size=(1, 3, 2, 3, 4)).astype(np.float32)
    frames, features = jit(functools.partial(wan.decode_with_features, cfg))(params['vae'], latents)
    want = jit(functools.partial(wan.decode, cfg))(params['vae'], latents)
    np.testing.assert_allclose(frames, want, atol=1e-5)
    assert {name: one.shape[-1] for name, one in features.items()} == wan.feature_widths(cfg)
    assert [one.shape[1] for one in features.values()] == [2, 4, 8, 8]
    assert [one.shape[2] for one in features.values()] == [2, 4, 8, 8]
    plain = dataclasses.replace(cfg, residual=False)  # its levels halve their channels at the end
    shapes = jax.eval_shape(
        functools.partial(wan.decode_with_features, plain), wan.shapes(plain), latents
    )[1]
    assert {name: one.shape[-1] for name, one in shapes.items()} == wan.feature_widths(plain)


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
    assert light.shapes()[LIGHT].keys() == final[LIGHT].keys()


def test_the_table_compares_decoders_of_weights_folders(world, params, tmp_path, monkeypatch):
    monkeypatch.setattr(light_decoders, 'speed', lambda world, params: 0.0)  # compiles for long
    monkeypatch.setattr(light_decoders, 'FRAMES', 17)
    clip = records.Clip(
        frames=np.random.default_rng(0).integers(0, 256, (17, 16, 24, 3), np.uint8),
        caption='',
        theme='',
        seed=1,
        fps=17,
        **records.unknown(17),
    )
    records.write_shard(tmp_path / f'heldout-0{records.SUFFIX}', [clip])
    world = world.with_tokenizers(None)
    world.save(tmp_path / 'full', params)
    light = STAGE.light(world)
    drawn = light.init(0, only=(LIGHT,))
    light.save(tmp_path / 'light', drawn, start=str(tmp_path / 'full'))
    opened = {
        name: light_decoders.read('matrix_game_3:TINY', str(tmp_path / name))
        for name in ('full', 'light')
    }
    full, half = light_decoders.rows(opened, Clips(tmp_path, 'heldout'), 1)
    assert (full[0], full[1], full[4]) == ('full', '4', '') and half[:2] == ['light', '2']
    assert float(half[4]) < 60 and float(full[2][:-2]) > float(half[2][:-2])


def test_what_does_not_fit_is_refused(world):
    with pytest.raises(ValueError, match='stage.rate: got 1'):
        LightDecoder(rate=1)
    with pytest.raises(ValueError, match='stage.frames: got 8'):
        LightDecoder(frames=8)
    with pytest.raises(UsageError, match='world.light: got a light decoder'):
        STAGE.check_world(STAGE.light(world))
    other = worlds.build(recipes.load('the_matrix:TINY').world)
    with pytest.raises(UsageError, match='may have a light decoder'):
        STAGE.check_world(other)
