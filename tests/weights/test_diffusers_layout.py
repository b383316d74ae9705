"""Weights folders are read strictly and written whole."""

import json
import pickle
import shutil
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from matrix_jax.weights import diffusers_layout
from matrix_jax.weights.diffusers_layout import CheckpointError

CONFIG = {'_class_name': 'Toy', 'width': 3}
TENSORS = {
    'a.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
    'b': np.float32(2.5),
    'ids': np.arange(5),
    'c': np.ones((2, 2), ml_dtypes.bfloat16),
}


@pytest.fixture
def folder(tmp_path):
    diffusers_layout.write_component(tmp_path, 'transformer', CONFIG, TENSORS)
    return tmp_path


def files(path):
    return sorted(one.name for one in path.iterdir())


@pytest.mark.parametrize('shard_size, count', [(10**6, 1), (24, 3)])
def test_component_round_trip(tmp_path, shard_size, count):
    diffusers_layout.write_component(tmp_path, 'part', CONFIG, TENSORS, shard_size=shard_size)
    config, tensors = diffusers_layout.read_component(tmp_path, 'part')
    assert config == CONFIG and set(tensors) == set(TENSORS) and len(tensors) == 4
    for name, value in TENSORS.items():
        assert tensors[name].shape == value.shape
        assert tensors[name].dtype == (np.int64 if name == 'ids' else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(tensors[name].astype(np.float32), value.astype(np.float32))
    found = [name for name in files(tmp_path / 'part') if name.endswith('.safetensors')]
    assert len(found) == count
    assert all(name.startswith('diffusion_pytorch_model') for name in found)
    assert files(tmp_path) == ['part']


def test_names_dtype_and_replacement(folder):
    diffusers_layout.write_component(
        folder,
        'transformer',
        {'architectures': ['T5EncoderModel']},
        {'a': jnp.ones((2, 3))},
        dtype='float32',
    )
    assert files(folder / 'transformer') == ['config.json', 'model.safetensors']
    _, tensors = diffusers_layout.read_component(folder, 'transformer')
    assert list(tensors) == ['a'] and tensors['a'].dtype == np.float32


def test_failed_write_keeps_the_old_component(folder):
    class Broken(dict):
        def __getitem__(self, name):
            if name == 'z':
                raise RuntimeError('disk on fire')
            return super().__getitem__(name)

    with pytest.raises(RuntimeError):
        diffusers_layout.write_component(folder, 'transformer', CONFIG, Broken(a=np.ones(3), z=1))
    _, tensors = diffusers_layout.read_component(folder, 'transformer')
    assert set(tensors) == set(TENSORS)
    assert files(folder) == ['transformer']


def test_json_round_trip(folder):
    diffusers_layout.write_json(folder / 'scheduler', 'scheduler_config.json', {'a': 1})
    assert diffusers_layout.read_json(folder, 'scheduler', 'scheduler_config.json') == {'a': 1}
    assert files(folder / 'scheduler') == ['scheduler_config.json']


def weights(folder):
    return folder / 'transformer' / 'diffusion_pytorch_model.safetensors'


def truncate(folder):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:-3])


def truncate_header(folder):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:20])


def corrupt_header(folder):
    path = weights(folder)
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))


def pickle_in_disguise(folder):
    weights(folder).write_bytes(pickle.dumps({'a': [1.0] * 100}))


def zip_in_disguise(folder):
    with zipfile.ZipFile(weights(folder), 'w') as file:
        file.writestr('archive/data.pkl', pickle.dumps({}))


def pickle_only(folder):
    weights(folder).rename(folder / 'transformer' / 'pytorch_model.bin')


def two_kinds(folder):
    (folder / 'transformer' / 'model.safetensors').write_bytes(weights(folder).read_bytes())


def index(folder, weight_map):
    weights(folder).rename(folder / 'transformer' / 'one.safetensors')
    path = folder / 'transformer' / 'diffusion_pytorch_model.safetensors.index.json'
    path.write_text(json.dumps({'weight_map': weight_map}))


ALL = {name: 'one.safetensors' for name in TENSORS}


@pytest.mark.parametrize(
    'damage, words',
    [
        (truncate, ['truncated: ', ' bytes of ']),
        (truncate_header, ['truncated: 20 bytes end inside the header']),
        (corrupt_header, ['diffusion_pytorch_model.safetensors: ']),
        (pickle_in_disguise, ['a PyTorch pickle under a .safetensors name', 'matrix-jax convert']),
        (zip_in_disguise, ['a PyTorch pickle under a .safetensors name', 'matrix-jax convert']),
        (lambda folder: weights(folder).write_bytes(b''), ['truncated: 0 bytes']),
        (lambda folder: weights(folder).write_bytes(b'junk' * 9), ['not a safetensors file']),
        (
            lambda folder: weights(folder).write_bytes(
                b'version https://git-lfs.github.com/spec/v1\n'
            ),
            ['git-lfs pointer'],
        ),
        (pickle_only, ['pytorch_model.bin is a pickle', 'matrix-jax convert']),
        (lambda folder: weights(folder).unlink(), ['no weights; expected diffusion_pytorch_model']),
        (two_kinds, ['model.safetensors, expected one of them']),
        (
            lambda folder: index(folder, {**ALL, 'd': 'two.safetensors'}),
            ['names the shard two.safetensors, which is missing'],
        ),
        (lambda folder: index(folder, {**ALL, 'd': 'one.safetensors'}), ['missing d;']),
        (
            lambda folder: index(folder, {'b': 'one.safetensors'}),
            ['missing none; not in the index a.weight, c, ids'],
        ),
        (
            lambda folder: index(folder, {'b': '../one.safetensors'}),
            ['not a plain .safetensors name'],
        ),
        (lambda folder: index(folder, {}), ['no weight_map']),
        (
            lambda folder: (folder / 'transformer' / 'config.json').unlink(),
            ['config.json: no such'],
        ),
        (
            lambda folder: (folder / 'transformer' / 'config.json').write_text('{'),
            ['config.json: not readable as JSON'],
        ),
        (
            lambda folder: (folder / 'transformer' / 'config.json').write_text('[]'),
            ['config.json: got a JSON list, expected an object'],
        ),
    ],
)
def test_damage_is_one_clear_line(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        diffusers_layout.read_component(folder, 'transformer')
    message = str(error.value)
    assert all(word in message for word in words), message
    assert str(folder) in message and '\n' not in message


def test_sharded_by_another_writer(folder):
    index(folder, ALL)
    _, tensors = diffusers_layout.read_component(folder, 'transformer')
    assert tensors['b'] == 2.5


def test_missing_folder_or_component(folder):
    with pytest.raises(CheckpointError, match='no component vae; it has transformer'):
        diffusers_layout.read_component(folder, 'vae')
    with pytest.raises(CheckpointError, match='nowhere: no such folder'):
        diffusers_layout.read_config(folder / 'nowhere', 'vae')


def test_resolve(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(diffusers_layout, 'ASSETS', folder / 'assets')
    (folder / 'assets' / 'toy').mkdir(parents=True)
    (folder / 'toy').mkdir()
    (folder / 'file').touch()
    assert diffusers_layout.resolve('toy') == folder / 'assets' / 'toy'
    assert diffusers_layout.resolve('./toy').resolve() == (folder / 'toy').resolve()
    assert diffusers_layout.resolve('transformer').resolve() == folder / 'transformer'
    with pytest.raises(CheckpointError, match='file is a file'):
        diffusers_layout.resolve('file')
    for missing in ('nowhere', './a/b', '/a/b', '../a', 'a/../b'):
        with pytest.raises(CheckpointError, match=r'no folder .*bundled name \(toy\)'):
            diffusers_layout.resolve(missing)


def test_the_folder_of_a_run_is_not_its_weights(folder, tmp_path):
    run = tmp_path / 'run'
    (run / 'state' / '100').mkdir(parents=True)
    with pytest.raises(
        CheckpointError,
        match=f'{run} is the folder of a training run; it has none '
        'yet: repeat the training command',
    ):
        diffusers_layout.resolve(run)
    diffusers_layout.write_component(run / 'weights', 'transformer', CONFIG, TENSORS)
    with pytest.raises(CheckpointError, match=f'a training run; its weights are in {run}/weights$'):
        diffusers_layout.resolve(run)
    assert diffusers_layout.resolve(run / 'weights') == run / 'weights'


def test_hub(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    found = diffusers_layout.resolve('MatrixTeam/TheMatrix/transformer@v1')
    assert found == folder / 'transformer'
    assert (asked['repo'], asked['revision']) == ('MatrixTeam/TheMatrix', 'v1')
    assert 'transformer/*.safetensors' in asked['patterns']
    assert not any('.bin' in pattern or pattern == '*' for pattern in asked['patterns'])
    with pytest.raises(CheckpointError, match='has no folder stage9'):
        diffusers_layout.resolve('MatrixTeam/TheMatrix/stage9')


def test_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    with pytest.raises(CheckpointError, match='neither a local folder nor a hub') as error:
        diffusers_layout.resolve('MatrixTeam/NotThere')
    assert '\n' not in str(error.value)


def test_variants_are_read_where_there_is_no_other_file(folder):
    part = folder / 'transformer'
    weights(folder).rename(part / 'diffusion_pytorch_model.fp16.safetensors')
    assert set(diffusers_layout.read_component(folder, 'transformer')[1]) == set(TENSORS)
    (part / 'model.bf16.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match='got diffusion_pytorch_model.fp16.* expected one'):
        diffusers_layout.read_component(folder, 'transformer')
    (part / 'model.bf16.safetensors').unlink()
    shard = 'diffusion_pytorch_model.fp16-00001-of-00001.safetensors'
    (part / 'diffusion_pytorch_model.fp16.safetensors').rename(part / shard)
    index = {'weight_map': dict.fromkeys(TENSORS, shard)}
    diffusers_layout.write_json(part, 'diffusion_pytorch_model.safetensors.index.fp16.json', index)
    assert set(diffusers_layout.read_component(folder, 'transformer')[1]) == set(TENSORS)


def float8(path, tensors):
    """Writes a safetensors file; numpy's writer has no 8-bit floats."""
    kinds = {'float8_e4m3fn': 'F8_E4M3', 'float8_e5m2': 'F8_E5M2', 'float32': 'F32', 'int4': 'F4'}
    header, data = {}, b''
    for name, value in tensors.items():
        end = len(data) + value.nbytes
        kind = kinds[value.dtype.name]
        header[name] = {'dtype': kind, 'shape': value.shape, 'data_offsets': [len(data), end]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


@pytest.mark.parametrize('kind', [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize('name', ['scale_weight', 'weight_scale', 'weight_scale_inv', None])
def test_8_bit_floats_with_their_scales(folder, kind, name):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {'a.weight': numbers.astype(kind), 'b': np.ones(2, np.float32)}
    if name:
        scale = np.arange(1, 4, dtype=np.float32)[:, None] / 7
        tensors |= {f'a.{name}': scale, 'a.input_scale': scale, 'scaled_fp8': numbers[:0]}
        numbers = numbers.astype(kind).astype(np.float32) * scale
    float8(weights(folder), tensors)
    _, found = diffusers_layout.read_component(folder, 'transformer')
    assert set(found) == {'a.weight', 'b'}
    want = numbers if name else numbers.astype(kind).astype(np.float32)
    np.testing.assert_array_equal(found['a.weight'].astype(np.float32), want)


def test_scales_of_a_wrong_shape_are_refused(folder):
    eight = np.ones((3, 4), ml_dtypes.float8_e4m3fn)
    scale = np.ones((1, 1, 5), np.float32)
    float8(weights(folder), {'a.weight': eight, 'a.weight_scale': scale})
    _, found = diffusers_layout.read_component(folder, 'transformer')
    with pytest.raises(CheckpointError, match='a.weight_scale: got shape .1, 1, 5., expected one'):
        found['a.weight']


def test_a_component_can_lie_in_a_bundled_world(tmp_path):
    names = ('vae', 'transformer')
    for name in names:
        shutil.copytree(diffusers_layout.ASSETS / 'carracing_base' / name, tmp_path / name)
    config = tmp_path / 'transformer' / 'config.json'
    config.write_text(config.read_text() + ' ')
    before = diffusers_layout.read_component(tmp_path, 'vae')
    tensors = {name: np.array(tensor) for name, tensor in before[1].items()}
    assert diffusers_layout.share(tmp_path, 'carracing_base') == ['vae']  # the other one differs
    assert [path.name for path in (tmp_path / 'vae').iterdir()] == [diffusers_layout.REFERENCE]
    after = diffusers_layout.read_component(tmp_path, 'vae')
    assert after[0] == before[0] and set(after[1]) == set(tensors)
    for name, tensor in after[1].items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize('name', ['../carracing', 'nowhere', 3, ['carracing'], 'carracing_swin/..'])
def test_a_reference_names_a_bundled_world(tmp_path, name):
    diffusers_layout.write_json(tmp_path / 'vae', diffusers_layout.REFERENCE, {'bundled': name})
    with pytest.raises(CheckpointError, match='shared.json: bundled: got .*, expected a bundled'):
        diffusers_layout.read_config(tmp_path, 'vae')
