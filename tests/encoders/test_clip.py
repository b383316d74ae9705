"""CLIP text encoder: pooling, causality, config and table (values: tests/test_parity.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.encoders import clip
from matrix_jax.nn import initializers
from matrix_jax.weights import conversion

TINY = clip.PRESETS['tiny']
END = TINY.eos


@pytest.fixture(scope='module')
def params():
    # With initial weights ids hardly matter; with larger ones they do.
    return jax.tree.map(lambda leaf: 3 * leaf, init(TINY))


def init(cfg):
    return initializers.draw_tree(clip.INIT_RULES, clip.shapes(cfg), 0)


def features(params, ids, cfg=TINY):
    apply = jax.jit(clip.TextTower(cfg).apply)
    return np.asarray(apply({'params': params}, jnp.asarray(ids)))


def test_padding_after_the_end_of_text_has_no_effect(params):
    short = features(params, [[512, 5, 9, END]])
    np.testing.assert_allclose(features(params, [[512, 5, 9, END, END, END]]), short, atol=1e-5)
    np.testing.assert_allclose(features(params, [[512, 5, 9, END, 7, 7]]), short, atol=1e-5)
    assert np.abs(features(params, [[512, 5, 8, END]]) - short).max() > 1e-3


def test_legacy_end_of_text_is_the_largest_id(params):
    legacy = dataclasses.replace(TINY, eos=clip.LEGACY_EOS)
    ids = [[512, 2, 9, END, END]]
    np.testing.assert_array_equal(features(params, ids, legacy), features(params, ids))


def test_whole_clip_config_and_checkpoint():
    cfg = dataclasses.replace(TINY, projection=8)
    released = {'text_config': TINY.to_released(), 'vision_config': {}, 'projection_dim': 8}
    assert clip.Config.from_released(released) == cfg
    params = init(cfg)
    torch = conversion.to_torch(clip.weights(cfg), params)
    torch |= {
        'logit_scale': np.float32(1),
        'visual_projection.weight': np.zeros((8, 8)),
        'vision_model.encoder.layers.0.mlp.fc1.bias': np.zeros(3),
    }
    again = conversion.to_jax(clip.weights(cfg), torch, clip.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_config_round_trip_and_faults():
    for cfg in clip.PRESETS.values():
        assert clip.Config.from_released(cfg.to_released()) == cfg
    with pytest.raises(ValueError, match='clip.activation'):
        clip.Config.from_released(TINY.to_released() | {'hidden_act': 'relu'})
    with pytest.raises(ValueError, match='missing hidden_size'):
        clip.Config.from_released({'vocab_size': 4})


def test_prompts_that_are_too_long_are_refused(params):
    with pytest.raises(ValueError, match='got 78 tokens, expected at most 77'):
        features(params, np.zeros((1, 78), np.int32))
