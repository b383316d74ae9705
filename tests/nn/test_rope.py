import fractions
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from matrix_jax.nn import rope

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix' / 'h_embeddings.safetensors'
TABLES = (
    'pos3d_D32_W6_H4_T5_s1.875_t1.0',
    'pos3d_D48_W3_H5_T2_s1.0_t1.0',
    'pos3d_D64_W4_H4_T3_s1.5_t2.0',
)


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize('case', TABLES)
def test_grid_table_replays_the_reference(golden, case):
    pattern = r'pos3d_D(\d+)_W(\d+)_H(\d+)_T(\d+)_s([\d.]+)_t([\d.]+)'
    *sizes, spatial, temporal = re.fullmatch(pattern, case).groups()
    width, columns, rows, frames = map(int, sizes)
    table = rope.sincos_3d(
        rope.scaled_positions(frames, float(temporal)),
        rope.scaled_positions(rows, float(spatial)),
        rope.scaled_positions(columns, float(spatial)),
        width,
    )
    np.testing.assert_allclose(table, golden[f'outputs/{case}'], atol=1e-6)


@pytest.mark.parametrize('width', [32, 1920])
def test_timestep_code_replays_the_reference(golden, width):
    code = rope.timestep_code(golden['inputs/t'], width)
    np.testing.assert_allclose(code, golden[f'outputs/timestep_emb_dim{width}'], atol=1e-4)


@pytest.mark.parametrize('width', [18, 256])
def test_guidance_code_replays_the_reference(golden, width):
    code = rope.guidance_code(golden['inputs/w'], width)
    np.testing.assert_allclose(code, golden[f'outputs/guidance_emb_dim{width}'], atol=2e-3)


def test_odd_guidance_width_ends_in_a_zero():
    code = np.asarray(rope.guidance_code(np.array([3.0]), 19))
    assert code.shape == (1, 19) and code[0, -1] == 0
    np.testing.assert_array_equal(code[:, :18], rope.guidance_code(np.array([3.0]), 18))


def test_position_is_explicit():
    table = rope.sincos_3d(np.arange(4.0), np.arange(2.0), np.arange(3.0), 32)
    later = rope.sincos_3d(np.arange(2.0, 4.0), np.arange(2.0), np.arange(3.0), 32)
    np.testing.assert_array_equal(table[2:], later)


def test_refuses_a_width_that_does_not_split():
    with pytest.raises(ValueError, match='sincos_3d.width: got 24'):
        rope.sincos_3d(np.arange(2), np.arange(2), np.arange(2), 24)


@pytest.mark.parametrize('position', [0, 5, 255, 256, 1023, 100_000, 2**31 - 1, -99_990])
def test_rotations_of_traced_positions_are_exact(position):
    speeds = rope.frequencies(22)
    got = rope.rotations(jnp.array([position], jnp.int32), speeds)
    # Python's integers keep the phase of any position.
    angles = [
        float(fractions.Fraction(speed) * position % fractions.Fraction(2 * math.pi))
        for speed in speeds
    ]
    for part, want in zip(got, (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(part[0], want, atol=2e-6 if abs(position) > 2**24 else 6e-7)


def test_rotated_products_depend_on_relative_positions_only():
    q, k = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype('f4')

    def products(start):
        rotation = rope.rotations(jnp.arange(3) + start, rope.frequencies(3))
        return np.einsum('nke,mke->knm', rope.rotate(q, rotation), rope.rotate(k, rotation))

    near = products(0)
    np.testing.assert_allclose(products(100_000), near, atol=5e-6)
    assert not np.allclose(near, np.einsum('nke,mke->knm', q, k), atol=0.1)


def test_pairs_are_rotated_and_the_rest_is_kept():
    x = np.random.default_rng(1).normal(size=(4, 2, 10)).astype('f4')
    rotation = rope.rotations(np.arange(4), rope.frequencies(3, 256.0))
    y = np.asarray(rope.rotate(x, rotation))
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])
    angles = np.arange(4)[:, None] * 256.0 ** (-np.arange(3) / 3)
    want = (x[..., 0:6:2] + 1j * x[..., 1:6:2]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(y[..., 0:6:2] + 1j * y[..., 1:6:2], want, atol=1e-6)


def test_a_grid_gives_a_third_of_the_pairs_each_to_row_and_column():
    cos, sin = rope.rotations_3d(np.array([3, 7]), 2, 5, 128)
    assert cos.shape == sin.shape == (2, 10, 64)
    angles = np.concatenate(
        [
            np.full(22, 7.0) * rope.frequencies(22),
            1.0 * rope.frequencies(21),
            4.0 * rope.frequencies(21),
        ]
    )
    np.testing.assert_allclose(cos[1, 9], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[1, 9], np.sin(angles), atol=1e-6)
    traced = rope.rotations_3d(jnp.array([3, 7]), 2, 5, 128)
    np.testing.assert_allclose(traced, (cos, sin), atol=1e-6)


def test_level_code_equals_float64():
    level = np.array([0, 0.5, 625, 908.8427734375, 1000], np.float32)
    angles = level.astype(np.float64)[:, None] * rope.frequencies(128)
    np.testing.assert_allclose(
        rope.level_code(level, 256), np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=5e-7
    )
