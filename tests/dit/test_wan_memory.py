"""Wan 2.2 with memory and camera: laws; tests/test_parity.py replays the reference."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.dit import wan_memory
from matrix_jax.dit.wan_actions import ActionConfig
from matrix_jax.dit.wan_memory import Config, frame_windows
from matrix_jax.weights.conversion import Row, flatten, to_jax, to_torch

TINY = wan_memory.PRESETS['tiny']
BATCH, MEMORY, FRAMES = 2, 2, 3
POSITIONS = np.int32([[7, 4, 11, 12, 13], [1, 6, 11, 12, 13]])


def noisy(cfg):
    """Random parameters without zeros, so that every one of them matters."""
    draw = np.random.default_rng(0).normal

    def leaf(path, shape):
        rows = shape.shape[-2] if path[-1].key == 'kernel' else 20
        return (draw(size=shape.shape) / rows**0.5 + (path[-1].key == 'scale')).astype('float32')

    return {'params': jax.tree_util.tree_map_with_path(leaf, wan_memory.shapes(cfg))}


@functools.cache
def params(cfg=TINY):
    return noisy(cfg)


def inputs():
    """(latents, level, text, positions, camera, mouse, keyboard) with two memory frames."""
    draw = np.random.default_rng(5).normal
    frames = MEMORY + FRAMES
    latents, text, camera, mouse, keyboard = (
        draw(size=(BATCH, *shape)).astype('float32')
        for shape in (
            (frames, 4, 6, TINY.in_channels),
            (4, TINY.text_dim),
            (frames, 4, 6, TINY.camera_channels),
            (frames, 12, 2),
            (frames, 12, 6),
        )
    )
    level = np.float32([[0, 0, 0, 500, 500], [0, 0, 700, 700, 700]])
    return latents, level, text, POSITIONS, camera, mouse, keyboard


@functools.partial(jax.jit, static_argnums=0)
def call(cfg, variables, *args):
    return wan_memory.WanMemoryTransformer(cfg).apply(variables, *args, memory=MEMORY)


@functools.cache
def made():
    return np.asarray(call(TINY, params(), *inputs()))


def test_only_the_frames_behind_the_memory_come_out_and_everything_matters():
    want = made()
    assert want.shape == (BATCH, FRAMES, 4, 6, TINY.channels) and want.std() > 0.1
    for index in range(7):
        changed = list(inputs())
        part = changed[index].copy()
        part[:, 0] += 1  # of a memory frame, or of the first word
        changed[index] = part
        assert np.abs(call(TINY, params(), *changed) - want).max() > 1e-4, index


def test_a_batch_equals_its_clips_one_by_one():
    for row in range(BATCH):
        alone = call(TINY, params(), *(part[row : row + 1] for part in inputs()))
        np.testing.assert_allclose(alone, made()[row : row + 1], atol=2e-5)


def test_only_differences_of_positions_count():
    moved = list(inputs())
    moved[3] = POSITIONS + np.int32(1000)
    np.testing.assert_allclose(call(TINY, params(), *moved), made(), atol=2e-4)


def test_the_order_of_memory_frames_does_not_matter_without_actions():
    swapped = [
        part[:, [1, 0, 2, 3, 4]] if index in (0, 1, 3, 4) else part
        for index, part in enumerate(inputs()[:5])
    ]
    cfg = dataclasses.replace(TINY, actions=None)
    want = call(cfg, params(cfg), *inputs()[:5])
    np.testing.assert_allclose(call(cfg, params(cfg), *swapped), want, atol=2e-5)


def test_levels_of_tokens_equal_those_of_their_frames():
    tokens = list(inputs())
    tokens[1] = np.repeat(tokens[1][:, :, None], 6, axis=2)
    np.testing.assert_allclose(call(TINY, params(), *tokens), made(), atol=2e-5)


def test_norms_of_actions_may_use_their_weights():
    scaled = dataclasses.replace(TINY, actions=dataclasses.replace(TINY.actions, norm_scale=True))
    assert np.abs(call(scaled, params(), *inputs()) - made()).max() > 1e-4
    ones = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.ones_like(leaf)
            if 'actions' in [entry.key for entry in path]
            and path[-2].key in ('query_norm', 'key_norm')
            else leaf
        ),
        params(),
    )
    np.testing.assert_allclose(call(scaled, ones, *inputs()), made(), atol=1e-6)
    assert Config.from_released(scaled.to_released()) == scaled


def test_windows_begin_before_the_clip_or_go_on_from_it():
    cfg, memory = ActionConfig(), np.float32([[[-1], [-2]]])
    actions = np.arange(100, 113, dtype=np.float32)[None, :, None]
    first = frame_windows(cfg, actions, 4, memory)[0, :, :, 0]
    assert first.shape == (6, 12) and (first[0] == -1).all() and (first[1] == -2).all()
    assert first[2].tolist() == [100] * 12
    assert first[5].tolist() == list(range(100, 112))
    later = frame_windows(cfg, actions[:, :12], 3)[0, :, :, 0]
    assert later[0].tolist() == [100] * 8 + [100, 101, 102, 103]
    assert later[2].tolist() == list(range(100, 112))
    with pytest.raises(ValueError, match='actions: got 11, expected 9 or 12 for 3 latent frames'):
        frame_windows(cfg, actions[:, :11], 3)


def test_released_sizes():
    for name, count in (('5b', 6_469_915_584), ('wan_2_2_5b', 4_999_787_712)):
        cfg = wan_memory.PRESETS[name]
        leaves = flatten(wan_memory.shapes(cfg))
        assert wan_memory.count(cfg) == count
        rows = [row for row in wan_memory.weights(cfg) if isinstance(row, Row)]
        assert {row.path for row in rows} == set(leaves)
        plain = dataclasses.replace(cfg, dtype='float32', remat='none')
        assert Config.from_released(json.loads(json.dumps(cfg.to_released()))) == plain


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'memory': False, 'sigma_theta': 0.0},
        {'actions': None},
        {'actions': dataclasses.replace(TINY.actions, mouse=None, mouse_width=1024)},
        {'actions': dataclasses.replace(TINY.actions, keyboard=None, keyboard_width=1024)},
        {'layers': 4, 'actions': dataclasses.replace(TINY.actions, end=4, blocks=(0, 1, 3))},
    ],
    ids=str,
)
def test_weights_and_configs_survive_the_round_trip(change):
    cfg = dataclasses.replace(TINY, **change)
    assert Config.from_released(json.loads(json.dumps(cfg.to_released()))) == cfg
    table, weights = wan_memory.weights(cfg), noisy(cfg)['params']
    tensors = {f'model.{name}': part for name, part in to_torch(table, weights).items()}
    back = to_jax(table, tensors, wan_memory.shapes(cfg))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, weights))


def test_a_published_config_of_plain_wan_has_no_memory():
    published = {
        '_class_name': 'WanModel',
        'dim': 3072,
        'eps': 1e-6,
        'ffn_dim': 14336,
        'freq_dim': 256,
        'in_dim': 48,
        'model_type': 'ti2v',
        'num_heads': 24,
        'num_layers': 30,
        'out_dim': 48,
        'text_len': 512,
    }
    cfg = Config.from_released(published)
    assert cfg == dataclasses.replace(
        wan_memory.PRESETS['wan_2_2_5b'], dtype='float32', remat='none'
    )


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 's2v'}, "model_type = 's2v' .expected 'ti2v' or"),
        ({'qk_norm': False}, 'qk_norm = False'),
        ({'window_size': [3, 3]}, 'window_size = .3, 3.'),
        ({'guidance_embed': True}, 'guidance_embed = True .unknown key'),
        ({'dim': 25}, 'dim = 25 .expected a multiple of num_heads = 2'),
        ({'sigma_theta': 1.5}, 'sigma_theta: got 1.5, expected 0 <='),
        (
            {'action_config': TINY.to_released()['action_config'] | {'blocks': [0, 2]}},
            r'actions: got layers .0, 3., expected a range within the 2 layers',
        ),
    ],
)
def test_config_refuses_other_operations(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_released(TINY.to_released() | changes)


@pytest.mark.parametrize(
    'fault, message',
    [
        (dict(latents=(2, 5, 5, 6, 4)), r'latents: got \(2, 5, 5, 6, 4\)'),
        (dict(level=(2, 4)), r'level: got \(2, 4\), expected'),
        (dict(text=(2, 7, 10)), r'text: got \(2, 7, 10\), expected \(2, L, 10\) with L at most 6'),
        (dict(positions=(3,)), r'positions: got \(3,\), expected \(5,\) or \(2, 5\)'),
        (dict(camera=(2, 5, 4, 6, 9)), r'camera: got .*, expected \(2, 5, 4, 6, 24\)'),
        (dict(mouse=None), r'mouse: got None, expected windows of actions \(2, 5, 12, 2\)'),
        (dict(keyboard=(2, 5, 12, 4)), r'keyboard: got \(2, 5, 12, 4\), expected windows'),
    ],
)
def test_refuses_shapes_that_do_not_fit(fault, message):
    names = ('latents', 'level', 'text', 'positions', 'camera', 'mouse', 'keyboard')
    args = dict(zip(names, inputs(), strict=True)) | {
        name: jnp.zeros(value) if isinstance(value, tuple) else value
        for name, value in fault.items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: wan_memory.WanMemoryTransformer(TINY).apply(params(), **args, memory=MEMORY)
        )
