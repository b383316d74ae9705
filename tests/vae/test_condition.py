import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from matrix_jax.vae import condition, wan
from tests.vae.drawn import normal

TINY = dataclasses.replace(wan.PRESETS['tiny'], chunk=32)  # a loop would be slow


@pytest.mark.parametrize(
    ('rows', 'columns', 'want'),
    [
        (352, 640, (0, 0, 352, 640)),
        (704, 640, (176, 0, 528, 640)),
        (352, 1000, (0, 180, 352, 820)),
        (37, 70, (0, 2, 37, 68)),  # borders at 1.5 and 68.5: halves to even
        (5, 1, (2, 0, 3, 1)),  # nothing would be left
    ],
)
def test_the_middle_is_cropped(rows, columns, want):
    assert condition.crop(rows, columns, 352, 640) == want


def test_images_are_cropped_and_resized():
    picture = np.random.default_rng(0).integers(0, 255, (40, 20, 3), np.uint8)
    want = Image.fromarray(picture).crop((0, 12, 20, 28)).resize((10, 8), Image.BILINEAR)
    np.testing.assert_array_equal(condition.fit(picture, 8, 10), want)
    assert condition.fit(picture[:5, :1], 8, 16).shape == (8, 16, 3)
    np.testing.assert_allclose(
        condition.pixels(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], atol=1e-6
    )


@pytest.mark.parametrize(
    'picture',
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        'picture.png',
    ],
    ids=['empty', 'rgba', 'grey', 'float', 'text'],
)
def test_arrays_that_are_no_images_are_refused(picture):
    with pytest.raises(ValueError, match=r'picture: got .*, expected uint8 \[H W 3\]'):
        condition.fit(picture, 8, 8)


def test_long_clips_repeat_the_latents_of_grey_frames():
    draws, image, frames = np.random.default_rng(7), normal(2, 4, 4, 3), TINY.settled + 4
    params = jax.tree.map(
        lambda leaf: draws.normal(size=leaf.shape).astype(np.float32) * 0.5, wan.shapes(TINY)
    )
    clip = np.pad(image[:, None], ((0, 0), (0, 2 * (frames - 1)), (0, 0), (0, 0), (0, 0)))
    whole = np.asarray(
        jax.jit(lambda p, x: wan.scaled(TINY, wan.encode(TINY, p, x)[0]))(params, clip)
    )
    made = np.asarray(jax.jit(lambda p, x: condition.condition(TINY, p, x, frames))(params, image))
    assert made.shape == (2, frames, 2, 2, 2 + 4)
    np.testing.assert_allclose(made[..., 2:], whole, atol=1e-5)
    np.testing.assert_array_equal(made[..., :2].min((0, 2, 3, 4)), np.arange(frames) == 0)
    # The number is the smallest: the frame before still tells the two images apart.
    apart = np.abs(whole[0] - whole[1]).max((1, 2, 3))
    assert (apart[: TINY.settled] > 0).all() and not apart[TINY.settled :].any()


def test_short_clips_are_encoded_as_they_are():
    made = jax.eval_shape(
        lambda p, x: condition.condition(wan.PRESETS['wan_2_1'], p, x, 3),
        wan.shapes(wan.PRESETS['wan_2_1']),
        np.zeros((1, 16, 24, 3)),
    )
    assert made.shape == (1, 3, 2, 3, 4 + 16)
