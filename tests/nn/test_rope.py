import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from matrix_jax.nn import rope

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix' / 'h_embeddings.safetensors'
TABLES = ('pos3d_D32_W6_H4_T5_s1.875_t1.0', 'pos3d_D48_W3_H5_T2_s1.0_t1.0',
          'pos3d_D64_W4_H4_T3_s1.5_t2.0')


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize('case', TABLES)
def test_grid_table_replays_the_reference(golden, case):
    pattern = r'pos3d_D(\d+)_W(\d+)_H(\d+)_T(\d+)_s([\d.]+)_t([\d.]+)'
    *sizes, spatial, temporal = re.fullmatch(pattern, case).groups()
    width, columns, rows, frames = map(int, sizes)
    table = rope.sincos_3d(rope.scaled_positions(frames, float(temporal)),
                           rope.scaled_positions(rows, float(spatial)),
                           rope.scaled_positions(columns, float(spatial)), width)
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
