"""The Wan DiT: blocks on caches equal the whole-clip call, anywhere in a stream."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.dit import wan
from matrix_jax.dit.wan_actions import ActionConfig, grouped
from matrix_jax.parity.record import read
from matrix_jax.weights.conversion import Row, flatten, to_jax, to_torch

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'matrix_game_2'
# A window of 4 frames, which blocks of 3 do not divide. All layers are alike, as that compiles in
# half the time; recordings and meshes have layers with and without actions.
TINY = dataclasses.replace(wan.PRESETS['tiny'], layers=2)
BLOCK, BLOCKS = 3, 3
FRAMES = BLOCK * BLOCKS


def noisy(cfg):
    """Random parameters without zeros, so that all of them matter."""
    draw = np.random.default_rng(0).normal

    def leaf(path, shape):
        rows = shape.shape[-2] if path[-1].key == 'kernel' else 20
        return (draw(size=shape.shape) / rows**0.5 + (path[-1].key == 'scale')).astype('float32')

    return {'params': jax.tree_util.tree_map_with_path(leaf, wan.shapes(cfg))}


@functools.cache
def params():
    return noisy(TINY)


def inputs():
    """(latents, level [B T], cond, image, mouse, keyboard) of TINY, B = 2."""
    rng = np.random.default_rng(5)
    steps = 4 * (FRAMES - 1) + 1
    made = [
        rng.normal(size=(2, *shape)).astype('float32')
        for shape in (
            (FRAMES, 4, 6, TINY.channels),
            (FRAMES, 4, 6, TINY.cond_channels),
            (TINY.image_length, TINY.image_dim),
            (steps, 2),
            (steps, TINY.actions.keyboard),
        )
    ]
    return made[0], np.zeros((2, FRAMES), np.float32), *made[1:]


@functools.partial(jax.jit, static_argnums=0)
def cached(cfg, params, caches, *args):
    return wan.WanTransformer(cfg).apply(params, caches, *args, method='cached')


@functools.partial(jax.jit, static_argnums=0)
def empty(cfg, params, image):
    caches = wan.init_caches(cfg, len(image), 4, 6)
    return wan.WanTransformer(cfg).apply(params, image, caches, method='read_image')


def of_block(given, block, rows=slice(None)):
    """The inputs of `cached` for a block of a clip."""
    latents, level, cond, _, mouse, keyboard = given
    span = slice(block * BLOCK, (block + 1) * BLOCK)
    return (
        latents[rows, span],
        level[rows, span],
        cond[rows, span],
        *(wan.windows(actions[rows], span.start, BLOCK) for actions in (mouse, keyboard)),
    )


def stream(cfg, params, given, rows=slice(None)):
    """(v of all blocks, caches before the first block and after each)."""
    caches, made = [empty(cfg, params, given[3][rows])], []
    for block in range(BLOCKS):
        v, new = cached(cfg, params, caches[-1], *of_block(given, block, rows))
        made.append(v)
        caches.append(wan.advance(new, BLOCK))
    return np.concatenate(made, axis=1), caches


@functools.cache
def streamed():
    return stream(TINY, params(), inputs())


@functools.cache
def trained():
    """(v of the whole-clip call, gradients of the sum of its squares), with rematerialisation."""
    cfg = dataclasses.replace(TINY, remat='block')

    def loss(params):
        v = wan.WanTransformer(cfg).apply(params, *inputs(), block=BLOCK)
        return jnp.sum(v**2), v

    grads, v = jax.jit(jax.grad(loss, has_aux=True))(params())
    return v, grads


def test_blocks_on_caches_equal_the_whole_clip_and_compile_once():
    want = trained()[0]
    got, caches = streamed()
    np.testing.assert_allclose(got, want, atol=3e-5)
    assert np.std(want) > 0.1
    assert cached._cache_size() == 1
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) for one in caches]
    assert all(one == shapes[0] for one in shapes)


def test_the_last_call_of_a_block_stays_in_the_cache():
    given, (want, caches) = inputs(), streamed()
    other = (given[0] + 1, given[1] + 500, *given[2:])
    v, touched = cached(TINY, params(), caches[2], *of_block(other, 2))
    assert not np.allclose(v, want[:, -BLOCK:], atol=1e-3)
    v, touched = cached(TINY, params(), touched, *of_block(given, 2))
    np.testing.assert_array_equal(v, want[:, -BLOCK:])
    for got, leaf in zip(
        jax.tree.leaves(wan.advance(touched, BLOCK)), jax.tree.leaves(caches[3]), strict=True
    ):
        np.testing.assert_array_equal(got, leaf)


@pytest.mark.parametrize('later', [99_996, 1_200_000_000])
def test_a_stream_does_not_depend_on_its_start_frame(later):
    want, caches = streamed()  # full caches; `later` is a multiple of their slots
    moved = caches[2].replace(start=caches[2].start + later)
    v, _ = cached(TINY, params(), moved, *of_block(inputs(), 2))
    np.testing.assert_array_equal(v, want[:, -BLOCK:])


def test_a_sink_stays_visible_at_its_true_distance():
    cfg = dataclasses.replace(TINY, local=5, sink=1)
    caches = stream(cfg, params(), inputs())[1]
    first = caches[1].runs['acting'].video.k[:, :, 0]
    np.testing.assert_array_equal(caches[3].runs['acting'].video.k[:, :, 0], first)
    made = [
        cached(cfg, params(), caches[2].replace(start=jnp.int32(start)), *of_block(inputs(), 2))[0]
        for start in (6, 10, 100_006)
    ]
    assert all(np.isfinite(v).all() for v in made)
    assert not np.allclose(made[0], made[1], atol=1e-5)  # the sink is further away


def test_a_batch_equals_its_streams_one_by_one():
    want = streamed()[0]
    given = inputs()
    for row in range(2):
        got, _ = stream(TINY, params(), given, slice(row, row + 1))
        np.testing.assert_allclose(got, want[row : row + 1], atol=2e-5)


def test_gradients_are_finite_and_reach_every_parameter():
    for path, grad in jax.tree_util.tree_leaves_with_path(trained()[1]):
        names = [entry.key for entry in path]
        assert bool(jnp.isfinite(grad).all()), path
        # A softmax does not see what all keys share; weights of action norms are not used.
        unused = 'actions' in names and names[-2] in ('query_norm', 'key_norm')
        assert np.any(grad) != unused or names[-1] == 'bias', path


def test_half_precision_stays_near_float32():
    half = dataclasses.replace(TINY, dtype='bfloat16')
    given, want = inputs(), streamed()[0]
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    got, caches = stream(half, low, given)
    assert got.dtype == np.float32 and caches[0].runs['acting'].video.k.dtype == jnp.bfloat16
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean()


@pytest.mark.parametrize('start', [0, 1, 5])
def test_windows_hold_the_actions_of_a_block(start):
    actions = np.arange(4 * 7 + 1, dtype=np.float32)[None, :, None]
    window = wan.windows(actions, start, 3)
    assert window.shape == (1, 24, 1) and window[0, -1, 0] == 4 * (start + 2)
    seen = grouped(ActionConfig(), window)[0]
    for index, frame in enumerate(range(start, start + 3)):
        want = np.maximum(np.arange(4 * frame - 12, 4 * frame), 0)
        np.testing.assert_array_equal(seen[index], want)


def test_released_sizes():
    sizes = {
        'universal': (1_619_242_304, 1114),
        'gta_drive': (1_619_238_464, 1114),
        'templerun': (1_508_715_584, 964),
        'foundation': (1_824_405_824, 1399),
    }
    for name, (count, tensors) in sizes.items():
        cfg = wan.PRESETS[name]
        leaves = flatten(wan.shapes(cfg))
        assert sum(leaf.size for leaf in leaves.values()) == count
        rows = [row for row in wan.weights(cfg)[1:] if isinstance(row, Row)]
        assert sum(len(row.keys()) for row in rows) == tensors
        assert {row.path for row in rows} == set(leaves)
        released = cfg.to_released()
        plain = dataclasses.replace(cfg, dtype='float32', remat='none')
        assert wan.Config.from_released(json.loads(json.dumps(released))) == plain
        assert 'image_dim' not in released


def test_the_published_configs_are_presets():
    published = {
        '_class_name': 'CausalWanModel',
        '_diffusers_version': '0.35.0.dev0',
        'action_config': {
            'blocks': list(range(15)),
            'enable_keyboard': True,
            'enable_mouse': False,
            'heads_num': 16,
            'hidden_size': 128,
            'img_hidden_size': 1536,
            'keyboard_dim_in': 7,
            'keyboard_hidden_dim': 1024,
            'mouse_dim_in': 2,
            'mouse_hidden_dim': 1024,
            'patch_size': [1, 2, 2],
            'qk_norm': True,
            'qkv_bias': False,
            'rope_dim_list': [8, 28, 28],
            'rope_theta': 256,
            'vae_time_compression_ratio': 4,
            'windows_size': 3,
        },
        'dim': 1536,
        'eps': 1e-06,
        'ffn_dim': 8960,
        'freq_dim': 256,
        'in_dim': 36,
        'inject_sample_info': False,
        'local_attn_size': 6,
        'model_type': 'i2v',
        'num_heads': 12,
        'num_layers': 30,
        'out_dim': 16,
        'sink_size': 0,
        'text_len': 512,
    }
    cfg = dataclasses.replace(wan.PRESETS['templerun'], dtype='float32', remat='none')
    assert wan.Config.from_released(published) == cfg
    written = cfg.to_released()
    assert all(
        published.get(key, value) == value
        for key, value in written.items()
        if key != 'action_config'
    )
    actions = written['action_config']
    assert all(actions[key] == published['action_config'].get(key, actions[key]) for key in actions)


def test_weights_survive_the_round_trip():
    record = read(GOLDENS / 'b_dit_train_gta_drive.safetensors')
    tensors, config = record.weights, record.config
    cfg = wan.Config.from_released(config['model'] | {'image_dim': config['clip_dim']})
    assert wan.Config.from_released(cfg.to_released()) == cfg
    table = wan.weights(cfg)
    prefixed = {f'model.{name}': tensor for name, tensor in tensors.items()}  # distilled files
    back = to_torch(table, to_jax(table, prefixed, wan.shapes(cfg)))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in back)


def test_actions_may_start_after_other_layers():
    cfg = dataclasses.replace(TINY, layers=3, actions=dataclasses.replace(TINY.actions, start=1))
    assert set(cfg.segments) == {'before', 'acting', 'after'} <= set(wan.shapes(cfg))
    assert wan.Config.from_released(cfg.to_released()) == cfg


def test_actions_may_be_on_any_set_of_layers():
    """The layers between have none; caches and the weight table follow."""
    names = ('embed', 'keyboard_width', 'mouse_width', 'heads', 'axes')
    sizes = {name: getattr(TINY.actions, name) for name in names}
    actions = ActionConfig.of_layers([3, 0, 2], **sizes)
    cfg = dataclasses.replace(TINY, layers=4, actions=actions)
    assert cfg.segments == {'acting': (0, 1), 'between': (1, 2), 'acting_2': (2, 4)}
    assert cfg.to_released()['action_config']['blocks'] == [0, 2, 3]
    assert wan.Config.from_released(cfg.to_released()) == cfg
    assert ActionConfig.of_layers([1, 2]) == ActionConfig(1, 3)
    rows = [row for row in wan.weights(cfg)[1:] if isinstance(row, Row)]
    keys = {key for row in rows for key in row.keys() if 'action_model' in key}
    assert {key.split('.')[1] for key in keys} == {'0', '2', '3'}
    weights, given = noisy(cfg), inputs()
    back = to_jax(wan.weights(cfg), to_torch(wan.weights(cfg), weights['params']), wan.shapes(cfg))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, weights['params']))
    want = wan.WanTransformer(cfg).apply(weights, *given, block=BLOCK)
    np.testing.assert_allclose(stream(cfg, weights, given)[0], want, atol=5e-5)
    with pytest.raises(ValueError, match=r'actions.blocks: got \(0, 2\), expected ascending'):
        ActionConfig(0, 4, blocks=(0, 2))


def test_actions_may_modulate_like_levels():
    """The same on caches and on whole clips; each frame by its own window, scaled by the gain."""
    small = dataclasses.replace(TINY, layers=1, actions=dataclasses.replace(TINY.actions, end=1))
    cfg = dataclasses.replace(
        small, actions=dataclasses.replace(small.actions, gain=3.0, modulate=True)
    )
    given, weights = inputs(), noisy(cfg)
    assert set(weights['params']) == {*noisy(small)['params'], 'action_embedding'}

    def whole(cfg, mouse, weights=weights):
        return wan.WanTransformer(cfg).apply(weights, *given[:4], mouse, given[5], BLOCK)

    want = whole(cfg, given[4])
    np.testing.assert_allclose(stream(cfg, weights, given)[0], want, atol=3e-5)
    louder = dataclasses.replace(cfg, actions=dataclasses.replace(cfg.actions, gain=1.0))
    np.testing.assert_allclose(whole(louder, 3 * given[4]), want, atol=1e-5)
    # Without its last layer nothing is added, and the network is the one that does not modulate.
    last = weights['params']['action_embedding']['linear_2']
    still = {
        'params': weights['params']
        | {
            'action_embedding': weights['params']['action_embedding']
            | {'linear_2': jax.tree.map(np.zeros_like, last)}
        }
    }
    plain = {name: part for name, part in weights['params'].items() if name != 'action_embedding'}
    np.testing.assert_array_equal(
        whole(louder, given[4], still), whole(small, given[4], {'params': plain})
    )
    # An action of the last frames changes none before them.
    late = given[4].copy()
    late[:, -4:] += 1
    change = np.abs(whole(cfg, late) - want).max(axis=(0, 2, 3, 4))
    assert change[-BLOCK:].max() > 1e-3 and not change[:-BLOCK].any()

    assert wan.Config.from_released(cfg.to_released()) == cfg
    assert not {'gain', 'modulate'} & set(small.to_released()['action_config'])
    table = wan.weights(cfg)
    back = to_jax(table, to_torch(table, weights['params']), wan.shapes(cfg))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, weights['params']))
    with pytest.raises(ValueError, match='actions.gain: got 0, expected more than 0'):
        dataclasses.replace(cfg.actions, gain=0.0)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 't2v'}, "model_type = 't2v' .expected 'i2v'"),
        ({'qk_norm': False}, 'qk_norm = False'),
        ({'guidance_embed': True}, 'guidance_embed = True .unknown key'),
        ({'patch_size': [2, 2, 2]}, 'patch_size = .2, 2, 2.'),
        (
            {'action_config': TINY.to_released()['action_config'] | {'blocks': [0, 2]}},
            r'actions: got layers .0, 3., expected a range within the 2 layers',
        ),
        (
            {'action_config': TINY.to_released()['action_config'] | {'qkv_bias': True}},
            'action_config.qkv_bias = True',
        ),
        (
            {
                'action_config': TINY.to_released()['action_config']
                | {'mouse_qk_dim_list': [8, 2, 2]}
            },
            'actions.keyboard_width: got 32, expected 2 heads of 8',
        ),
        ({'sink_size': 4}, 'sink: got 4 latent frames, expected fewer than the 4'),
    ],
)
def test_config_refuses_unsupported_operations(changes, message):
    with pytest.raises(ValueError, match=message):
        wan.Config.from_released(TINY.to_released() | changes)


@pytest.mark.parametrize(
    'fault, message',
    [
        (dict(latents=(2, 9, 5, 6, 4)), r'latents: got \(2, 9, 5, 6, 4\)'),
        (dict(level=(2, 4)), r'level: got \(2, 4\), expected \(2, 9\)'),
        (dict(cond=(2, 9, 4, 6, 4)), r'cond: got .*, expected \(2, 9, 4, 6, 8\)'),
        (dict(image=(2, 5, 9)), r'image: got \(2, 5, 9\), expected \(2, L, 10\)'),
        (dict(mouse=None), 'mouse: got None, but the network has its mouse'),
        (dict(keyboard=(2, 36, 4)), r'keyboard: got \(2, 36, 4\), expected \(2, 33, 4\) for 9'),
        (dict(block=2), 'block: got 2 frames, expected a divisor of the 9'),
    ],
)
def test_refuses_shapes_that_do_not_fit(fault, message):
    names = ('latents', 'level', 'cond', 'image', 'mouse', 'keyboard')
    args = dict(zip(names, inputs(), strict=True)) | {
        name: jnp.zeros(value) if isinstance(value, tuple) else value
        for name, value in fault.items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: wan.WanTransformer(TINY).apply(params(), **args))


def test_a_network_without_a_window_has_no_caches():
    with pytest.raises(ValueError, match='local: got None'):
        wan.init_caches(dataclasses.replace(TINY, local=None), 1, 4, 6)
