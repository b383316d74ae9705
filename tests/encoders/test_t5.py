"""T5 encoder: bias buckets, and what the config reader accepts (values: tests/test_parity.py)."""

import dataclasses

import jax
import numpy as np
import pytest

from matrix_jax.benchmark.hlo import collectives
from matrix_jax.config import Mesh
from matrix_jax.encoders import t5
from matrix_jax.nn import initializers
from matrix_jax.parallel import sharding
from matrix_jax.weights import conversion

TINY = t5.PRESETS['tiny']


def test_buckets_of_the_released_size():
    buckets = t5.relative_buckets(200, t5.PRESETS['v1_1_xxl'])
    left = buckets[150, 150::-1]  # keys 0, 1, 2, ... to the left
    assert left[:8].tolist() == list(range(8))
    assert (left[8], left[15], left[16], left[31], left[32], left[64], left[128]) == (
        8,
        9,
        10,
        11,
        12,
        14,
        15,
    )
    assert buckets.max() == 31 and buckets[0, 1] == 17  # the right half starts at 16


def test_config_round_trip():
    for cfg in t5.PRESETS.values():
        assert t5.Config.from_released(cfg.to_released()) == cfg


@pytest.mark.parametrize(
    'change, message',
    [
        ({'feed_forward_proj': 'relu'}, "feed_forward_proj is 'relu', expected 'gated-gelu'"),
        ({'d_model': None}, 'missing d_model'),
    ],
)
def test_config_faults(change, message):
    released = {
        key: value for key, value in (TINY.to_released() | change).items() if value is not None
    }
    with pytest.raises(ValueError, match=message):
        t5.Config.from_released(released)


@pytest.fixture(scope='module')
def params():
    return initializers.draw_tree(t5.init_rules(TINY), t5.shapes(TINY), 0)


def test_table_covers_the_tree_and_the_tied_copy_is_dropped(params):
    torch = conversion.to_torch(t5.weights(TINY), params)
    torch['encoder.embed_tokens.weight'] = torch['shared.weight']
    again = conversion.to_jax(t5.weights(TINY), torch, t5.shapes(TINY))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_half_precision_stays_close(params):
    ids = np.arange(12, dtype=np.int32)[None]
    full, half = (
        jax.jit(t5.T5Encoder(dataclasses.replace(TINY, dtype=dtype)).apply)({'params': params}, ids)
        for dtype in ('float32', 'bfloat16')
    )
    assert half.dtype == 'bfloat16'
    np.testing.assert_allclose(np.asarray(half, np.float32), full, atol=0.1)


UMT5 = dataclasses.replace(TINY, layer_bias=True)


def test_umt5_has_a_bias_per_layer_and_two_namings():
    flat = conversion.flatten(t5.shapes(UMT5))
    assert flat['layers/relative_bias'].shape == (2, 8, 2) and 'relative_bias' not in flat
    draw = np.random.default_rng(0).normal
    params = conversion.unflatten(
        {path: draw(size=leaf.shape).astype('float32') for path, leaf in flat.items()}
    )
    table = t5.weights(UMT5)
    torch = conversion.to_torch(table, params)
    assert 'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight' in torch
    wan = {}
    for key, part in torch.items():
        for rename in t5.WAN_NAMES:  # the other way round
            back = conversion.Rename(rename.known, rename.torch).name(key)
            if back and rename.name(back) == key:
                wan[back] = part
                break
    assert {
        'token_embedding.weight',
        'blocks.1.pos_embedding.embedding.weight',
        'blocks.0.attn.q.weight',
        'blocks.0.ffn.gate.0.weight',
        'norm.weight',
    } <= set(wan)
    assert len(wan) == len(torch)
    for named in (torch, wan):
        jax.tree.map(
            np.testing.assert_array_equal, params, conversion.to_jax(table, named, t5.shapes(UMT5))
        )
    assert t5.Config.from_released(UMT5.to_released()) == UMT5
    with pytest.raises(ValueError, match="model_type is 'mt5', expected 't5' or 'umt5'"):
        t5.Config.from_released(UMT5.to_released() | {'model_type': 'mt5'})


def test_masked_tokens_are_not_seen(params):
    ids = np.arange(3, 15, dtype=np.int32)[None]
    mask = np.arange(12)[None] < 7
    encode = jax.jit(t5.T5Encoder(TINY).apply)
    alone = encode({'params': params}, ids[:, :7])
    np.testing.assert_allclose(encode({'params': params}, ids, mask)[:, :7], alone, atol=1e-5)
    assert np.abs(encode({'params': params}, ids)[:, :7] - alone).max() > 1e-3


@pytest.mark.parametrize(
    'mesh, exchange',
    [
        (Mesh(), ''),
        (Mesh(seq=2), 'heads'),
        (Mesh(seq=3), 'heads'),
        (Mesh(seq=5), 'keys'),
        (Mesh(seq=6), 'heads'),
        (Mesh(seq=8), 'keys'),
        (Mesh(data=2, seq=3), 'heads'),
        (Mesh(data=2, seq=4), 'keys'),
    ],
    ids=str,
)
def test_split_tokens_equal_one_device(mesh, exchange, split):
    """Eleven tokens divide by no mesh; only the order of sums differs."""
    cfg, params, ids, wanted = split
    with sharding.use_mesh(sharding.make_mesh(mesh)):
        encode = jax.jit(t5.T5Encoder(cfg).apply).lower({'params': params}, ids).compile()
    assert np.abs(encode({'params': params}, ids) - wanted).max() <= 2e-6 * np.abs(wanted).max()
    found = {kind: one['count'] for kind, one in collectives(encode.as_text(), 8).items()}
    # Tokens meet in the attention of a layer, by two exchanges or by one; the end gathers them.
    assert (
        found
        == {
            'heads': {'all-to-all': 2 * cfg.layers, 'all-gather': 1},
            'keys': {'all-gather': cfg.layers + 1},
            '': {},
        }[exchange]
    )


@pytest.fixture(scope='module')
def split():
    """(config, parameters, ids, features of one device)."""
    cfg = dataclasses.replace(TINY, heads=6)
    params = initializers.draw_tree(t5.init_rules(cfg), t5.shapes(cfg), 1)
    ids = np.random.default_rng(0).integers(3, cfg.vocab, (2, 11), np.int32)
    return cfg, params, ids, np.asarray(jax.jit(t5.T5Encoder(cfg).apply)({'params': params}, ids))
