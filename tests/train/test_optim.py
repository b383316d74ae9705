import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.train import optim


def test_the_rate_rises_and_falls():
    cfg = optim.Optimizer(schedule='cosine', warmup=10, floor=0.1)
    rate = optim.rate(cfg, 2.0, 110)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 5, 10, 60, 110, 500)],
        [0, 1, 2, 1.1, 0.2, 0.2],
        rtol=1e-5,
    )
    assert float(optim.rate(optim.Optimizer(), 3.0, 10)(99)) == 3


def test_muon_takes_kernels_and_adam_the_rest():
    params = {
        'net/kernel': jnp.eye(3) * 5,
        'layers/kernel': jnp.ones((2, 3, 4)),
        'net/bias': jnp.ones(3),
    }
    axes = {'net/kernel': ('i', 'o'), 'layers/kernel': ('layers', 'i', 'o'), 'net/bias': ('o',)}
    tx = optim.make(
        optim.Optimizer(kind='muon', learning_rate=1.0, adam_rate=0.5, weight_decay=0.0), 10, axes
    )
    grads = {name: leaf * 1e-3 for name, leaf in params.items()}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert optim._matrix('layers/kernel', 3, axes['layers/kernel']).reduction_axis == (1,)
    assert optim._matrix('net/bias', 1, ('o',)) is None
    # Muon makes the update of a kernel orthogonal; Adam's first one does not depend on the size.
    turned = np.asarray(updates['net/kernel'])
    np.testing.assert_allclose(turned, np.eye(3) * turned[0, 0], atol=1e-3)
    assert turned[0, 0] < 0
    bias = np.asarray(updates['net/bias'])
    assert -1 < bias[0] < -0.4 and (bias == bias[0]).all()


@pytest.mark.parametrize(
    'field, value',
    [
        ('learning_rate', 0),
        ('b1', 1.0),
        ('warmup', -1),
        ('weight_decay', float('inf')),
        ('clip', -1),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f'optimizer.{field}: got'):
        optim.Optimizer(**{field: value})
