import pathlib

import numpy as np
import pytest

from matrix_jax import parity
from matrix_jax.controls import driving
from matrix_jax.controls.driving import ControlError

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'the_matrix'


def test_random_signals_equal_the_published_ones():
    lines = parity.replay(parity.read(GOLDENS / 'g_control_signals.json'))
    assert {line.output for line in lines} == {
        'random',
        'base_frames',
        'base_signal',
        'streaming_signal',
    }
    assert [line for line in lines if not line.ok] == []


def test_vocabulary():
    assert driving.SYMBOLS == ('D', 'DL', 'DR', 'B', 'BL', 'BR', 'N', 'NL', 'NR')
    assert driving.NULL == 9 and len(set(driving.PROMPTS.values())) == 9
    indices = driving.encode(['DR', 'D', 'NR'])
    assert indices.tolist() == [2, 0, 8] and indices.dtype == np.int32
    assert driving.decode([2, 0, 9]) == ['DR', 'D', '']


def test_parse_only_ignores_spaces():
    assert driving.parse(' D, DL ,NR') == ['D', 'DL', 'NR']


@pytest.mark.parametrize(
    'signal, words',
    [
        ('D,X,DL', ("'X' at position 2 of 3", 'D, DL, DR, B')),
        ('D,DL,', ("'' at position 3 of 3",)),
        ('d', ("'d' at position 1 of 1",)),
        ('Q,' * 5 + 'D', ("'Q' at position 3 of 6", 'and 2 more')),
        ('', ('no symbols',)),
        (' ', ('no symbols',)),
    ],
)
def test_unknown_symbols_are_named(signal, words):
    with pytest.raises(ControlError) as error:
        driving.parse(signal)
    assert all(word in str(error.value) for word in words)


def test_fit_pads_only_when_asked():
    with pytest.raises(ControlError, match='got 2 symbols, expected 5; positions 3 to 5'):
        driving.fit(['D', 'DL'], 5)
    symbols, note = driving.fit(['D', 'DL'], 5, pad='hold')
    assert symbols == ['D', 'DL', 'DL', 'DL', 'DL'] and '3 added' in note
    symbols, _ = driving.fit(['NL'], 17, pad='random', seed=3)
    assert symbols[1:] == driving.generate_random_control_signal(16, 3).split(',')


def test_fit_notes_unused_symbols():
    assert driving.fit(['D', 'B'], 2) == (['D', 'B'], None)
    symbols, note = driving.fit(['D', 'B', 'N'], 1)
    assert symbols == ['D'] and 'the last 2 are not used' in note


def test_one_symbol_per_latent_frame():
    assert driving.one_per_latent(['D'] * 4 + ['B'] * 4 + ['N']) == ['D', 'B', 'N']


@pytest.mark.parametrize(
    'call',
    [
        lambda: driving.fit(['D'], 2, pad='mirror'),
        lambda: driving.generate_random_control_signal(0, 1),
        lambda: driving.generate_random_control_signal(3, 1, repeat_lens=(2, 2)),
        lambda: driving.base_frames(0),
        lambda: driving.fit([], 2, pad='hold'),
    ],
)
def test_invalid_values_raise(call):
    with pytest.raises(ControlError, match='(?s)got .*(expected|needs)'):
        call()


def test_a_sequence_has_repeats_and_may_be_a_file(tmp_path):
    wanted = ['D', 'D', 'D', 'BL', 'N', 'N']
    file = tmp_path / 'keys.txt'
    file.write_text('\ufeffD*3, BL\nN * 2\n')
    listed = tmp_path / 'keys.json'
    listed.write_text('{"actions": ["D*3", "BL", "N*2"]}')
    vocabulary = driving.DrivingVocabulary()
    for given in ('D*3,BL,N*2', '["D*3", "BL", "N*2"]', str(file), str(listed)):
        assert driving.read_sequence(given) == wanted
        assert vocabulary.count(given) == 6
        assert vocabulary.read(given, 7, 'hold')[0] == [*wanted, 'N']


@pytest.mark.parametrize(
    'text, words',
    [
        ('D*3,X*2', "'X' at position 2 of 2"),
        ('D*0', r'got D\*0 \(entry 1\), expected a number of frames'),
        ('D*', r'got D\* \(entry 1\)'),
        ('D*99999999', 'at most 10000000 in all'),
        ('', 'got no symbols'),
        ('[1]', 'entry 1: expected text such as D or'),
        ('["D,D"]', 'entry 1: expected text such as D or'),
        ('[]', 'expected a JSON list'),
        ('{"D": 1}', 'expected a JSON list'),
        ('nowhere.txt', 'nowhere.txt: not readable'),
    ],
)
def test_a_sequence_that_cannot_be_read(text, words):
    with pytest.raises(ControlError, match=words):
        driving.read_sequence(text)
