"""CLIP image encoder: resize, config and table (values: tests/test_parity.py)."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from matrix_jax.encoders import clip_image as clip
from matrix_jax.weights import conversion

TINY = clip.PRESETS['tiny']


@functools.cache
def params():
    return clip.init(TINY, 0)


def test_resize_equals_the_definition():
    np.testing.assert_array_equal(clip.cubic(5, 5), np.eye(5))
    twice = clip.cubic(8, 16)
    np.testing.assert_allclose(twice.sum(1), 1, atol=1e-6)
    # A quarter of a pixel off, a = -0.75: the weights at distances 1.25, 0.25, 0.75, 1.75.
    want = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    np.testing.assert_allclose(twice[9, 3:7], want, atol=1e-6)
    np.testing.assert_allclose(
        twice[0, :2], [0.26171875 - 0.03515625 + 0.87890625, -0.10546875], atol=1e-6
    )
    # No low-pass: four pixels make one of a picture that shrinks ten times.
    assert (clip.cubic(100, 10) != 0).sum(1).max() <= 4


def test_images_of_any_size_are_resized():
    images = np.ones((2, 9, 5, 3), np.float32)
    seen = np.asarray(clip.pixels(TINY, images))
    assert seen.shape == (2, 28, 28, 3)
    np.testing.assert_allclose(seen[0, 3, 4], (1 - np.array(clip.MEAN)) / clip.STD, rtol=1e-4)


def test_tokens_depend_on_image_and_position():
    draws = np.random.default_rng(0)
    images = draws.normal(size=(2, 9, 12, 3)).astype(np.float32)
    tokens = np.asarray(jax.jit(functools.partial(clip.encode, TINY))(params(), images))
    assert tokens.shape == (2, TINY.tokens, TINY.dim) == (2, 5, 16)
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3
    assert np.abs(tokens[:, 1] - tokens[:, 2]).max() > 1e-3
    with pytest.raises(ValueError, match=r'got pictures \(1, 14, 28, 3\), expected \[B 28 28 3\]'):
        clip.ImageTower(TINY).apply({'params': params()}, np.zeros((1, 14, 28, 3)))


def test_used_weights_round_trip():
    table = clip.weights(TINY)
    tensors = conversion.to_torch(table, params())
    assert tensors['visual.transformer.1.attn.to_qkv.weight'].shape == (48, 16)
    assert not any(name.startswith('visual.transformer.2.') for name in tensors)
    more = {
        name: np.zeros(3)
        for name in (
            'visual.transformer.2.norm1.bias',
            'visual.post_norm.weight',
            'visual.head',
            'log_scale',
            'textual.token_embedding.weight',
        )
    }
    back = conversion.to_jax(table, tensors | more, clip.shapes(TINY))
    assert all(
        np.array_equal(leaf, again)
        for leaf, again in zip(jax.tree.leaves(back), jax.tree.leaves(params()), strict=True)
    )
    with pytest.raises(conversion.ConversionError, match='unknown key visual.transformer.3.norm1'):
        conversion.to_jax(table, tensors | {'visual.transformer.3.norm1.bias': np.zeros(16)})


def test_released_sizes_and_config():
    cfg = clip.PRESETS['vit_h_14']
    assert cfg.tokens == 257
    rows = [row for row in clip.weights(cfg) if isinstance(row, conversion.Row)]
    assert sum(len(row.keys()) for row in rows) == 5 + 31 * 12
    released = json.loads(json.dumps(cfg.to_released()))
    assert clip.Config.from_released(released | {'out_dim': 1024}) == cfg
    for change, message in (
        ({'pool': 'token'}, 'unknown key pool'),
        ({'image_size': 225}, 'expected a multiple of patch 14'),
        ({'num_heads': 3}, '3 does not divide width 1280'),
        ({'num_layers': 1}, 'got 1, expected at least 2'),
    ):
        with pytest.raises(ValueError, match=message):
            clip.Config.from_released(released | change)
    with pytest.raises(ValueError, match='missing dim'):
        clip.Config.from_released({key: value for key, value in released.items() if key != 'dim'})


def test_half_precision_stays_close():
    half = dataclasses.replace(TINY, dtype='bfloat16')
    images = np.random.default_rng(0).normal(size=(1, 28, 28, 3)).astype(np.float32)
    want = np.asarray(jax.jit(functools.partial(clip.encode, TINY))(params(), images))
    got = jax.jit(functools.partial(clip.encode, half))(params(), images)
    assert np.abs(got - want).mean() < 0.05 * want.std()
