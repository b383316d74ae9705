"""The published index: which frames and controls an entry means, and entries that mean nothing."""

import json

import numpy as np
import pytest

from matrix_jax import video
from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.data import index, ingest
from matrix_jax.data.records import NULL, Shard


@pytest.mark.parametrize(
    'length, rate, frames, start, chosen',
    [
        (100, 16, 5, 0, [0, 1, 2, 3, 4]),
        (100, 16, 5, 7, [7, 8, 9, 10, 11]),
        (100, 32, 5, 7, [7, 9, 11, 13, 15]),
        (100, 24, 5, 10, [10, 12, 13, 14, 16]),  # 10 11.5 13 14.5 16, half to even
        (100, 16, 5, 95, [95, 96, 97, 98, 99]),  # fits to the last frame
        (100, 16, 5, 96, [95, 96, 97, 98, 99]),  # would overrun: moved back
        (100, 16, 5, 5000, [95, 96, 97, 98, 99]),
        (20, 64, 5, 9, [3, 7, 11, 15, 19]),  # floor(20 - 16) - 1
        (16, 64, 5, 9, [0, 4, 8, 11, 15]),  # as long as the clip: spread over all
        (3, 16, 5, 0, [0, 0, 1, 2, 2]),  # 0 0.5 1 1.5 2
        (10, 39, 5, 0, [0, 2, 5, 7, 9]),
    ],
)  # 9.75 would round past the end
def test_sampled_frames(length, rate, frames, start, chosen):
    assert index.sample(np.arange(length) / rate, rate, frames, start).tolist() == chosen


def test_controls_are_those_of_every_fourth_sampled_frame():
    signal = ['D', 'DL', 'DR', 'B', 'BL', 'BR', 'N', 'NL', 'NR']
    found = index.label(signal, np.arange(0, 9), 20)
    assert [SYMBOLS[one] for one in found] == ['D', *['BL'] * 4, *['NR'] * 4]
    found = index.label(signal[:4], np.arange(0, 18, 2), 20)  # the last symbol goes on
    assert [SYMBOLS[one] for one in found] == ['D', *['B'] * 8]
    assert set(index.label(['N'], np.arange(9), 8)) == {SYMBOLS.index('D')}


def listing(tmp_path, *entries):
    path = tmp_path / 'index.json'
    path.write_text(json.dumps({'list': entries}))
    return path


GOOD = {'path': 'a.mp4', 'caption': 'A road.', 'control_signal_seq': 'D,DL', 'valid_frame_idx': 3}


def test_every_malformed_entry_is_named(tmp_path):
    wrong = [
        {**GOOD, 'path': 5},
        {**GOOD, 'valid_frame_idx': -1},
        GOOD,
        {**GOOD, 'control_signal_seq': 'D,XX'},
        {'path': 'b.mp4'},
        'a.mp4',
        {**GOOD, 'control_signal_seq': None, 'valid_frame_idx': 1.5},
        {**GOOD, 'path': ' '},
        {**GOOD, 'control_signal_seq': ''},
        {**GOOD, 'valid_frame_idx': True},
    ]
    with pytest.raises(ingest.IngestError) as error:
        index.read(listing(tmp_path, *wrong))
    said = str(error.value)
    for part in (
        'entry 0: path: got 5, expected a string',
        'entry 1: valid_frame_idx: got -1, ',
        "entry 3: control_signal_seq: unknown symbol 'XX' at position 2 of 2",
        'entry 4: caption: is missing',
        'entry 5: got "a.mp4", expected an object',
        'entry 6: control_signal_seq: got null',
        'entry 6: valid_frame_idx: got 1.5',
        'entry 7: path: got " "',
        'entry 8: control_signal_seq: got ""',
        'entry 9: valid_frame_idx: got true',
    ):
        assert part in said
    assert 'entry 2' not in said and '\n' not in said


@pytest.mark.parametrize(
    'text, said',
    [
        ('[', 'not JSON'),
        ('[]', 'expected {"list"'),
        ('{"list": []}', 'expected {"list"'),
        ('{"list": 3}', 'expected {"list"'),
        ('{}', 'expected {"list"'),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, said):
    (tmp_path / 'index.json').write_text(text)
    with pytest.raises(ingest.IngestError, match=said):
        index.read(tmp_path / 'index.json')
    with pytest.raises(ingest.IngestError, match='none.json: No such file'):
        index.read(tmp_path / 'none.json')


def test_wrong_settings_are_named():
    with pytest.raises(ingest.IngestError, match='--frames: got 16, expected 1'):
        index.IndexReader(32, 48, frames=16)


def test_entries_become_the_clips_that_they_mean(tmp_path):
    levels = np.arange(0, 240, 4, dtype=np.uint8)  # frame i shows 4 * i
    frames = np.broadcast_to(levels[:, None, None, None], (60, 32, 48, 3))
    (tmp_path / 'videos').mkdir()
    video.write_video(tmp_path / 'videos' / 'a.mp4', frames, fps=32, min_width=1)
    signal = ','.join(['D'] * 20 + ['NL'] * 5)
    entries = [
        {
            'path': 'videos/a.mp4',
            'caption': 'A road.',
            'control_signal_seq': signal,
            'valid_frame_idx': 10,
            'more': 'is kept out',
        },
        {'path': 'videos/a.mp4', 'caption': 'A road.'},
        {'path': 'videos/gone.mp4', 'caption': 'A road.'},
    ]
    sources = index.read(listing(tmp_path, *entries))
    settings = index.IndexReader(32, 48, frames=9, held_out=0.0)
    report = ingest.run(settings, tmp_path, sources, tmp_path / 'out')
    assert (report.clips, list(report.skipped)) == (2, ['videos/gone.mp4'])
    shard = Shard(tmp_path / 'out' / 'train-00000.array_record')
    labelled, unlabelled = shard[0], shard[1]
    shown = labelled.frames.mean((1, 2, 3)) / 4
    np.testing.assert_allclose(shown, np.arange(10, 28, 2), atol=0.6)
    # Frames 10, 18 and 26 of the file are the last ones of the three latent frames.
    assert [SYMBOLS[one] for one in labelled.controls] == ['D'] * 5 + ['NL'] * 4
    assert labelled.caption == 'A road.' and labelled.theme == 'index'
    np.testing.assert_allclose(unlabelled.frames[0].mean() / 4, 0, atol=0.6)
    assert (unlabelled.controls == NULL).all()
