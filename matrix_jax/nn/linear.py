"""The linear layer of all networks, in floating point or 8-bit integers.

`Int8` is a type of kernel: `quantize` replaces kernels of a parameter tree, and the same network
then multiplies in integers. Weights have one scale per output channel, activations one scale per
token, computed in each call, as in Matrix-Game 3.0. Values are rounded to the nearest integer;
Matrix-Game 3.0 rounds activations towards zero, which is an option.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from matrix_jax.parallel import compilation
from matrix_jax.weights import conversion

MAX = 127


@struct.dataclass
class Int8:
    """An 8-bit kernel, equal to `values * scale`.

    Attributes:
      values: int8 [... in out]; the first field, because flax checks the shape of the first leaf.
      scale: float32 [... out].
      truncate: whether activations are rounded towards zero.
    """

    values: jax.Array
    scale: jax.Array
    truncate: bool = struct.field(pytree_node=False, default=False)

    def kernel(self):
        """The kernel in float32 [... in out]."""
        return self.values * self.scale[..., None, :]


class Linear(nn.Module):
    """y = x @ kernel + bias, on the last axis.

    Parameters are created in float32, may be loaded in any float type and are cast when used. The
    kernel may be an `Int8`.

    Attributes:
      features: output width.
      use_bias: whether a bias is added.
      dtype: type of the product and of the output.
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
        elif _keeps_bfloat16(kernel, self.dtype):
            y = multiply_halves(x, kernel)
        else:
            y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        return y


def _keeps_bfloat16(kernel, dtype) -> bool:
    """Whether a float32 product takes its kernel in bfloat16, as it is stored."""
    wide = dtype == jnp.float32 and kernel.dtype == jnp.bfloat16
    return wide and compilation.backend() == 'gpu'


def multiply_halves(x, kernel):
    """Activations [... in] times a bfloat16 kernel -> float32 [... out], without a float32 kernel.

    Activations are the sum of two bfloat16 numbers, which is exact to 2^-16.
    """
    x = x.astype(jnp.float32)
    # The barriers keep the compiler from taking the rounding away, and from copying the kernels of
    # all layers into one.
    high = jax.lax.optimization_barrier(x.astype(jnp.bfloat16))
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    halves = jax.lax.optimization_barrier(jnp.stack([high, low]))
    made = jnp.matmul(halves, kernel, preferred_element_type=jnp.float32)
    return made[0] + made[1]


# --- 8 bits ----------------------------------------------------------------------------------


def quantize(params: Mapping, layers: Sequence[str], truncate: bool = False) -> dict:
    """Converts the kernels of some layers to 8 bits.

    Args:
      params: parameter tree of a network.
      layers: patterns of layer paths, such as '*/attention/*'.
      truncate: see `Int8`.

    Returns:
      The tree with `Int8` kernels in these layers.

    Raises:
      ValueError: a pattern matches no layer.
    """
    flat = conversion.flatten(params)
    for pattern in layers:
        chosen = [path for path in flat if fnmatch.fnmatchcase(path, f'{pattern}/kernel')]
        if not chosen:
            raise ValueError(f'int8: got {pattern!r}, which fits no linear layer')
        flat |= {
            path: flat[path] if isinstance(flat[path], Int8) else to_int8(flat[path], truncate)
            for path in chosen
        }
    return conversion.unflatten(flat)


def to_int8(kernel, truncate: bool = False) -> Int8:
    """Converts a kernel [... in out]; the largest weight of each output channel becomes 127.

    Args:
      kernel: floating point.
      truncate: see `Int8`.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    scale = jnp.maximum(jnp.abs(kernel).max(axis=-2) / MAX, 1e-12)
    values = jnp.clip(jnp.round(kernel / scale[..., None, :]), -MAX - 1, MAX)
    return Int8(values.astype(jnp.int8), scale, truncate)


def rows_to_int8(x, truncate: bool = False):
    """Activations [... in] -> (int8 [... in], float32 scale of each token [... 1])."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    factor = MAX / jnp.where(largest > 0, largest, MAX)  # avoids 0 / 0 for a token of zeros
    # PARITY: Matrix-Game 3.0 truncates, which makes activations too small on average.
    return (jnp.trunc if truncate else jnp.round)(x * factor).astype(jnp.int8), 1 / factor


def multiply(x, kernel: Int8):
    """Activations [... in] times a kernel -> float32 [... out]; products are summed in int32."""
    values, scale = rows_to_int8(x, kernel.truncate)
    contract = (((values.ndim - 1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(values, kernel.values, contract, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale * kernel.scale
