"""Replays of single layers that several systems share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from matrix_jax.nn import linear
from matrix_jax.parity.record import Record


def int8_linear(record: Record) -> dict[str, np.ndarray]:
    """An 8-bit linear layer, in float32 and in the bfloat16 of the reference.

    Also variants that the reference does not use: rounded activations, bfloat16 weight scales.
    """
    x, bias = (jnp.asarray(part) for part in (record.inputs['x'], record.weights['bias']))
    weight = jnp.asarray(record.weights['weight'])
    kernel = linear.to_int8(weight.T, truncate=True)
    values, scale = linear.rows_to_int8(x, truncate=True)

    def sums(values):
        return jnp.matmul(values, kernel.values, preferred_element_type=jnp.int32)

    def layer(params, dtype, use_bias=True):
        net = linear.Linear(len(weight), use_bias, dtype)
        return net.apply({'params': params}, x).astype(jnp.float32)

    scale_bf16 = kernel.scale.astype(jnp.bfloat16).astype(jnp.float32)
    bf16_scales = linear.Int8(kernel.values, scale_bf16, truncate=True)
    rounded = jnp.sign(x) * jnp.floor(jnp.abs(x) / scale + 0.5)
    outputs = {
        'weight_int8': kernel.values.T,
        'weight_scales': kernel.scale,
        'x_int8': values,
        'x_scales': scale[:, 0],
        'acc_int32': sums(values),
        'out_f32_nobias': layer({'kernel': kernel}, jnp.float32, False),
        'out_f32_nobias_bf16_scales': layer({'kernel': bf16_scales}, jnp.float32, False),
        'out_bf16_path': layer({'kernel': kernel, 'bias': bias}, jnp.bfloat16),
        'fallback_dequant_f32': layer({'kernel': kernel.kernel(), 'bias': bias}, jnp.float32),
        'float_reference': layer({'kernel': weight.T, 'bias': bias}, jnp.float32),
        'x_int8_rounded_alt': rounded,
        'out_f32_nobias_rounded_alt': sums(rounded.astype(jnp.int8)) * scale * kernel.scale,
    }
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}


REPLAYS = {'int8_linear': int8_linear}
