"""The page that asks which clip is generated."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from matrix_jax.config import UsageError
from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.evals import blind, carracing
from matrix_jax.stream import swin
from tests.evals.test_video import World


class Followed(World):
    """The world of arithmetic, with what `Streams.follow` needs."""

    start_frames = 13

    def stream(self, control_binding):
        return super().stream(control_binding or 'late')

    def round_up_controls(self, count):
        return count

    def split_controls(self, controls):
        return swin.video_controls(self.cfg.stream, controls)

    def inputs(self, prompt, frames, controls):
        return (np.zeros([1, 1]), frames[None], self.vocabulary.encode(controls)[None]), ''


def clip(number, frames=33):
    controls = np.repeat(np.arange(12) % len(SYMBOLS), 4)[3 : 3 + frames]
    pictures = np.full([frames, 2, 2, 3], 100 + number, np.uint8)
    return SimpleNamespace(
        frames=pictures, controls=controls, caption=f'caption {number}', labelled=True
    )


def test_pairs_have_the_same_controls_and_a_random_order():
    world = Followed(groups=2, group_frames=1, context=2)
    clips = [clip(number) for number in range(8)]
    found = blind.pairs(world, None, carracing, clips, 6, 1, seed=0)
    assert len(found) == 6
    assert {pair.generated_is_left for pair in found} == {True, False}
    for pair in found:
        assert len(pair.recorded) == len(pair.generated) == 16
        # The world shows its controls: those of the clip after the context of two latent frames.
        np.testing.assert_array_equal(pair.generated[::4, 0, 0, 0], [2, 3, 4, 5])
        assert (pair.recorded >= 100).all()
    assert [int(pair.recorded[0, 0, 0, 0]) for pair in found] == [100, 101, 103, 104, 106, 107]


@pytest.mark.parametrize(
    'clips, said',
    [
        ([clip(0)], '--blind: got 2, expected at most the 1 held-out clips'),
        ([clip(0), clip(1, 17)], 'got held-out clips of 17 frames, expected at least 33'),
    ],
)
def test_too_few_or_too_short_clips_are_refused(clips, said):
    world = Followed(groups=2, group_frames=1, context=2)
    with pytest.raises(UsageError, match=said):
        blind.pairs(world, None, carracing, clips, 2, 1, seed=0)


def test_the_page_holds_all_clips_and_knows_the_generated_one():
    frames = np.zeros([4, 16, 16, 3], np.uint8)
    shown = [blind.Pair(frames, frames + 200, left) for left in (True, False)]
    text = blind.page('Toy', shown, 16)
    assert '<title>Toy: which clip is generated?</title>' in text
    questions = json.loads(re.search(r'const questions = (.*);\n', text)[1])
    assert [question['generated'] for question in questions] == [0, 1]
    dark, light = questions[1]['clips']
    assert questions[0]['clips'] == [light, dark] and dark != light
    assert dark.startswith('data:video/mp4;base64,')
