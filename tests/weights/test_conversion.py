"""Conversion tables: exact inverse, and all faults reported at once."""

import numpy as np
import pytest

from matrix_jax.weights.conversion import (
    ConversionError,
    Drop,
    Prefix,
    Rename,
    Row,
    axes,
    flatten,
    to_jax,
    to_torch,
)

TABLE = (
    Row('blocks.{i}.q.weight', 'blocks/q/kernel', '(k e) d -> d k e', (0, 2), {'k': 2}),
    Row('blocks.{i}.q.weight', 'late/q/kernel', '(k e) d -> d k e', (2, 3), {'k': 2}),
    Row('patch.weight', 'patch/kernel', 'o i h w -> (h w i) o', sizes={'h': 2, 'w': 2}),
    Row('patch.bias', 'patch/bias', 'd -> d'),
    Drop('rope.freqs*', why='computed'),
)


def tensors():
    rng = np.random.default_rng(0)
    made = {f'blocks.{i}.q.weight': rng.normal(size=(6, 5)).astype('f4') for i in range(3)}
    made['patch.weight'] = rng.normal(size=(4, 3, 2, 2)).astype('f4')
    made['patch.bias'] = rng.normal(size=(4,)).astype('f4')
    return made


def test_round_trip_is_exact():
    source = tensors()
    params = to_jax(TABLE, {**source, 'rope.freqs_cos': np.zeros(3)})
    assert params['blocks']['q']['kernel'].shape == (2, 5, 2, 3)
    assert params['late']['q']['kernel'].shape == (1, 5, 2, 3)
    assert params['patch']['kernel'].shape == (12, 4)
    back = to_torch(TABLE, params)
    assert back.keys() == source.keys()
    for name in source:
        np.testing.assert_array_equal(back[name], source[name])


def test_all_faults_in_one_message_with_nearest_names():
    bad = tensors()
    bad['patch.biass'] = bad.pop('patch.bias')
    bad['blocks.1.q.weight'] = np.zeros((7, 5), 'f4')
    with pytest.raises(ConversionError) as caught:
        to_jax(TABLE, bad)
    text = str(caught.value)
    assert 'unknown key patch.biass (nearest: patch.bias)' in text
    assert 'missing key patch.bias (nearest: patch.biass)' in text
    assert 'blocks.{i}.q.weight: shape' in text


def test_shapes_are_checked_and_complete():
    params = to_jax(TABLE, tensors())
    to_jax(TABLE, tensors(), shapes=params)
    params['patch']['bias'] = np.zeros(5)
    with pytest.raises(ConversionError, match='patch.bias.*expected'):
        to_jax(TABLE, tensors(), shapes=params)
    params['patch']['bias'] = np.zeros(4)
    params['extra'] = {'scale': np.zeros(2)}
    with pytest.raises(ConversionError, match='extra/scale: no row writes it'):
        to_jax(TABLE, tensors(), shapes=params)


def test_export_refuses_a_tree_that_does_not_fit():
    params = to_jax(TABLE, tensors())
    params['patch']['biasx'] = params['patch'].pop('bias')
    with pytest.raises(ConversionError, match='patch/biasx.*patch/bias'):
        to_torch(TABLE, params)


def test_axes_name_each_dimension():
    letters = flatten(axes(TABLE))
    assert letters['blocks/q/kernel'] == ('layers', 'd', 'k', 'e')
    assert letters['patch/kernel'] == ('_', 'o')


def test_a_prefix_of_all_keys_is_removed():
    table = (Prefix('model.'), *TABLE)
    plain = to_jax(table, tensors())
    worn = to_jax(table, {f'model.{name}': tensor for name, tensor in tensors().items()})
    assert all(np.array_equal(leaf, flatten(worn)[path]) for path, leaf in flatten(plain).items())
    assert to_torch(table, worn).keys() == tensors().keys()
    mixed = {
        f'model.{name}' if 'bias' in name else name: tensor for name, tensor in tensors().items()
    }
    with pytest.raises(ConversionError, match='unknown key model.patch.bias'):
        to_jax(table, mixed)


def test_other_names_of_a_tensor_are_translated_in_reading():
    table = (
        *TABLE,
        Rename('layers.{n}.query.weight', 'blocks.{n}.q.weight'),
        Rename('stem.{leaf}', 'patch.{leaf}'),
    )
    source = tensors()
    others = {
        key.replace('blocks', 'layers').replace('.q.', '.query.').replace('patch', 'stem'): part
        for key, part in source.items()
    }
    params = to_jax(table, others)
    assert all(np.array_equal(to_torch(table, params)[key], source[key]) for key in source)
    mixed = to_jax(table, source | {'rope.freqs_cos': np.zeros(3)})
    assert np.array_equal(mixed['patch']['bias'], params['patch']['bias'])
    with pytest.raises(ConversionError, match='stem.bias and patch.bias are the same tensor'):
        to_jax(table, source | {'stem.bias': source['patch.bias']})
    with pytest.raises(ConversionError, match='unknown key layers.0.deep.query.weight'):
        to_jax(table, source | {'layers.0.deep.query.weight': source['patch.bias']})
    assert Rename('a.{rest}', 'b.{rest}').name('a.b.c') == 'b.b.c'
    assert Rename('a.{i}.c', 'b.{i}.d').name('a.1.2.c') is None
