"""Block autoregression on a toy network; tests/test_parity.py replays the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.diffusion import flow
from matrix_jax.stream import base, causal

BATCH, H, W, C, A = 2, 2, 3, 4, 3
SLOTS = 4
PARAMS = {'mix': np.float32(0.6), 'past': np.float32(0.3)}
CFG = causal.Config(frames=2, steps=(1000, 500), window=2, ratio=2)
SCHEDULE = flow.Config()


def denoise(params, caches, x, level, cond, actions):
    """A toy network: every input changes its output; its cache keeps the mean of each block."""
    memory, start = caches
    given = cond[..., :1] + actions.mean(axis=(1, 2))[:, None, None, None, None]
    v = jnp.tanh(
        params['mix'] * x
        + params['past'] * memory.mean(axis=1)[:, None]
        + given
        + level[..., None, None, None] / 1000
    )
    return v, (memory.at[:, start % SLOTS].set(x.mean(axis=1)), start)


def read(params, cond):
    image = cond.image.mean(axis=(1, 2))[:, None, None, None, None]
    return jnp.zeros([len(cond.latents), SLOTS, H, W, C]) + image, jnp.int32(0)


NET = causal.CachedNetwork(denoise, read, lambda caches, frames: (caches[0], caches[1] + 1), C, A)


def condition(batch=BATCH, seed=0):
    random = np.random.default_rng(seed)
    return causal.Cond(
        latents=random.normal(size=(batch, 5, H, W, 2)).astype(np.float32),
        image=random.normal(size=(batch, 4, 3)).astype(np.float32),
    )


def keys(batch=BATCH, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def controls(blocks, batch=BATCH, seed=1):
    return (
        np.random.default_rng(seed)
        .normal(size=(blocks, batch, CFG.block_actions, A))
        .astype(np.float32)
    )


@functools.cache
def compiled():
    return base.Stream(*map(jax.jit, causal.make(CFG, SCHEDULE, NET)[:3]))


def play(blocks=6, cond=None, key=None, carry=None, given=None):
    """Repeated jit(step) -> (carry, latents of all blocks)."""
    if carry is None:
        carry = compiled().init(PARAMS, cond or condition(), keys() if key is None else key)
    parts = []
    for control in controls(blocks) if given is None else given:
        carry, part = compiled().step(PARAMS, carry, control)
        assert part.shape == (len(control), CFG.frames, H, W, C) and part.dtype == jnp.float32
        parts.append(part)
    return carry, np.concatenate(parts, axis=1)


def assert_trees_close(got, want, atol=1e-5):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def test_scan_of_step_equals_repeated_step():
    carry, latents = play()
    again = compiled().init(PARAMS, condition(), keys())
    again, scanned = jax.jit(functools.partial(base.rollout, causal.make(CFG, SCHEDULE, NET)))(
        PARAMS, again, controls(6)
    )
    np.testing.assert_allclose(latents, base.join(scanned), atol=1e-5)
    assert_trees_close(carry, again)
    assert np.isfinite(latents).all() and np.all(carry.block == 6)


def test_one_key_gives_one_video_and_no_noise_is_used_twice():
    def record(params, caches, x, level, cond, actions):
        return 0 * x, caches  # the clean estimate is the noise itself

    latents = play()[1]
    assert np.array_equal(play()[1], latents)
    assert np.abs(play(key=keys(seed=1))[1] - latents).max() > 0.1
    one = dataclasses.replace(CFG, steps=(1000,))
    stream = causal.make(one, SCHEDULE, NET._replace(denoise=record))
    carry = stream.init(PARAMS, condition(), keys())
    _, noise = jax.jit(functools.partial(base.rollout, stream))(PARAMS, carry, controls(4))
    noise = np.asarray(base.join(noise)).reshape(BATCH * 8, -1)
    alike = np.abs(noise[:, None] - noise[None]).max(axis=-1) < 1e-3
    assert np.array_equal(alike, np.eye(len(noise), dtype=bool))


def test_a_block_can_be_conditioned_on_the_last_frame():
    """A stream gives the same conditions as training; the mask channels stay those of the start."""
    cfg = dataclasses.replace(CFG, steps=(1000,), condition_on_last_frame=True)

    def repeat(params, caches, x, level, cond, actions):
        return x - cond[..., 1:] - cond[..., :1], caches  # the clean estimate is the condition

    net, draw = NET._replace(denoise=repeat), np.random.default_rng(2).normal
    cond = causal.Cond(draw(size=(BATCH, 3, H, W, 1 + C)).astype(np.float32), condition().image)
    clean = draw(size=(BATCH, 6, H, W, C)).astype(np.float32)
    whole = cond.latents[:, [0, 1, 2, 2, 2, 2]]
    want = causal.condition_blocks(cfg, whole, clean)
    np.testing.assert_array_equal(want[..., :1], whole[..., :1])
    np.testing.assert_array_equal(want[:, 3, ..., 1:], clean[:, 1])
    assert causal.condition_blocks(CFG, whole, clean) is whole
    stream, table = causal.make(cfg, SCHEDULE, net), causal.step_table(cfg, SCHEDULE)
    carry = stream.init(PARAMS, cond, keys())
    for first, control in zip(range(0, 6, 2), controls(3), strict=True):
        block = slice(first, first + 2)
        _, shown = stream.step(PARAMS, carry, control)
        np.testing.assert_allclose(
            shown, want[:, block, ..., 1:] + want[:, block, ..., :1], atol=1e-5
        )
        carry = causal.read_block(cfg, table, net, PARAMS, carry, control, clean[:, block])


def test_guidance_by_actions():
    """Guidance scales the velocity, and leaves caches and past actions as they are."""
    cfg, rest = dataclasses.replace(CFG, action_guidance=2.5), np.float32([0.5, 0, 0])
    assert causal.with_action_guidance(CFG, NET, rest) is NET and (CFG.passes, cfg.passes) == (3, 5)
    net, params = causal.with_action_guidance(cfg, NET, rest), PARAMS
    caches = read(PARAMS, condition())
    x, cond = (
        np.random.default_rng(seed).normal(size=(BATCH, 2, H, W, size)).astype(np.float32)
        for seed, size in ((3, C), (4, 2))
    )
    past = np.zeros((BATCH, CFG.past_actions, A), np.float32)
    actions = np.concatenate([past, controls(1)[0]], axis=1)
    still = np.concatenate([past, np.broadcast_to(rest, controls(1)[0].shape)], axis=1)

    def answer(net, level, actions):
        level = jnp.full((BATCH, 2), level)
        ready, given = net.begin(params, caches, actions)
        return jax.jit(net.denoise)(params, ready, x, level, cond, given)

    for level in (1000.0, 500.0):
        (v, kept), (v0, _) = answer(NET, level, actions), answer(NET, level, still)
        got, ours = answer(net, level, actions)
        assert np.abs(v - v0).max() > 0.01
        np.testing.assert_allclose(got, v0 + 2.5 * (v - v0), atol=1e-5)
        assert_trees_close(ours, kept)
    np.testing.assert_array_equal(answer(net, 0.0, actions)[0], answer(NET, 0.0, actions)[0])


@pytest.mark.parametrize('cut', [1, 4])
def test_a_saved_carry_continues_exactly(cut, tmp_path):
    given = controls(6)
    carry, latents = play()
    middle, before = play(given=given[:cut])
    leaves, structure = jax.tree.flatten(middle)
    np.savez(tmp_path / 'carry.npz', *leaves)
    with np.load(tmp_path / 'carry.npz') as saved:
        middle = jax.tree.unflatten(structure, [saved[name] for name in saved])
    end, after = play(carry=middle, given=given[cut:])
    np.testing.assert_allclose(np.concatenate([before, after], axis=1), latents, atol=1e-5)
    assert_trees_close(end, carry)


def test_four_players_equal_four_single_players():
    cond, key, given = condition(4), keys(4), controls(5, 4)
    _, together = play(cond=cond, key=key, given=given)
    for player in range(4):
        one = slice(player, player + 1)
        _, alone = play(
            cond=jax.tree.map(lambda leaf: leaf[one], cond),  # noqa: B023
            key=key[one],
            given=given[:, one],
        )
        np.testing.assert_allclose(together[one], alone, atol=1e-5)


def test_two_hundred_blocks_compile_once_in_constant_memory():
    traces = []

    def traced(*given):
        traces.append(None)
        return denoise(*given)

    stream = causal.make(CFG, SCHEDULE, NET._replace(denoise=traced))
    step = jax.jit(stream.step, donate_argnums=1)
    carry = compiled().init(PARAMS, condition(), keys())
    held = []
    for index, control in enumerate(controls(200)):
        carry, latents = step(PARAMS, carry, control)
        if index % 50 == 9:
            held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(traces) == 1 and step._cache_size() == 1
    assert len(set(held)) == 1
    assert np.isfinite(latents).all()


# --- what the network is given -------------------------------------------------------------------


def record_calls(blocks, control=None, first=None):
    """Returns the inputs of each network call (level, x, condition, actions), and the latents."""
    seen = []

    def record(params, caches, x, level, cond, actions):
        jax.debug.callback(
            lambda *given: seen.append([np.asarray(one) for one in given]),
            level,
            x,
            cond,
            actions,
            ordered=True,
        )
        return denoise(params, caches, x, level, cond, actions)

    stream = causal.make(CFG, SCHEDULE, NET._replace(denoise=record))
    carry = stream.init(PARAMS, condition(), keys())
    if first is not None:
        carry, latents = stream.prefill(PARAMS, carry, first)
    step = jax.jit(stream.step)
    for one in controls(blocks) if control is None else control:
        carry, latents = step(PARAMS, carry, one)
    jax.effects_barrier()
    return seen, latents


def test_the_last_call_on_a_block_gets_it_clean():
    seen, latents = record_calls(2)
    levels = [call[0][0, 0].item() for call in seen]
    np.testing.assert_allclose(levels, [1000, 833.3333, 0] * 2, rtol=1e-6)
    np.testing.assert_array_equal(seen[-1][1], latents)


def test_frames_get_their_condition_and_later_ones_the_last():
    seen, _ = record_calls(4)
    want = np.asarray(condition().latents)
    for index in range(4):
        frames = np.minimum([2 * index, 2 * index + 1], 4)
        np.testing.assert_array_equal(seen[3 * index][2], want[:, frames])


def test_actions_before_the_first_frame_repeat_it():
    first, rest = controls(1)[0][:, : CFG.first_actions], controls(2, seed=5)
    seen, _ = record_calls(0, rest, first)
    actions = np.concatenate([first, *rest], axis=1)  # pixel frames 0 ..
    for index in range(3):
        last = 2 * (2 * index + 1)
        frames = np.maximum(np.arange(last - 7, last + 1), 0)
        np.testing.assert_array_equal(seen[3 * index][3], actions[:, frames])


def test_a_given_clean_block_leaves_the_carry_of_a_made_one():
    stream, table = causal.make(CFG, SCHEDULE, NET), causal.step_table(CFG, SCHEDULE)
    given = controls(1)[0]
    carry = stream.init(PARAMS, condition(), keys())
    made, latents = stream.step(PARAMS, carry, given)
    fed = causal.read_block(CFG, table, NET, PARAMS, carry, given, latents)
    assert_trees_close(fed, made)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'fields',
    [
        {'frames': 0},
        {'window': 0},
        {'ratio': 0},
        {'steps': ()},
        {'steps': (500, 1000)},
        {'steps': (1000, 0)},
        {'context_level': -1.0},
        {'action_guidance': 0.5},
    ],
)
def test_invalid_configs_raise(fields):
    with pytest.raises(ValueError, match=f'stream.{list(fields)[0]}: got .* expected'):
        causal.Config(**fields)


def test_controls_of_a_wrong_shape_raise():
    stream = causal.make(CFG, SCHEDULE, NET)
    carry = compiled().init(PARAMS, condition(), keys())
    with pytest.raises(ValueError, match=r'control: got .* = \(2, 4, 3\)'):
        stream.step(PARAMS, carry, np.zeros([2, 3, 3], np.float32))
    with pytest.raises(ValueError, match=r'control: got .* = \(2, 3, 3\)'):
        stream.prefill(PARAMS, carry, np.zeros([2, 4, 3], np.float32))


def test_published_blocks_have_9_frames_then_12():
    cfg = causal.Config()
    assert (cfg.first_actions, cfg.block_actions, cfg.past_actions) == (9, 12, 12)
