"""Linear: the only kernel multiply of the networks, in floating point or in 8-bit integers.

Int8 is a kind of kernel, not a kind of layer: `quantize` replaces kernels of a parameter tree, and
the same network then multiplies in integers. One scale per output channel, found once from the
weights; one scale per token, found in every call. This is the rule of Matrix-Game 3.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.weights import conversion

MAX = 127


@struct.dataclass
class Int8:
    """A kernel in 8 bits, `values * scale`.

    Attributes:
      values: int8 [... in out]. First, as flax compares the first leaf with the layer's shape.
      scale: float32 [... out].
    """

    values: jax.Array
    scale: jax.Array

    def kernel(self):
        """What it stands for, float32 [... in out]."""
        return self.values * self.scale[..., None, :]


class Linear(nn.Module):
    """y = x @ kernel + bias, on the last axis.

    Parameters are created in float32 and may be loaded in any float type: they are cast at use. A
    kernel may also be `Int8`.

    Attributes:
      features: output width.
      use_bias: whether a bias is added.
      dtype: type of the multiply and of the output.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[... in] -> [... features]."""
        kernel = self.param(
            'kernel', nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        )
        if isinstance(kernel, Int8):
            y = multiply(x, kernel).astype(self.dtype)
        else:
            y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        return y


# --- 8 bits ----------------------------------------------------------------------------------


def quantize(params: Mapping, layers: Sequence[str]) -> dict:
    """Parameters with the kernels of some layers in 8 bits.

    Args:
      params: tree of a network; its other leaves stay as they are.
      layers: patterns of the paths of layers, such as '*/attention/*'.

    Raises:
      ValueError: a pattern fits no layer.
    """
    flat = conversion.flatten(params)
    for pattern in layers:
        chosen = [path for path in flat if fnmatch.fnmatchcase(path, f'{pattern}/kernel')]
        if not chosen:
            raise ValueError(f'int8: got {pattern!r}, which fits no linear layer')
        flat |= {
            path: flat[path] if isinstance(flat[path], Int8) else to_int8(flat[path])
            for path in chosen
        }
    return conversion.unflatten(flat)


def to_int8(kernel) -> Int8:
    """A kernel [... in out] in 8 bits: the largest weight of an output channel becomes 127."""
    kernel = jnp.asarray(kernel, jnp.float32)
    scale = jnp.maximum(jnp.abs(kernel).max(axis=-2) / MAX, 1e-12)
    values = jnp.clip(jnp.round(kernel / scale[..., None, :]), -MAX - 1, MAX)
    return Int8(values.astype(jnp.int8), scale)


def rows_to_int8(x):
    """Activations [... in] -> (int8 [... in], float32 scale of each token [... 1])."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    factor = MAX / jnp.where(largest > 0, largest, MAX)  # a token of zeros stays one
    # PARITY: towards zero, not to the nearest.
    return jnp.trunc(x * factor).astype(jnp.int8), 1 / factor


def multiply(x, kernel: Int8):
    """Activations [... in] times a kernel -> float32 [... out]; sums of products are int32."""
    values, scale = rows_to_int8(x)
    contract = (((values.ndim - 1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(values, kernel.values, contract, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale * kernel.scale
