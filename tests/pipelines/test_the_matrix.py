"""The published call, with two folders of random weights at test size."""

import numpy as np
import pytest

import matrix_jax
from matrix_jax import video
from matrix_jax.config import UsageError


def test_a_short_video_is_the_base_clip(tiny, tmp_path, compiled_once):
    path = matrix_jax.TheMatrix(generation_model_path=str(tiny)).generate(
        'A car', length=4, output_folder=str(tmp_path)
    )
    assert path == str(tmp_path / 'base_video.mp4')
    assert video.read_video(path).shape == (65, 32, 48, 3)
    assert [one.name for one in tmp_path.iterdir()] == ['base_video.mp4']


def test_a_long_video_is_streamed_from_the_base_clip(tiny, tmp_path, compiled_once):
    path = matrix_jax.TheMatrix(str(tiny), str(tiny)).generate(
        'A car', length=5, control_signal='D,DL', output_folder=str(tmp_path), seed=1
    )
    assert path == str(tmp_path / 'final_video.mp4')
    assert video.read_video(tmp_path / 'base_video.mp4').shape == (65, 32, 48, 3)
    frames = video.read_video(path)
    assert frames.shape == (80, 32, 48, 3) and np.std(frames) > 1


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(length=0), 'length: got 0'),
        (dict(length=1.5), 'length: got 1.5'),
        (dict(length=5), 'needs a streaming_model_path'),
        (dict(gpu_id=99), 'gpu_id: got 99'),
        (dict(control_signal='D,X'), "'X' at position 2"),
    ],
)
def test_invalid_arguments_raise(given, said, tiny, tmp_path):
    pipeline = matrix_jax.TheMatrix(str(tiny))
    with pytest.raises(ValueError, match=said):
        pipeline.generate('A car', output_folder=str(tmp_path), **given)
    with pytest.raises(UsageError, match='no folder'):
        matrix_jax.TheMatrix(str(tmp_path / 'nowhere'))
    assert list(tmp_path.iterdir()) == []
