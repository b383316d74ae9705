"""Streams of a world made of arithmetic: a frame shows the control that it stands under."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.controls import driving
from matrix_jax.evals import video
from matrix_jax.stream import swin
from matrix_jax.stream.base import Stream, StreamDecoder


class World:
    """Latents are every fourth frame, and frames are latents shown four times."""

    vocabulary = driving.DrivingVocabulary()
    evaluator = 'carracing'

    def __init__(self, **stream):
        self.cfg = SimpleNamespace(
            height=64, width=96, fps=16, clip=None, stream=swin.Config(**stream)
        )

    def tokenize(self, prompts):
        return np.zeros([len(prompts), 1], np.int32)

    def condition(self, params, ids, frames, symbols):
        return frames, jnp.asarray(symbols)

    def encode_step(self, params, cache, frames):
        return jnp.zeros(()), jnp.asarray(frames, jnp.float32)[:, (0 if cache is None else 3) :: 4]

    def decoder(self):
        def show(params, cache, latents):
            return cache, jnp.repeat(latents.astype(jnp.uint8), 4, axis=1)

        return StreamDecoder(lambda params, latents: show(params, jnp.zeros(()), latents), show)

    def stream(self, control_binding):
        cfg = dataclasses.replace(self.cfg.stream, control_binding=control_binding)

        def step(params, carry, control):
            slots = swin.bind(cfg, carry, control)
            shown = jnp.repeat(slots[:, cfg.context : cfg.context + cfg.group_frames], 4, axis=1)
            frames = jnp.broadcast_to(shown[..., None, None, None], (*shown.shape, 2, 2, 3))
            return slots[:, cfg.group_frames :], frames.astype(jnp.uint8)

        return Stream(lambda params, cond, key: cond[1], step, step)


@pytest.mark.parametrize('binding', ['late', 'early'])
@pytest.mark.parametrize('group_frames', [1, 2])
def test_scripted_frames_stand_under_their_controls(binding, group_frames):
    streams = video.Streams(World(groups=4, group_frames=group_frames, context=3), None, binding)
    symbols = np.random.default_rng(0).integers(0, 9, (2, 3 + 6 * group_frames))
    frames = streams.script(['a', 'b'], np.zeros((2, 33, 2, 2, 3), np.uint8), symbols, 6, seed=0)
    np.testing.assert_array_equal(frames[:, ::4, 0, 0, 0], symbols[:, 3:])
    np.testing.assert_array_equal(frames[:, 3::4, 0, 0, 0], symbols[:, 3:])


def test_live_keys_are_seen_after_the_lag_and_see_the_frames_before():
    streams = video.Streams(World(groups=4, group_frames=1, context=3, head_group=2), None, 'head')
    assert streams.lag == 2
    seen = []

    def keys(shift, newest):
        seen.append(None if newest is None else int(newest[0, -1, 0, 0, 0]))
        return [[5 + shift % 3]]

    carry = streams.start(['a'], np.zeros((1, 25, 2, 2, 3), np.uint8), np.arange(6)[None], 0)
    frames = streams.run(carry, keys, 6)
    assert frames[0, ::4, 0, 0, 0].tolist() == [3, 4, 5, 6, 7, 5]
    assert seen == [None, 3, 4, 5, 6, 7]


def test_reconstruction_gives_the_frames_after_the_context():
    frames = np.arange(25, dtype=np.uint8).reshape(1, 25, 1, 1, 1) * np.ones((2, 2, 3), np.uint8)
    shown = video.reconstruct(World(groups=4, group_frames=1, context=3), None, frames, 3, 1)
    assert np.asarray(shown)[0, :, 0, 0, 0].tolist() == [12] * 4 + [16] * 4 + [20] * 4 + [24] * 4


def test_psnr_pools_the_error_before_the_logarithm():
    zero = np.zeros((1, 2, 2, 3), np.uint8)
    assert video.psnr([(zero, zero), (zero, zero + 10)]) == pytest.approx(
        10 * np.log10(255**2 / 50)
    )
    assert video.psnr([(zero, zero)]) == float('inf')


def test_sheet_has_a_row_per_video_and_a_column_per_time():
    rows = [np.full((32, 8, 16, 3), shade, np.uint8) for shade in (10, 20, 30)]
    rows[1][16:] = 99
    sheet = video.sheet(rows, (0.5, 1.5), 16, width=16)
    assert sheet.shape == (3 * 12 + 4, 2 * 20 + 4, 3)
    assert (sheet[20, 8, 0], sheet[20, 28, 0]) == (20, 99)
    keyed = video.sheet(rows, (0.5, 9.0), 16, [['DL'] * 32] * 3, width=64)
    assert keyed.shape == (3 * 36 + 4, 2 * 68 + 4, 3) and (keyed[6:34, 6:60] > 100).any()


def test_by_second_drops_the_rest():
    np.testing.assert_array_equal(video.by_second([[1, 3, 5, 7, 100]], 2), [[2, 6]])
