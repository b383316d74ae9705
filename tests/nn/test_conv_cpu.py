import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.config import Mesh
from matrix_jax.nn import conv3d, conv_cpu
from matrix_jax.parallel import sharding, spatial
from tests.nn.test_conv3d import direct, normal, spatial_pad

WIDE = 24  # channels, enough for Winograd


@pytest.mark.parametrize('m', conv_cpu.POINTS)
@pytest.mark.parametrize('frames', [1, 4, 5])
def test_winograd_equals_the_sum_of_three_taps(m, frames):
    x, kernel = normal(2, frames + 2, 3), normal(3, 3, seed=1)
    y = conv_cpu.winograd(x, kernel, m, lambda x, tap: x * tap)
    want = sum(x[:, tap : tap + frames] * kernel[tap] for tap in range(3))
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, atol=2e-6)


def test_the_tile_with_the_fewest_products_is_chosen():
    assert [conv_cpu.best_tile(frames) for frames in (1, 2, 3, 4, 8, 9)] == [1, 2, 4, 4, 4, 4]
    assert (
        conv_cpu.products(8, 4) == 12
        and conv_cpu.products(8, 2) == 16
        and conv_cpu.products(8, 1) == 24
    )


@pytest.mark.parametrize('frames', [2, 3, 4, 9])
def test_wide_convolutions_use_winograd_and_stay_exact(frames, monkeypatch):
    x, kernel = normal(1, frames + 2, 5, 6, WIDE), normal(3, 3, 3, WIDE, 4, seed=1)
    want = direct(spatial_pad(x, 1, 1).astype(np.float64), kernel.astype(np.float64))
    np.testing.assert_allclose(conv3d.conv3d(x, kernel), want, atol=5e-6 * np.abs(want).max())
    tiles = []
    monkeypatch.setattr(conv_cpu, 'winograd', lambda *given: tiles.append(given[2]))
    conv3d.conv3d(x, kernel)
    assert tiles == [conv_cpu.best_tile(frames)]


@pytest.mark.parametrize(
    'x, taps',
    [
        (normal(1, 3, 3, 3, WIDE), 3),  # one frame saves no products
        (normal(1, 6, 3, 3, 8), 3),  # few channels
        (normal(1, 6, 3, 3, WIDE), 2),
        (normal(1, 6, 3, 3, WIDE).astype(jnp.bfloat16), 3),
    ],
)  # differences lose digits of half precision
def test_other_convolutions_do_not_use_winograd(x, taps, monkeypatch):
    monkeypatch.setattr(conv_cpu, 'winograd', None)
    kernel = normal(taps, 3, 3, x.shape[-1], 2).astype(x.dtype)
    assert conv3d.conv3d(x, kernel).shape == (1, x.shape[1] - taps + 1, 3, 3, 2)


@pytest.mark.parametrize(
    'function, taps, backend, convolutions',
    [
        (conv3d.conv3d, (3, 3, 3), 'gpu', 1),
        (conv3d.upsample_conv2d, (3, 3), 'gpu', 4),
        (conv3d.upsample_conv2d, (3, 3), 'tpu', 1),
    ],
)
def test_accelerators_run_convolutions_of_the_same_result(
    function, taps, backend, convolutions, monkeypatch
):
    x, kernel = normal(1, 6, 5, 6, WIDE), normal(*taps, WIDE, 4, seed=1)
    want = function(x, kernel)
    monkeypatch.setattr(conv_cpu, 'winograd', None)
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    # A new function, as jax keeps traces that were made for another backend.
    program = str(jax.make_jaxpr(lambda *given: function(*given))(x, kernel))
    assert program.count('conv_general_dilated[') == convolutions
    np.testing.assert_allclose(function(x, kernel), want, atol=5e-6 * np.abs(want).max())


def test_winograd_gradients_equal_those_of_the_plain_sum(monkeypatch):
    x, kernel = normal(1, 6, 4, 4, WIDE), normal(3, 3, 3, WIDE, 4, seed=1)

    def gradients():
        return jax.grad(lambda x, kernel: jnp.square(conv3d.conv3d(x, kernel)).sum(), (0, 1))(
            x, kernel
        )

    made = gradients()
    monkeypatch.setattr(conv_cpu, 'best_tile', lambda frames: 1)
    for one, other in zip(made, gradients(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_split_rows_equal_the_whole_picture():
    """A convolution exchanges its halo once, for all of its products."""
    params = {'first': normal(3, 3, 3, WIDE, WIDE, seed=1), 'second': normal(3, 3, WIDE, 3, seed=2)}
    x = normal(1, 6, 8, 3, WIDE)

    def network(params, cache, x):
        y = conv3d.conv3d(x, params['first'])
        return cache, conv3d.upsample_conv2d(y, params['second'])

    want = network(params, None, x)[1]
    with jax.set_mesh(sharding.make_mesh(Mesh(seq=4))):
        run = jax.jit(lambda params, x: spatial.split_rows(network, params, None, x)[1])
        program = run.lower(params, x).compile()
        np.testing.assert_allclose(program(params, x), want, atol=1e-6 * np.abs(want).max())
    assert program.as_text().count(' collective-permute(') <= 4


def test_weights_of_doubled_frames_are_rounded_once(monkeypatch):
    x, kernel = normal(1, 2, 5, 6, WIDE), normal(3, 3, WIDE, 4, seed=1)
    want = conv3d.upsample_conv2d(x, kernel)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    half = conv3d.upsample_conv2d(*(value.astype(jnp.bfloat16) for value in (x, kernel)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), want, atol=0.01 * np.abs(want).max())
