"""Replay of the UMT5 encoder, by the names of Wan's file."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from matrix_jax.encoders import t5
from matrix_jax.parity.record import Record, fast_jit
from matrix_jax.weights import conversion

SIZES = {
    'vocab_size': 'vocab',
    'dim': 'dim',
    'dim_ffn': 'mlp_dim',
    'num_heads': 'heads',
    'num_layers': 'layers',
    'num_buckets': 'buckets',
}


def umt5_encoder(record: Record) -> dict:
    """Encoded texts, those behind their ends set to zero, and the position biases."""
    config, inputs = record.config['t5'], record.inputs
    cfg = t5.Config(
        head_dim=config['dim_attn'] // config['num_heads'],
        layer_bias=True,
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
    )
    params = conversion.to_jax(t5.weights(cfg), record.weights, t5.shapes(cfg))
    ids, mask = np.asarray(inputs['ids'], np.int32), np.asarray(inputs['mask'], bool)
    out = fast_jit(t5.T5Encoder(cfg).apply)({'params': params}, ids, mask)
    zeroed = np.where(mask[..., None], out, 0)
    outputs = {'out': out, 'out_zero_padded': zeroed, 'hf_umt5_out_zero_padded': zeroed}
    for name in record.outputs:
        if name.startswith('rel_buckets_m'):
            before, after = (int(part) for part in name.removeprefix('rel_buckets_m').split('_p'))
            outputs[name] = t5.relative_buckets(before + after + 1, cfg)[before]
        if name.startswith('pos_bias_block') and '_stride' in name:
            layer, stride = (
                int(part) for part in name.removeprefix('pos_bias_block').split('_stride')
            )
            table = params['layers']['relative_bias'][layer]
            bias = table[t5.relative_buckets(ids.shape[1], cfg)][::stride, ::stride]
            outputs[name] = jnp.moveaxis(bias, -1, 0)[None]
    return outputs


REPLAYS = {'umt5_encoder': umt5_encoder}
