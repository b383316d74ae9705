"""Adapters: merging, files of ours bit for bit, and files of diffusers and peft."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from matrix_jax.dit import cogvideox as dit
from matrix_jax.nn import lora
from matrix_jax.weights import conversion
from matrix_jax.weights.diffusers_layout import CheckpointError

CFG = dit.PRESETS['tiny']  # four layers, the second and third with control blocks
TABLE, SHAPES = dit.weights(CFG), dit.shapes(CFG)
GOLDENS = Path(__file__).parents[1] / 'goldens' / 'lora'
Q = 'transformer_blocks.2.attn1.to_q'


def whole(seed):
    """Parameters of small integers, whose sums and products are exact."""
    random = np.random.default_rng(seed)
    return lambda shape: random.integers(-3, 4, shape).astype(np.float32)


def params():
    draw = whole(0)
    return jax.tree.map(lambda leaf: draw(leaf.shape), SHAPES)


def adapter(rank=4, alpha=2.0):
    made, draw = lora.init(TABLE, SHAPES, rank, alpha, seed=0), whole(1)
    flat = conversion.flatten(made)
    return conversion.unflatten(
        {path: leaf if path.endswith('alpha') else draw(leaf.shape) for path, leaf in flat.items()}
    )


def torch_weights(tree):
    return conversion.to_torch(TABLE, jax.tree.map(np.asarray, tree))


def test_an_initial_adapter_changes_nothing_and_has_no_control_blocks():
    fresh = lora.init(TABLE, SHAPES, 4, 4.0, seed=0)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params(), fresh), params())
    flat = conversion.flatten(fresh)
    assert {path.rpartition('/')[0] for path in flat} == {
        f'{block}/attention/{name}'
        for block in ('before', 'steered/block', 'after')
        for name in ('query', 'key', 'value', 'out')
    }
    a = flat['steered/block/attention/query/a']
    assert a.shape == (2, 32, 4) and (a[0] != a[1]).all()
    assert 0.8 < np.abs(a).max() * 32**0.5 <= 1
    with pytest.raises(ValueError, match='rank: got 33, expected at most 32'):
        lora.init(TABLE, SHAPES, 33, 1.0, seed=0)
    with pytest.raises(ValueError, match='fit no linear layer'):
        lora.init(TABLE, SHAPES, 4, 1.0, seed=0, targets=('blocks.*',))


def test_merge_adds_the_update_of_the_paper(tmp_path):
    tensors = load_file(lora.write(tmp_path / lora.FILE, adapter(), TABLE))
    before, after = torch_weights(params()), torch_weights(lora.merge(params(), adapter(), 3.0))
    for name, weight in before.items():
        key = f'transformer.{name.removesuffix(".weight")}.lora_'
        if f'{key}A.weight' in tensors:
            weight = weight + 3 * 2 / 4 * tensors[f'{key}B.weight'] @ tensors[f'{key}A.weight']
            assert (weight != before[name]).any()
        np.testing.assert_array_equal(after[name], weight)


@pytest.mark.parametrize('alpha', [4.0, 1.7])
def test_files_round_trip(tmp_path, alpha):
    made = lora.init(TABLE, SHAPES, 4, alpha, seed=1)
    made['after']['attention']['query']['b'] += np.pi
    path = lora.write(tmp_path / 'more' / lora.FILE, made, TABLE)
    with safe_open(path, 'numpy') as file:
        told = json.loads(file.metadata()['lora_adapter_metadata'])
        assert len(file.keys()) == 4 * 4 * 2 and file.metadata()['format'] == 'pt'
        assert file.get_tensor(f'transformer.{Q}.lora_A.weight').shape == (4, 32)
        assert file.get_tensor(f'transformer.{Q}.lora_B.weight').shape == (32, 4)
    assert (told['transformer.r'], told['transformer.lora_alpha']) == (4, np.float32(alpha))
    for place in (path, path.parent):
        found = lora.read(place, TABLE, SHAPES)
        jax.tree.map(np.testing.assert_array_equal, found, made)
    assert [one.name for one in path.parent.iterdir()] == [lora.FILE]


@pytest.mark.parametrize('writer', ['peft', 'diffusers'])
def test_files_of_peft_and_diffusers_merge_as_in_peft_and_diffusers(writer):
    """`goldens/lora/record.py` merged the adapter into zero weights."""
    want = load_file(GOLDENS / writer / 'merged.safetensors')
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), SHAPES)
    got = torch_weights(lora.merge(empty, lora.read(GOLDENS / writer, TABLE, SHAPES)))
    assert len(want) == 16 and all(tensor.any() for tensor in want.values())
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=1e-6, atol=1e-7)
    assert not any(got[name].any() for name in set(got) - set(want))


def peft(folder, tensors, settings=None, name='adapter_model.safetensors'):
    """A file as peft writes it; `tensors` is {module: (A, B)}."""
    folder.mkdir(exist_ok=True)
    save_file(
        {
            f'base_model.model.{module}.lora_{side}.weight': np.ascontiguousarray(tensor)
            for module, pair in tensors.items()
            for side, tensor in zip('AB', pair)
        },
        folder / name,
    )
    if settings is not None:
        (folder / 'adapter_config.json').write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    'settings, scales',
    [
        (None, (1, 1)),
        ({'lora_alpha': 4, 'r': 2}, (2, 4 / 3)),
        ({'lora_alpha': 4, 'r': 4, 'alpha_pattern': {'attn1.to_out.0': 6}}, (2, 2)),
        ({'lora_alpha': 4, 'use_rslora': True}, (4 / 2**0.5, 4 / 3**0.5)),
    ],
)
def test_peft_files_may_have_some_layers_and_several_ranks(tmp_path, settings, scales):
    draw = whole(2)
    other = 'transformer_blocks.1.attn1.to_out.0'
    pairs = {
        Q: (draw((2, 32)), draw((32, 2))),
        other: (draw((3, 32)), draw((32, 3))),
        'control_blocks.0.attn1.to_v': (draw((2, 32)), draw((32, 2))),
    }
    found = lora.read(peft(tmp_path / 'peft', pairs, settings), TABLE, SHAPES)
    before, after = torch_weights(params()), torch_weights(lora.merge(params(), found))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {f'{module}.weight' for module in pairs}
    for module, scale in zip((Q, other), scales):
        a, b = pairs[module]
        np.testing.assert_allclose(
            after[f'{module}.weight'], before[f'{module}.weight'] + scale * b @ a, atol=1e-5
        )
    again = lora.read(lora.write(tmp_path / 'again', found, TABLE), TABLE, SHAPES)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_alpha_tensors_and_names_of_adapters_are_read(tmp_path):
    a, b = whole(3)((2, 2, 32))
    save_file(
        {
            f'transformer.{Q}.lora_A.default.weight': a,
            f'transformer.{Q}.alpha': np.array(6.0),
            f'transformer.{Q}.lora_B.default.weight': np.ascontiguousarray(b.T),
        },
        tmp_path / 'other.safetensors',
    )
    found = lora.read(tmp_path / 'other.safetensors', TABLE, SHAPES)
    after = torch_weights(lora.merge(params(), found))
    np.testing.assert_array_equal(
        after[f'{Q}.weight'], torch_weights(params())[f'{Q}.weight'] + 3 * b.T @ a
    )


PAIR = (np.ones((2, 32), np.float32), np.ones((32, 2), np.float32))


@pytest.mark.parametrize(
    'tensors, settings, said',
    [
        (
            {'transformer_blocks.2.attn1.to_qq': PAIR},
            None,
            f'attn1.to_qq.lora_A.weight (nearest: {Q})',
        ),
        (
            {'transformer_blocks.4.attn1.to_q': PAIR},
            None,
            'unknown key base_model.model.transformer_b',
        ),
        ({'text_model.layers.0.q': PAIR}, None, '2 adapter fault(s): unknown key'),
        ({'patch_embed.proj': PAIR}, None, 'got A (2, 32) and B (32, 2), expected (r, c, p, q)'),
        ({Q: PAIR[:1]}, None, f'missing key {Q}.lora_B.weight'),
        ({Q: (PAIR[0][:, 1:], PAIR[1])}, None, 'got A (2, 31) and B (32, 2), expected (r, 32)'),
        ({Q: (PAIR[0], PAIR[1][:, 1:])}, None, 'got A (2, 32) and B (32, 1)'),
        ({Q: PAIR}, {'use_dora': True}, 'DoRA'),
        ({Q: PAIR}, [1], 'settings of the adapter'),
        ({Q: PAIR}, {'lora_alpha': 'high'}, "lora_alpha: got ['high']"),
        ({}, None, 'no tensors'),
    ],
    ids=range(11),
)
def test_faults_of_a_file_are_named(tmp_path, tensors, settings, said):
    folder = peft(tmp_path, tensors, settings)
    with pytest.raises(conversion.ConversionError) as error:
        lora.read(folder, TABLE, SHAPES)
    assert said in str(error.value) and str(error.value).startswith(f'{folder}/adapter_model')


def test_files_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere: no such file'):
        lora.read(tmp_path / 'nowhere', TABLE, SHAPES)
    with pytest.raises(CheckpointError, match='expected pytorch_lora_weights.safetensors or'):
        lora.read(tmp_path, TABLE, SHAPES)
    path = lora.write(tmp_path / lora.FILE, adapter(), TABLE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match='truncated'):
        lora.read(path, TABLE, SHAPES)


def test_adapters_have_the_axis_letters_of_their_kernels():
    found = conversion.flatten(lora.axes(conversion.axes(TABLE)))
    flat = conversion.flatten(adapter())
    assert {path: len(found[path]) for path in flat} == {p: leaf.ndim for p, leaf in flat.items()}
    assert found['after/attention/out/a'] == ('layers', 'k', '_')
    assert found['after/attention/out/b'] == ('layers', '_', 'd')


@pytest.mark.parametrize(
    'name',
    [
        'transformer.{}.lora_{}.weight',
        'base_model.model.{}.lora_{}.weight',
        'lora_unet_{flat}.lora_{down}.weight',
        'lora_transformer_{flat}.lora_{down}.weight',
        'diffusion_model.{}.lora_{down}.weight',
        'model.diffusion_model.{}.lora_{}.weight',
        'transformer.{}.lora.{down}.weight',
        'transformer.transformer_blocks.2.attn1.processor.to_q_lora.{down}.weight',
        '{}.lora_linear_layer.{down}.weight',
    ],
)
def test_public_namings_are_the_same_adapter(tmp_path, name):
    a, b = whole(3)((2, 2, 32))
    sides = {'A': ('down', a), 'B': ('up', np.ascontiguousarray(b.T))}
    tensors = {
        name.format(Q, side, flat=Q.replace('.', '_'), down=down): tensor
        for side, (down, tensor) in sides.items()
    }
    save_file(tensors, tmp_path / 'a.safetensors')
    found = lora.read(tmp_path / 'a.safetensors', TABLE, SHAPES)
    after = torch_weights(lora.merge(params(), found))[f'{Q}.weight']
    np.testing.assert_array_equal(after, torch_weights(params())[f'{Q}.weight'] + b.T @ a)


def test_layers_of_patches_are_adapted(tmp_path):
    draw, c = whole(4), CFG.channels
    a, b = draw((3, c, 2, 2)), draw((32, 3, 1, 1))
    tensors = {'patch_embed.proj': (a, b), 'proj_out': (draw((3, 32)), draw((4 * c, 3)))}
    found = lora.read(peft(tmp_path, tensors), TABLE, SHAPES)
    before, after = torch_weights(params()), torch_weights(lora.merge(params(), found))
    update = np.einsum('or,rcpq->ocpq', b[..., 0, 0], a)
    name = 'patch_embed.proj.weight'
    np.testing.assert_array_equal(after[name], before[name] + update)
    out = tensors['proj_out'][1] @ tensors['proj_out'][0]
    np.testing.assert_array_equal(after['proj_out.weight'], before['proj_out.weight'] + out)
    again = lora.read(lora.write(tmp_path / 'again' / lora.FILE, found, TABLE), TABLE, SHAPES)
    jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.parametrize(
    'pattern, scale',
    [
        ({r'transformer_blocks\.[0-3]\.attn1\.to_q': 8}, 4),
        ({r'.*blocks\.2\..*': 6}, 3),
        ({'to_q': 10, Q: 4}, 5),  # the first that fits
        ({'o_q': 10, 'blocks.2': 6}, 1),
        ({f'^{Q}': 6}, 3),
    ],
    ids=range(5),
)
def test_patterns_of_alpha_are_regular_expressions(tmp_path, pattern, scale):
    settings = {'lora_alpha': 2, 'alpha_pattern': pattern}
    found = lora.read(peft(tmp_path, {Q: PAIR}, settings), TABLE, SHAPES)
    update = torch_weights(lora.merge(params(), found))[f'{Q}.weight']
    np.testing.assert_array_equal(update - torch_weights(params())[f'{Q}.weight'], 2 * scale)


@pytest.mark.parametrize(
    'settings, said',
    [
        ({'init_lora_weights': 'pissa'}, "init_lora_weights: got 'pissa', which changes the base"),
        ({'init_lora_weights': 'pissa_niter_4'}, 'init_lora_weights'),
        ({'init_lora_weights': 'olora'}, 'init_lora_weights'),
        ({'init_lora_weights': ['a']}, 'init_lora_weights'),
        ({'peft_type': 'LOHA'}, "peft_type: got 'LOHA', expected 'LORA'"),
        ({'lora_bias': True}, 'the settings lora_bias'),
        ({'fan_in_fan_out': True}, 'the settings fan_in_fan_out'),
        ({'alpha_pattern': {'(': 2}}, 'settings of the adapter'),
        ({'alpha_pattern': [1]}, 'settings of the adapter'),
        ({'lora_alpha': float('nan')}, 'lora_alpha: got [nan]'),
    ],
    ids=range(10),
)
def test_settings_that_change_the_update_are_refused(tmp_path, settings, said):
    with pytest.raises(conversion.ConversionError) as error:
        lora.read(peft(tmp_path, {Q: PAIR}, settings), TABLE, SHAPES)
    assert said in str(error.value)


@pytest.mark.parametrize('part', ['lora_magnitude_vector', 'hada_w1_a', 'lokr_w1', 'dora_scale'])
def test_other_kinds_of_adapters_are_named(tmp_path, part):
    save_file({f'transformer.{Q}.{part}': PAIR[0]}, tmp_path / 'a.safetensors')
    with pytest.raises(conversion.ConversionError, match='this adapter is a (DoRA|LoHa|LoKr)'):
        lora.read(tmp_path / 'a.safetensors', TABLE, SHAPES)


def test_adapters_that_are_not_finite_are_refused(tmp_path):
    broken = PAIR[0].copy()
    broken[1, 3] = np.nan
    with pytest.raises(conversion.ConversionError, match='A.weight: has values that are not fin'):
        lora.read(peft(tmp_path, {Q: (broken, PAIR[1])}), TABLE, SHAPES)
