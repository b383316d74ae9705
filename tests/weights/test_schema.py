"""Hostile configs are one line each, or configs of possible sizes; nothing is built for them."""

import itertools
import json
import os

import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import UsageError
from matrix_jax.data import start_clips
from matrix_jax.encoders import tokenizers
from matrix_jax.weights import diffusers_layout, schema
from matrix_jax.worlds.weights_folders import read_config

HOSTILE = (
    *(float('nan'), float('inf'), -1, 0, 10**12, 2**24, 1.5, -1e-6, 'x', [], [1], {}, None, True),
    *([[1] * 3] * 3, '9' * 9999, [10**9] * 4, {'a': [None]}),
)
COMPONENTS = [
    pytest.param(getattr(world.cfg, one.field), one, id=f'{name}-{one.folder}')
    for name in ('the_matrix', 'matrix_game_2', 'matrix_game_3')
    for world in [worlds.build(recipes.load(f'{name}:TINY').world)]
    for one in world.components
]


@pytest.mark.parametrize('cfg, component', COMPONENTS)
def test_a_hostile_value_in_any_key(monkeypatch, cfg, component):
    released = cfg.to_released()
    places = [(key,) for key in released if key != '_class_name']
    places += [('action_config', key) for key in released.get('action_config', {})]
    refused = 0
    for place, value in itertools.product(places, HOSTILE):
        changed = json.loads(json.dumps(released))
        owner = changed if len(place) == 1 else changed[place[0]]
        owner[place[-1]] = value
        monkeypatch.setattr(diffusers_layout, 'read_config', lambda *_, found=changed: found)
        try:
            found = read_config(type(cfg), 'folder', 'part')
        except diffusers_layout.CheckpointError as error:
            assert '\n' not in str(error) and len(str(error)) < 2000
            refused += 1
            continue
        assert getattr(found, 'layers', 1) <= 1024 and len(component.weights(found)) < 10**5
    assert refused > len(places) * len(HOSTILE) / 2


@pytest.mark.parametrize(
    'text, words',
    [
        ('[' * 200_000 + ']' * 200_000, 'nested'),
        ('{"a":' * 99 + '1' + '}' * 99, 'nested more than 20 times'),
        ('{"a": ' + '9' * 5000 + '}', 'not readable as JSON'),
        ('\x00\x01', 'not readable as JSON'),
    ],
    ids=range(4),
)
def test_json_bombs_are_one_line(tmp_path, text, words):
    (tmp_path / 'part').mkdir()
    (tmp_path / 'part' / 'config.json').write_text(text)
    with pytest.raises(diffusers_layout.CheckpointError, match=words) as error:
        diffusers_layout.read_config(tmp_path, 'part')
    assert '\n' not in str(error.value)


def test_pipes_and_broken_links_are_no_files(tmp_path):
    part = tmp_path / 'part'
    part.mkdir()
    os.mkfifo(part / 'config.json')
    with pytest.raises(diffusers_layout.CheckpointError, match='is a pipe or a device'):
        diffusers_layout.read_config(tmp_path, 'part')
    os.mkfifo(part / 'model.safetensors')
    with pytest.raises(diffusers_layout.CheckpointError, match='model.safetensors: is a pipe'):
        diffusers_layout.Tensors(part)
    (part / 'model.safetensors').unlink()
    (part / 'model.safetensors').symlink_to('../elsewhere')
    with pytest.raises(
        diffusers_layout.CheckpointError, match='a link to ../elsewhere, which is m'
    ):
        diffusers_layout.Tensors(part)


@pytest.mark.parametrize('name', [['T5Tokenizer'], {}, 3, None])
def test_lists_in_place_of_names_of_tokenizers(tmp_path, name):
    config = tmp_path / 'tokenizer_config.json'
    config.write_text(json.dumps({'tokenizer_class': name}))
    with pytest.raises(ValueError, match='names class'):
        tokenizers.load(tmp_path)
    tokenizers.write_byte_tokenizer(tmp_path)
    os.mkfifo(tmp_path / 'added_tokens.json')
    with pytest.raises(ValueError, match='added_tokens.json is not a file'):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    'listing',
    [
        {},
        [3],
        [{'theme': ['a'], 'file': 'a.png', 'caption': '', 'words': []}],
        [{'theme': 'a', 'file': '../../a.png', 'caption': '', 'words': []}],
        [{'theme': 'a', 'file': 'a.png', 'caption': '', 'words': [['b']]}],
    ],
    ids=range(5),
)
def test_listings_of_start_clips_are_checked(tmp_path, listing):
    diffusers_layout.write_json(tmp_path / 'starts', 'starts.json', listing)
    with pytest.raises(UsageError, match='starts.json: no list of start clips'):
        start_clips.match(str(tmp_path), 'a road')


def test_messages_show_what_came_in_one_short_line():
    assert schema.shown('x' * 999).endswith('...') and len(schema.shown('x' * 999)) == 60
