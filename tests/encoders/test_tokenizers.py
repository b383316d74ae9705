"""Tokenizers that need no vocabulary, and the faults of a folder."""

import json
import subprocess
import sys

import numpy as np
import pytest

from matrix_jax.encoders import clip, t5, tokenizers

CONTROL = clip.PRESETS['carracing']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    assert tokenizers.write_byte_tokenizer(folder / 'text') == t5.PRESETS['carracing'].vocab
    assert tokenizers.write_clip_byte_tokenizer(folder / 'control') == CONTROL.vocab
    return folder


def test_bytes_pad_and_cut(folder):
    tokenizer = tokenizers.load(folder / 'text')
    assert len(tokenizer) == 259
    ids, cut = tokenizers.encode(tokenizer, ['Hé', '', 'rain on the road'], 6)
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [75, 198, 172, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [117, 100, 108, 113, 35, 1],
    ]
    assert cut == ('', '', 'on the road')


def test_control_prompts_end_in_the_largest_id(folder):
    tokenizer = tokenizers.load(folder / 'control')
    prompts = ['The car is turning left ahead.', 'Ünï 世!', '']
    ids, cut = tokenizers.encode(tokenizer, prompts, 77)
    assert cut == ('', '', '')
    assert ids[:, 0].tolist() == [512] * 3
    assert ids.max() == CONTROL.eos == 513
    assert (ids.argmax(1) == [25 + 1, 10, 1]).all()  # one id per letter, or per byte
    longest, _ = tokenizers.encode(tokenizer, prompts, None)
    np.testing.assert_array_equal(longest, ids[:, :27])


def test_pair_in_memory_equals_the_folder(folder):
    text, control = tokenizers.byte_pair()
    for made, name in ((text, 'text'), (control, 'control')):
        read = tokenizers.load(folder / name)
        np.testing.assert_array_equal(
            *(tokenizers.encode(one, ['a car'], 16)[0] for one in (made, read))
        )


@pytest.mark.parametrize(
    'config, error, message',
    [
        (None, FileNotFoundError, 'no .*tokenizer_config.json'),
        ('{', ValueError, 'is not a JSON object'),
        ('[]', ValueError, 'is not a JSON object'),
        (
            {'tokenizer_class': 'GPT2Tokenizer'},
            ValueError,
            "class 'GPT2Tokenizer', expected one of T5",
        ),
        ({'tokenizer_class': 'T5Tokenizer'}, FileNotFoundError, 'tokenizer.json, or spiece.model'),
        ({'tokenizer_class': 'CLIPTokenizer'}, FileNotFoundError, 'vocab.json and merges.txt'),
    ],
)
def test_faults(tmp_path, config, error, message):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / 'tokenizer_config.json').write_text(text)
    with pytest.raises(error, match=message):
        tokenizers.load(tmp_path)


def test_a_damaged_vocabulary_is_one_line(tmp_path):
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "T5Tokenizer"}')
    (tmp_path / 'spiece.model').write_bytes(b'not a model')
    with pytest.raises(ValueError, match='could not be read as T5Tokenizer') as caught:
        tokenizers.load(tmp_path)
    assert '\n' not in str(caught.value)


def test_nothing_heavy_at_import():
    code = (
        'import sys, matrix_jax.encoders.tokenizers; '
        'assert not {"transformers", "torch", "jax"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
