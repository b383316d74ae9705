import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.nn.linear import Linear
from matrix_jax.nn.precompute import COLLECTION, once


class Layer(nn.Module):
    """Adds a function of y to x, as a layer of a scan."""

    @nn.compact
    def __call__(self, x, y):
        return x + once(self, 'shift', lambda: Linear(3, name='linear')(y)), None


STACK = nn.scan(
    Layer,
    variable_axes={'params': 0, COLLECTION: 0},
    split_rngs={'params': True},
    in_axes=nn.broadcast,
    length=4,
)()


def test_what_is_made_once_is_stacked_like_parameters_and_read_in_their_place():
    x, y = jnp.ones((2, 3)), jax.random.normal(jax.random.key(0), (2, 5))
    variables = STACK.init(jax.random.key(1), x, y)
    assert set(variables) == {'params'}
    (want, _), kept = STACK.apply(variables, x, y, mutable=[COLLECTION])
    assert kept[COLLECTION]['shift'].shape == (4, 2, 3)
    np.testing.assert_array_equal(want, STACK.apply(variables, x, y)[0])
    alone, _ = STACK.apply(kept, x, None)  # neither the layer nor what it reads is there
    np.testing.assert_array_equal(alone, want)
