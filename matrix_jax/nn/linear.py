"""Linear: the only kernel multiply of the networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Linear(nn.Module):
    """y = x @ kernel + bias, on the last axis.

    Parameters are created in float32 and may be loaded in any float type: they are cast at use.

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
        kernel = self.param('kernel', nn.initializers.xavier_uniform(),
                            (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
        return y
