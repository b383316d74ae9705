"""data/starts.py: one clip per theme, chosen by the words of a prompt."""

import numpy as np

from matrix_jax import recipes
from matrix_jax.data import records, start_clips
from matrix_jax.encoders import tokenizers
from matrix_jax.weights.diffusers_layout import ASSETS


def test_prompt_words_pick_the_theme(tmp_path):
    def clip(theme, colour, on_road, caption):
        telemetry = np.zeros((13, len(records.TELEMETRY)), np.float32)
        telemetry[:, records.TELEMETRY.index('on_road')] = on_road
        return records.Clip(
            frames=np.full((13, 8, 16, 3), colour, np.uint8),
            caption=caption,
            controls=np.zeros(13, np.int8),
            theme=theme,
            seed=1,
            fps=16,
            telemetry=telemetry,
        )

    clips = [
        clip('snow', 9, 0, 'A car in snow.'),
        clip('snow', 250, 1, 'A car in snow.'),
        clip('night', 20, 1, 'A car, at night.'),
    ]
    for split in ('train', 'heldout'):
        records.write_shard(tmp_path / f'{split}-0{records.SUFFIX}', iter(clips))
    start_clips.write(tmp_path, tmp_path / 'out', frames=9)
    snow = start_clips.choose(tmp_path / 'out', 'deep Snow, please', 8, 16)
    assert snow.shape == (9, 8, 16, 3) and (snow == 250).all()  # the clip that is on the road
    assert (start_clips.choose(tmp_path / 'out', 'a car at night', 8, 16) == 20).all()
    assert start_clips.choose(tmp_path, 'snow', 8, 16) is None


def test_a_walk_starts_where_its_way_is_free(tmp_path):
    def clip(colour, speed):
        known = records.unknown(13)
        known['pose'] = np.zeros((13, len(records.POSE)), np.float32)
        known['pose'][:, 0] = speed * np.arange(13)
        return records.Clip(
            frames=np.full((13, 8, 16, 3), colour, np.uint8),
            caption='A walk.',
            theme='maze',
            seed=1,
            fps=16,
            **known,
        )

    for split, colour in (('train', 99), ('heldout', 150)):
        records.write_shard(
            tmp_path / f'{split}-0{records.SUFFIX}',
            iter([clip(9, -9), clip(colour, 5), clip(200, 1)]),
        )  # backwards: a wall
    start_clips.write(tmp_path, tmp_path / 'out', frames=9, picture=True)
    chosen = start_clips.choose(tmp_path / 'out', 'maze', 8, 16)
    assert chosen.shape == (1, 8, 16, 3) and (chosen == 99).all()
    assert (start_clips.choose(tmp_path / 'out', 'an unseen maze', 8, 16) == 150).all()
    assert list(start_clips.listing(tmp_path / 'out')) == ['maze', 'maze-unseen']


def test_captions_are_read_whole():
    """Those of the bundled worlds, and those that `write` chooses."""

    def unread(caption):
        return caption[20:]

    captions = {'A red car on a road, in the snow.', 'A car in the snow.'}
    own = max(captions, key=len)
    assert start_clips._short_caption(own, captions, unread) == 'A car in the snow.'
    assert start_clips._short_caption(own, {own}, unread) == 'A red car on a'
    tokenizer, _ = tokenizers.byte_pair()
    length = recipes.load('carracing').world.dit.text_length
    for name in ('carracing', 'carracing_base', 'carracing_swin'):
        found = [one['caption'] for one in start_clips.listing(ASSETS / name).values()]
        assert len(found) == 5 and not any(tokenizers.encode(tokenizer, found, length)[1])
