"""Other names of the same tensors, and the config keys that come with them."""

import jax
import numpy as np
import pytest

from matrix_jax.dit import wan, wan_diffusers
from matrix_jax.encoders import clip, clip_image, t5
from matrix_jax.vae import wan as wan_vae
from matrix_jax.weights import conversion
from matrix_jax.weights.names import Rename


def drawn(module, cfg):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), module.shapes(cfg)
    )


def renamed(table, tensors):
    """Tensors under the other names that a table knows."""
    found = {}
    for key, tensor in tensors.items():
        for entry in table:
            if isinstance(entry, Rename) and (other := Rename(entry.known, entry.torch).name(key)):
                found[other] = tensor
                break
        else:
            found[key] = tensor
    return found


@pytest.mark.parametrize(
    'module, cfg',
    [
        (wan, wan.PRESETS['tiny']),
        (wan_vae, wan_vae.PRESETS['tiny']),
        (clip, clip.PRESETS['tiny']),
        (t5, t5.PRESETS['tiny']),
    ],
    ids=['wan', 'wan_vae', 'clip', 't5'],
)
def test_other_names_give_the_same_parameters(module, cfg):
    params, table = drawn(module, cfg), module.weights(cfg)
    tensors = conversion.to_torch(table, params)
    others = renamed(table, tensors)
    assert set(others) - set(tensors)
    again = conversion.to_jax(table, others, module.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_matrix_game_config_in_the_layout_of_diffusers():
    cfg = wan.PRESETS['tiny']
    released = cfg.to_released()
    keys = {ours: theirs for theirs, ours in wan_diffusers.KEYS.items()}
    skipped = ('dim', 'model_type', 'qk_norm')
    diffusers = {keys.get(key, key): one for key, one in released.items() if key not in skipped}
    diffusers |= {'attention_head_dim': cfg.head_dim, 'qk_norm': 'rms_norm_across_heads'}
    diffusers |= {'added_kv_proj_dim': None, 'rope_max_seq_len': 1024, 'image_dim': cfg.image_dim}
    diffusers.pop('image_length', None)
    assert wan.Config.from_released(diffusers) == wan.Config.from_released(
        {key: one for key, one in released.items() if key != 'image_length'}
    )
    with pytest.raises(ValueError, match='qk_norm = .layer_norm. .expected .rms_norm_across_head'):
        wan.Config.from_released(diffusers | {'qk_norm': 'layer_norm'})


def test_joined_parts():
    cfg = clip_image.PRESETS['tiny']
    params, table = drawn(clip_image, cfg), clip_image.weights(cfg)
    tensors = conversion.to_torch(table, params)
    for layer in range(cfg.layers - 1):
        for leaf in ('weight', 'bias'):
            whole = tensors.pop(f'visual.transformer.{layer}.attn.to_qkv.{leaf}')
            for name, part in zip('qkv', np.split(whole, 3)):
                tensors[f'encoder.layers.{layer}.self_attn.{name}_proj.{leaf}'] = part
    again = conversion.to_jax(table, tensors, clip_image.shapes(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    del tensors['encoder.layers.0.self_attn.k_proj.weight']
    with pytest.raises(conversion.ConversionError, match='missing key visual.transformer.0.attn'):
        conversion.to_jax(table, tensors)


def test_a_tied_tensor_may_have_both_names():
    cfg = t5.PRESETS['tiny']
    table = t5.weights(cfg)
    tensors = conversion.to_torch(table, drawn(t5, cfg))
    tensors['encoder.embed_tokens.weight'] = tensors['shared.weight'] + 1
    found = conversion.to_jax(table, tensors)['embedding']
    np.testing.assert_array_equal(found, tensors['shared.weight'])


@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_values_that_are_not_finite_are_named(wrong, dtype):
    table = (conversion.Row('a', 'x', 'i -> i'), conversion.Row('b', 'y', 'i -> i'))
    tensors = {name: np.ones(5, np.dtype(dtype)) for name in 'ab'}
    tensors['b'][3] = wrong
    with pytest.raises(conversion.ConversionError, match='1 weight.* b: has values .*not finite'):
        conversion.to_jax(table, tensors)
    found = conversion.to_jax(table, tensors, allow_non_finite=True)
    assert found['y'].tobytes() == tensors['b'].tobytes()
    with pytest.raises(conversion.ConversionError, match='a: got int64, expected floating-point'):
        conversion.to_jax(table, tensors | {'a': np.ones(5, np.int64)}, allow_non_finite=True)
