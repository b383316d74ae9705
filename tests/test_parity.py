"""All recordings replay within their tolerances, and failures are named."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from matrix_jax import parity
from matrix_jax.parity import segments

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / 'tests' / 'goldens' / 'the_matrix'
FILES = sorted(
    path
    for system in ('the_matrix', 'matrix_game_2', 'matrix_game_3', 'wan_2_2')
    for path in (GOLDENS.parent / system).iterdir()
    if path.suffix in ('.safetensors', '.json')
)
SMALL = GOLDENS / 'j_clip_text.safetensors'


def tool(*argv):
    spec = importlib.util.spec_from_file_location('parity_tool', ROOT / 'tools' / 'parity.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(part) for part in argv])


def changed(path, folder, change, metadata=None):
    """A copy of a recording after `change(tensors)`."""
    content = path.read_bytes()
    size = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8 : 8 + size])['__metadata__'] | (metadata or {})
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, folder / path.name, header)
    return folder / path.name


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_recording_is_within_tolerance(path, capsys):
    code = tool(path)
    assert code == 0, capsys.readouterr().out


def test_every_replay_has_a_recording():
    records = map(parity.read, FILES)
    run = {parity.REPLAYS[record.system, record.kind] for record in records}
    # Recordings of whole segments are too large for this folder.
    assert run | {segments.sampling} == set(parity.REPLAYS.values())


def test_one_flipped_weight_is_named(tmp_path, capsys):
    def flip(tensors):
        weight = tensors['weights/text_model.encoder.layers.1.mlp.fc1.weight']
        weight[3, 2] = -weight[3, 2]

    assert tool(changed(SMALL, tmp_path, flip)) == 1
    out = capsys.readouterr().out
    assert '1 FAILED (j_clip_text: text_features)' in out


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda t: t.pop('weights/text_model.final_layer_norm.bias'),
            'missing key text_model.final_layer_norm.bias',
        ),
        (
            lambda t: t.update({'weights/text_model.final_layer_norm.bais': np.zeros(16, 'f4')}),
            'unknown key text_model.final_layer_norm.bais',
        ),
        (
            lambda t: t.update({'weights/text_projection.weight': np.zeros((10, 15), 'f4')}),
            'text_projection.weight',
        ),
        (lambda t: t.update({'outputs/logits': np.zeros(3, 'f4')}), 'does not make it'),
        (
            lambda t: t.update({'outputs/text_features': np.zeros((3, 9), 'f4')}),
            'shape (3, 10), recorded (3, 9)',
        ),
        (lambda t: t.update({'outputs/text_features': np.full((3, 10), np.nan, 'f4')}), 'FAILED'),
    ],
)
def test_wrong_contents_fail(tmp_path, capsys, change, message):
    assert tool(changed(SMALL, tmp_path, change)) == 1
    assert message in capsys.readouterr().out


def bad_files(folder):
    (folder / 'cut.safetensors').write_bytes(SMALL.read_bytes()[:9000])
    yield folder / 'cut.safetensors', 'not a readable safetensors file'
    yield folder / 'none.safetensors', 'not a file'
    (folder / 'odd.json').write_text('{"a": 1}')
    yield folder / 'odd.json', 'expected a JSON object'
    (folder / 'broken.json').write_text('{')
    yield folder / 'broken.json', 'not readable JSON'
    (folder / 'odd2.json').write_text('{"generate_padding": 3}')
    yield folder / 'odd2.json', 'expected lists of JSON objects'
    (folder / 'empty.safetensors').write_bytes(b'')
    yield folder / 'empty.safetensors', 'not a readable safetensors file'
    for name, change, metadata, message in (
        ('system', {}, {'system': 'doom'}, 'cannot replay doom/clip_text, expected one of'),
        ('config', {}, {'config': '{}'}, "config: no 'cfg'"),
        ('json', {}, {'config': '{'}, 'metadata is not readable'),
        ('shared', {}, {'weights': 'lost.safetensors'}, 'lost.safetensors: not a file'),
        ('shape', {}, {'config': '[1]'}, 'metadata is not readable'),
        ('input', {'inputs/input_ids': None}, {}, "inputs: no 'input_ids'"),
        ('stray', {'extra': np.zeros(1)}, {}, "tensor 'extra'"),
    ):

        def edit(tensors, change=change):
            tensors.update({key: value for key, value in change.items() if value is not None})
            for key in [key for key, value in change.items() if value is None]:
                del tensors[key]

        (folder / name).mkdir()
        yield changed(SMALL, folder / name, edit, metadata), message


def test_unreadable_files_give_one_line_each(tmp_path, capsys):
    for path, message in bad_files(tmp_path):
        assert tool(path) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1, err


def test_other_files_run_after_an_unreadable_one(tmp_path, capsys):
    assert tool(tmp_path / 'none.safetensors', GOLDENS / 'g_control_signals.json') == 2
    assert 'streaming_signal' in capsys.readouterr().out


def test_a_wrong_signal_is_counted(tmp_path, capsys):
    content = json.loads((GOLDENS / 'g_control_signals.json').read_text())
    content['generate_random_control_signal'][3]['out'] = 'NL'
    (tmp_path / 'signals.json').write_text(json.dumps(content))
    assert tool(tmp_path / 'signals.json') == 1
    assert '1 of 49 differ' in capsys.readouterr().out
