import numpy as np
import pytest

from matrix_jax.nn.conv3d import CausalConv3d, Downsample2d, Upsample2d, conv3d


def direct(x, kernel, stride=1):
    """Unpadded convolution from its definition: [B T H W in], [kt kh kw in out]."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:3], axis=(1, 2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum('bthwiuvx,uvxio->bthwo', windows, kernel)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spatial_pad(x, before, after):
    return np.pad(x, ((0, 0), (0, 0), (before, after), (before, after), (0, 0)))


@pytest.mark.parametrize('kernel', [(3, 3, 3), (1, 1, 1), (1, 3, 3), (3, 1, 1)])
def test_conv3d_equals_the_definition(kernel):
    x, weight = normal(2, 4 + kernel[0] - 1, 5, 6, 3), normal(*kernel, 3, 4, seed=1)
    rows, columns = kernel[1] // 2, kernel[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns), (0, 0)))
    got = conv3d(x, weight)
    assert got.shape == (2, 4, 5, 6, 4)
    np.testing.assert_allclose(got, direct(padded, weight), atol=1e-5)


def test_the_first_frame_is_repeated_before_the_start():
    x = normal(1, 3, 4, 4, 2)
    params = {'kernel': normal(3, 3, 3, 2, 5, seed=1), 'bias': normal(5, seed=2)}
    y, context = CausalConv3d(5).apply({'params': params}, x)
    past = np.concatenate([x[:, :1], x[:, :1], x], axis=1)
    want = direct(spatial_pad(past, 1, 1), params['kernel']) + params['bias']
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_array_equal(context, x[:, 1:])


@pytest.mark.parametrize('chunks', [(1, 4), (2, 3), (1, 1, 1, 1, 1)])
def test_chunks_with_context_equal_the_whole(chunks):
    layer, x = CausalConv3d(4), normal(2, 5, 4, 3, 2)
    params = {'params': {'kernel': normal(3, 3, 3, 2, 4, seed=1), 'bias': normal(4, seed=2)}}
    want, _ = layer.apply(params, x)
    context, start, parts = None, 0, []
    for size in chunks:
        y, context = layer.apply(params, x[:, start : start + size], context)
        assert context.shape == (2, 2, 4, 3, 2)
        parts.append(y)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=1e-5)


def test_downsampling_pads_right_and_bottom():
    x, kernel, bias = normal(1, 2, 6, 4, 3), normal(3, 3, 3, 5, seed=1), normal(5, seed=2)
    y = Downsample2d(5).apply({'params': {'kernel': kernel, 'bias': bias}}, x)
    assert y.shape == (1, 2, 3, 2, 5)
    want = direct(spatial_pad(x, 0, 1), kernel[None], stride=2) + bias
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_upsampling_repeats_pixels_then_convolves():
    x, kernel, bias = normal(1, 2, 3, 2, 3), normal(3, 3, 3, 5, seed=1), normal(5, seed=2)
    y = Upsample2d(5).apply({'params': {'kernel': kernel, 'bias': bias}}, x)
    large = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)
    want = direct(spatial_pad(large, 1, 1), kernel[None]) + bias
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_half_precision_outputs_and_contexts():
    layer, x = CausalConv3d(4, dtype='bfloat16'), normal(1, 3, 4, 4, 2)
    params = {'params': {'kernel': normal(3, 3, 3, 2, 4, seed=1), 'bias': normal(4, seed=2)}}
    y, context = layer.apply(params, x)
    assert y.dtype == context.dtype == 'bfloat16'
    want, _ = CausalConv3d(4).apply(params, x)
    np.testing.assert_allclose(np.float32(y), want, atol=0.1, rtol=0.05)
