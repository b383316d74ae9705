"""Laws of segments with memory on a toy network; tests/test_parity.py replays the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.diffusion import unipc
from matrix_jax.nn import camera
from matrix_jax.stream import base, memory, memory_bank

BATCH, H, W, C = 2, 1, 2, 3
KEYS, MOUSE = 4, 2
A = KEYS + MOUSE
PARAMS = {'mix': np.float32(0.6), 'past': np.float32(0.3)}
CFG = memory.Config(
    first=4,
    overlap=2,
    new=2,
    ratio=2,
    capacity=8,
    reference_offsets=(0, 2),
    fixed_memory=2,
    solver=unipc.Config(2),
)


def denoise(params, x, level, segment):
    """A toy network whose output depends on every input."""
    given = (
        segment.text.mean(axis=(1, 2))
        + segment.actions.mean(axis=(1, 2))
        + segment.rays.mean(axis=(1, 2, 3, 4))
        + 0.01 * segment.positions.mean(axis=1)
    )
    seen = segment.memory.mean(axis=1)[:, None] if segment.memory.shape[1] else 0.0
    return jnp.tanh(
        params['mix'] * x
        + params['past'] * seen
        + given[:, None, None, None, None]
        + level[..., None, None, None] / 1000
    )


NET = memory.MemoryNetwork(denoise, KEYS, MOUSE, pixels=2)


def condition(batch=BATCH, seed=0):
    draw = np.random.default_rng(seed).normal
    return memory.Cond(
        *(draw(size=(batch, *shape)).astype(np.float32) for shape in ((1, H, W, C), (4, 3), (4, 3)))
    )


def keys(batch=BATCH, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def controls(segments, batch=BATCH, seed=1):
    """(actions of segment 0, those of each other one)."""
    draw = np.random.default_rng(seed)

    def some(count):
        pressed = draw.integers(0, 2, (batch, count, KEYS))
        return np.concatenate(
            [pressed, draw.uniform(-0.5, 0.5, (batch, count, MOUSE))], axis=-1
        ).astype(np.float32)

    return some(CFG.first_actions), np.stack([some(CFG.segment_actions) for _ in range(segments)])


@functools.cache
def compiled(cfg=CFG):
    return base.Stream(*map(jax.jit, memory.make(cfg, NET)[:3]))


def play(segments=7, cfg=CFG, cond=None, key=None, given=None):
    """Repeated jit(step) -> (carries behind each segment, latents of all segments)."""
    stream, cond = compiled(cfg), cond or condition()
    first, later = controls(segments) if given is None else given
    carry = stream.init(PARAMS, cond, keys() if key is None else key)
    carry, part = stream.prefill(PARAMS, carry, first)
    carries, parts = [carry], [part]
    for control in later:
        carry, part = stream.step(PARAMS, carry, control)
        assert part.shape == (len(control), CFG.new, H, W, C) and part.dtype == jnp.float32
        carries.append(carry)
        parts.append(part)
    return carries, np.concatenate(parts, axis=1)


@functools.cache
def played():
    return play()


def assert_trees_close(got, want, atol=1e-5):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def test_scan_of_step_is_repeated_step_and_shapes_stay():
    carries, latents = played()
    first, later = controls(7)
    stream = memory.make(CFG, NET)
    carry, made = jax.jit(functools.partial(base.rollout, stream))(PARAMS, carries[0], later)
    np.testing.assert_allclose(latents[:, CFG.first :], base.join(made), atol=1e-5)
    assert_trees_close(carry, carries[-1])
    assert np.isfinite(latents).all() and int(carry.segment) == 8
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) for one in carries]
    assert all(one == shapes[0] for one in shapes)


def test_the_same_key_is_the_same_video_and_no_noise_is_used_twice():
    latents = played()[1]
    assert np.array_equal(play()[1], latents)
    assert np.abs(play(key=keys(seed=1))[1] - latents).max() > 0.1
    silent = NET._replace(denoise=lambda params, x, level, segment: 0 * x)
    stream = memory.make(CFG, silent)  # the clean estimate is the noise itself
    carry = stream.init(PARAMS, condition(), keys())
    first, later = controls(3)
    carry, head = jax.jit(stream.prefill)(PARAMS, carry, first)
    _, tail = jax.jit(functools.partial(base.rollout, stream))(PARAMS, carry, later)
    noise = np.concatenate([head[:, 1:], base.join(tail)], axis=1)
    noise = noise.reshape(-1, H * W * C)
    alike = np.abs(noise[:, None] - noise[None]).max(axis=-1) < 1e-3
    assert np.array_equal(alike, np.eye(len(noise), dtype=bool))


def test_a_batch_of_players_is_single_players():
    want = played()[1]
    first, later = controls(7)
    for row in range(BATCH):
        one = slice(row, row + 1)
        cond = jax.tree.map(lambda leaf, one=one: leaf[one], condition())
        got = play(cond=cond, key=keys()[one], given=(first[one], later[:, one]))[1]
        np.testing.assert_allclose(got, want[one], atol=2e-5)


def test_a_saved_carry_continues_the_stream():
    carries, latents = played()
    saved = jax.tree.map(np.asarray, carries[3])
    _, part = compiled().step(PARAMS, saved, controls(7)[1][3])
    np.testing.assert_array_equal(part, latents[:, 10:12])


def test_frame_numbers_of_segments_are_those_of_the_reference():
    cfg = memory.Config()
    assert (cfg.first_actions, cfg.segment_actions, cfg.overlap_actions) == (57, 40, 16)
    assert [memory.first_latent(cfg, k) for k in range(4)] == [0, 11, 21, 31]
    assert memory.latent_times(cfg, 0).tolist() == list(range(0, 57, 4))
    assert memory.latent_times(cfg, 2).tolist() == list(range(84, 137, 4))


def test_the_picture_and_the_overlap_stay_as_they_are():
    carries, latents = played()
    np.testing.assert_allclose(latents[:, :1], condition().latents, atol=1e-6)
    np.testing.assert_array_equal(carries[-1].history, latents[:, -CFG.overlap :])
    traced = jax.jit(functools.partial(memory.next_segment, CFG, NET))
    noise = np.random.default_rng(3).normal(size=(BATCH, 4, H, W, C)).astype(np.float32)
    trace = traced(PARAMS, carries[2], controls(7)[1][2], noise)[2]
    for given in trace.latents:
        np.testing.assert_allclose(given[:, :2], carries[2].history, atol=1e-6)
    assert trace.segment.positions[0, -4:].tolist() == [6, 7, 8, 9]
    # The last memory frame is fixed: pixel frame 2 is in latent frame 1.
    assert (trace.segment.positions[:, 1] == 1).all()
    np.testing.assert_allclose(trace.segment.memory[:, 1], latents[:, 1], atol=1e-6)
    assert trace.segment.actions.shape == (BATCH, 8, A)


def test_a_full_bank_replaces_the_oldest_frame_but_the_first_two():
    carries, latents = played()
    for count, carry in zip((4, 6, 8, 10, 12, 14, 16, 18), carries, strict=True):
        held, there = map(np.asarray, memory_bank.slot_frames(CFG.capacity, count))
        kept = [0, 1, *range(max(2, count - 6), count)]
        assert sorted(held[there]) == kept
        for slot in np.flatnonzero(there):
            np.testing.assert_array_equal(carry.bank.latents[:, slot], latents[:, held[slot]])


def test_a_camera_that_turns_back_retrieves_its_first_views():
    """A camera turns away and back; the views that overlap most are its first ones."""
    cfg = dataclasses.replace(CFG, capacity=40, fixed_memory=None)
    away, back = np.zeros((2, 1, 60, A), np.float32)
    away[..., -1], back[..., -1] = 0.8, -0.8  # 12 degrees per frame
    stream = memory.make(cfg, NET)
    cond = jax.tree.map(lambda leaf: leaf[:1], condition())
    carry = stream.init(PARAMS, cond, keys(1))
    carry, _ = jax.jit(stream.prefill)(PARAMS, carry, away[:, :7])
    step = jax.jit(functools.partial(memory.next_segment, cfg, NET))
    noise = np.zeros((1, 4, H, W, C), np.float32)
    for _ in range(2):  # 180 degrees away at the end
        carry, _, _ = step(PARAMS, carry, away[:, :4], noise)
    yaw = [float(carry.pose[0, 4])]
    for _ in range(3):
        carry, _, trace = step(PARAMS, carry, back[:, :4], noise)
        yaw.append(float(carry.pose[0, 4]))
    # The last frame of the segment looks 12 degrees beyond where the next one begins.
    want = camera.extrinsics(np.float32([0, 0, 0, 0, yaw[-1] + 12 * 0.8 / 0.8]))
    poses = np.asarray(carry.bank.poses)[0].reshape(-1, 5)
    chosen = np.asarray(trace.retrieved)[0, 0]
    frames = np.arange(len(poses)) - 1  # frame 0 has two entries
    pose = poses[frames == chosen][0]
    overlap = camera.view_overlap(want[None], camera.extrinsics(pose)[None])
    assert float(overlap[0, 0]) > 0.75 and chosen < 11, (chosen, pose, yaw)


def test_the_null_condition_has_no_actions_no_memory_and_the_negative_prompt():
    guided = dataclasses.replace(CFG, guidance=3.0)
    carries, latents = played()
    noise = np.random.default_rng(3).normal(size=(BATCH, 4, H, W, C)).astype(np.float32)
    one = dataclasses.replace(guided, solver=unipc.Config(1))
    given = PARAMS, carries[2], controls(7)[1][2], noise
    x, trace = jax.jit(functools.partial(memory.next_segment, one, NET))(*given)[1:]
    null = memory.without_conditions(NET, carries[2], trace.segment)
    assert null.memory.shape[1] == 0 and null.rays.shape[1] == null.positions.shape[1] == 4
    np.testing.assert_array_equal(null.text, carries[2].null_text)
    assert set(np.unique(null.actions[..., :KEYS])) == {-1}
    assert set(np.unique(null.actions[..., KEYS:])) == {1}
    sigma = np.float32(unipc.sigmas(one.solver)[0])
    level = np.float32([[0, 0, 999, 999]] * BATCH)
    full, none = (denoise(PARAMS, trace.latents[0], level, part) for part in (trace.segment, null))
    want = trace.latents[0] - sigma * (none + 3 * (full - none))
    np.testing.assert_allclose(x, want[:, 2:], atol=1e-5)
    assert (one.passes, guided.passes, CFG.passes) == (2, 4, 2)


def test_two_networks_share_the_steps_each_with_its_own_guidance():
    """Levels are 999 and 833, so each network makes one step."""
    pair = {'high': PARAMS, 'low': {'mix': np.float32(-0.4), 'past': np.float32(0.1)}}
    net = NET._replace(expert=lambda params, index, x: params[('high', 'low')[index]])
    noise = np.random.default_rng(3).normal(size=(BATCH, 4, H, W, C)).astype(np.float32)
    given = played()[0][2], controls(7)[1][2], noise

    def before(net, params, guidance=1.0, experts=None):
        """(new latents, latents before the second step)."""
        cfg = dataclasses.replace(CFG, guidance=guidance, experts=experts)
        made = jax.jit(functools.partial(memory.next_segment, cfg, net))(params, *given)
        return made[1], made[2].latents[1]

    experts = memory.Experts()
    x, middle = before(net, pair, experts=experts)
    np.testing.assert_allclose(middle, before(NET, PARAMS)[1], atol=1e-6)
    assert np.abs(x - before(NET, PARAMS)[0]).max() > 1e-2
    low = dataclasses.replace(experts, low_guidance=3.0)
    guided, same = before(net, pair, experts=low)
    np.testing.assert_allclose(same, middle, atol=1e-6)
    assert np.abs(guided - x).max() > 1e-2
    high = dataclasses.replace(experts, low_guidance=1.0)
    _, guided = before(net, pair, 3.0, high)
    np.testing.assert_allclose(guided, before(NET, PARAMS, 3.0)[1], atol=1e-6)
    cfg = dataclasses.replace(CFG, guidance=3.0, experts=high)
    assert (cfg.passes, cfg.guided, dataclasses.replace(CFG, experts=low).passes) == (3, True, 3)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'overlap': 0}, 'stream.overlap: got 0'),
        ({'first': 4}, 'stream.first: got 4'),
        ({'capacity': 16}, 'stream.capacity: got 16 latent frames, expected at least 17'),
        ({'reference_offsets': (60,)}, 'stream.reference_offsets: got .60'),
        ({'reference_offsets': (-1,)}, 'stream.reference_offsets: got .-1'),
        ({'furthest': 0}, 'stream.furthest: got 0'),
        ({'fixed_memory': 5}, 'stream.fixed_memory: got 5, expected 1 to 4'),
        ({'guidance': 0.5}, 'stream.guidance: got 0.5'),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        memory.Config(**fields)


def test_a_control_of_another_shape_is_refused():
    carry = played()[0][0]
    with pytest.raises(ValueError, match=r'control: got \(2, 3, 6\), expected'):
        memory.make(CFG, NET).step(PARAMS, carry, np.zeros((2, 3, A), np.float32))


def test_another_prompt_changes_the_next_segment():
    carry, control = played()[0][0], controls(7)[1][0]
    stream = compiled()
    text = np.float32(carry.text) + 1
    other = memory.make(CFG, NET).with_prompt(carry, text)
    want = stream.step(PARAMS, carry, control)[1]
    assert np.abs(stream.step(PARAMS, other, control)[1] - want).max() > 1e-2
    same = memory.make(CFG, NET).with_prompt(other, carry.text)
    np.testing.assert_array_equal(stream.step(PARAMS, same, control)[1], want)
