"""Actions; the parity tests compare benchmark sequences with the reference."""

import json

import numpy as np
import pytest

from matrix_jax.controls.driving import ControlError
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary

UNIVERSAL, DRIVE, RUN = map(KeyboardMouseVocabulary, ('universal', 'gta_drive', 'templerun'))


@pytest.mark.parametrize(
    'vocabulary, text, want',
    [
        (UNIVERSAL, 'W*2,W+right*1,idle', ['W', 'W', 'W+right', 'idle']),
        (UNIVERSAL, ' d + w, LEFT+up:0.05 ', ['W+D', 'up:0.05+left']),
        (UNIVERSAL, 'left+right, right:0.1\nA*2', ['idle', 'right', 'A', 'A']),
        (DRIVE, 'w+a*2,D:0.3', ['W+left', 'W+left', 'right:0.3']),
        (RUN, 'w*2,turnleft,nomove,D', ['jump', 'jump', 'turnleft', 'idle', 'rightside']),
        (
            UNIVERSAL,
            '[{"keys": ["W", "A"], "mouse": [0.05, -0.1], "frames": 2}, "S*2", {}]',
            ['W+A+up:0.05+left'] * 2 + ['S', 'S', 'idle'],
        ),
        (UNIVERSAL, '{"actions": ["W", {"mouse": [0, 0.1]}]}', ['W', 'right']),
    ],
)
def test_one_spelling_for_each_action(vocabulary, text, want):
    assert vocabulary.parse(text) == want
    assert [vocabulary.canonical(action) for action in want] == want


def test_encode():
    np.testing.assert_array_equal(
        UNIVERSAL.encode(['W+D', 'down:0.5+left', 'idle']),
        np.float32([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, -0.5, -0.1], [0] * 6]),
    )
    np.testing.assert_array_equal(DRIVE.encode(['S+right']), np.float32([[0, 1, 0, 0.1]]))
    np.testing.assert_array_equal(RUN.encode(['idle', 'turnright']), np.eye(7)[[0, 4]])
    for vocabulary in (UNIVERSAL, DRIVE, RUN):
        action = vocabulary.canonical('W')
        assert vocabulary.encode([action]).shape == (1, vocabulary.mode.width)


def test_decode_is_the_inverse_of_encode():
    for vocabulary, texts in (
        (UNIVERSAL, ['W+D+up:0.05+left', 'idle', 'right:0.1234']),
        (DRIVE, ['S+right']),
        (RUN, ['idle', 'turnright']),
    ):
        assert vocabulary.decode(vocabulary.encode(texts)) == texts


def test_a_file_is_read(tmp_path):
    (tmp_path / 'walk.txt').write_text('W*3\nright*2\n')
    (tmp_path / 'walk.json').write_text(json.dumps(['W*3', 'right*2']))
    for name in ('walk.txt', 'walk.json'):
        assert UNIVERSAL.parse(str(tmp_path / name)) == ['W'] * 3 + ['right'] * 2


def test_read_returns_as_many_actions_as_needed():
    assert UNIVERSAL.read('W*5', 3) == (
        ['W'] * 3,
        ['actions: 5 frames, 3 needed; the last 2 are not used'],
    )
    assert UNIVERSAL.read('S,W', 4, pad='hold')[0] == ['S', 'W', 'W', 'W']
    assert UNIVERSAL.read(None, 33, seed=5) == UNIVERSAL.read('benchmark:5', 33)
    assert UNIVERSAL.read('W', 33, pad='random', seed=5)[0][1:] == UNIVERSAL.random(32, 5)
    with pytest.raises(ControlError, match='got 2 frames, expected 4; positions 3 to 4 are miss'):
        UNIVERSAL.read('W*2', 4)


@pytest.mark.parametrize(
    'vocabulary, text, words',
    [
        (
            RUN,
            'W+right',
            "'right' moves the mouse, and templerun has none; expected jump, .*entry 1",
        ),
        (RUN, 'W,[0]', 'unknown action'),
        (RUN, 'jump+slide', 'expected one of them alone'),
        (RUN, '[{"mouse": [0, 0.1]}]', 'moves the mouse'),
        (UNIVERSAL, 'W,hop', "unknown action 'hop' of universal; expected W, S, .*entry 2"),
        (UNIVERSAL, 'W+idle', 'alone'),
        (UNIVERSAL, 'W+w', 'twice'),
        (UNIVERSAL, 'W:2', 'no amount'),
        (UNIVERSAL, 'right:7', 'above 0, at most 1'),
        (UNIVERSAL, 'right:nan', 'above 0'),
        (UNIVERSAL, 'W*0', 'a number of frames'),
        (UNIVERSAL, 'W*99999999', 'a number of frames'),
        (UNIVERSAL, '', 'got none'),
        (UNIVERSAL, 'W,,W', "unknown action ''"),
        (UNIVERSAL, 'none.json', 'none.json: not readable'),
        (UNIVERSAL, '[3]', 'entry 1: expected'),
        (UNIVERSAL, '{', 'not readable JSON'),
        (UNIVERSAL, '[]', 'expected a JSON list'),
        (UNIVERSAL, '[{"keys": "W", "frames": 1.5}]', 'a number of frames'),
        (UNIVERSAL, '[{"mouse": [0, 2]}]', 'at most 1'),
        (UNIVERSAL, 'benchmark:x', 'benchmark:SEED'),
    ],
)
def test_errors_name_what_cannot_be_read(vocabulary, text, words):
    with pytest.raises(ControlError, match=words) as caught:
        vocabulary.read(text, 1)
    assert '\n' not in str(caught.value)


def test_an_unknown_mode_lists_the_modes():
    with pytest.raises(ValueError, match='expected one of universal, gta_drive, templerun'):
        KeyboardMouseVocabulary('flying')


@pytest.mark.parametrize('vocabulary', [UNIVERSAL, DRIVE, RUN], ids=lambda one: one.mode.name)
def test_web_page_and_overlay_show_every_key(vocabulary):
    page = vocabulary.key_layout()
    names = {button['name'] for button in page['buttons']}
    for axis in page['axes']:
        assert set(axis['keys']) <= names
        for word in axis['keys'].values():
            action = vocabulary.canonical(word)
            assert vocabulary.encode([action]).any()
            overlay = vocabulary.overlay(action)
            names_on_screen = {name for name, *_ in overlay.layout}
            assert overlay.pressed & names_on_screen or overlay.mouse != (0, 0)
    assert vocabulary.canonical(page['idle']) == vocabulary.idle
    assert (page['mouse'] is None) == (vocabulary.overlay('idle').mouse is None)
