"""train/memory_*.py on a toy network: segments as in play, the error buffer, self-made segments."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from matrix_jax import recipes
from matrix_jax.config import UsageError
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.data import records
from matrix_jax.diffusion import unipc
from matrix_jax.nn import camera
from matrix_jax.stream import memory
from matrix_jax.train import memory_stage
from matrix_jax.train import state as states
from matrix_jax.train.memory_dmd import MemorySelfForcing
from matrix_jax.train.memory_flow import ERRORS, MemoryFlow, empty_errors, keep_errors
from matrix_jax.weights import conversion

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
KEY = jax.random.key(1)
B, FRAMES, H, W, C = 2, 33, 1, 2, 3
STREAM = memory.Config(
    first=3,
    overlap=1,
    new=2,
    capacity=16,
    reference_offsets=(0, 4),
    fixed_memory=None,
    solver=unipc.Config(2),
)
FLOW = MemoryFlow(clip_frames=FRAMES, first_share=0.0, error_frames=6)


class Toy:
    """Stands in for a world: a network of two numbers that reads all inputs."""

    def __init__(self, stream=STREAM):
        self.cfg = types.SimpleNamespace(
            name='Toy',
            stream=stream,
            clip=None,
            height=H,
            width=W,
            vae=types.SimpleNamespace(spatial_compression=1),
            dit=types.SimpleNamespace(channels=C, text_length=4),
        )
        self.prediction = 'flow_prediction'
        self.vocabulary = KeyboardMouseVocabulary('matrix_game_3')
        self.tables = {name: () for name in MemoryFlow.components}
        self.seen = []

        def denoise(params, x, level, segment):
            self.seen.append(segment)
            p = params['transformer']
            past = segment.memory.mean() if segment.memory.shape[1] else 0.0
            told = segment.rays.mean() + 0.01 * segment.actions.mean() + 0.1 * segment.text.mean()
            told += level[..., None, None, None] / 1000
            return jnp.tanh(p['mix'] * x + p['past'] * past + told)

        self.network = memory.MemoryNetwork(denoise, 6, 2, pixels=1)

    def embed_ids(self, params, ids):
        return ids[..., None].astype(jnp.float32)

    def null_text(self, params):
        return jnp.zeros((1, 4, 1))

    def tokenize_and_cut(self, texts):
        return np.zeros((len(texts), 4), np.int32), ''


def batch(frames=FRAMES):
    draws = np.random.default_rng(0)
    mouse = np.float32(0.1) * draws.integers(-1, 2, (B, frames, 2))
    mouse[..., 0] = 0
    pose = np.zeros((B, frames, 6), np.float32)
    # As the game does: frame i shows the result of action i; yaw is to the left.
    pose[..., 3] = -np.deg2rad(15 * np.cumsum(mouse[..., 1], axis=1) - 15 * mouse[:, :1, 1])
    return {
        'latents': draws.normal(size=(B, 1 + frames // 4, H, W, C)).astype(np.float16),
        'ids': np.ones((B, 4), np.int32),
        'keyboard': np.zeros((B, frames, 4), np.int8),
        'mouse': mouse,
        'pose': pose,
    }


PARAMS = {'transformer': {'mix': np.float32(0.6), 'past': np.float32(0.3)}, 'vae': {}}


def prepared(number, world=None, stage=FLOW, **changes):
    world = world or Toy()

    @jit
    def prepare(number):
        clips = stage.clips(world, PARAMS, batch() | changes)
        carry, control, poses = memory_stage.later_carry(world.cfg.stream, clips, number)
        return memory.prepare_next(world.cfg.stream, world.network, carry, control, poses)

    return prepare(number)


def test_a_recorded_segment_is_prepared_as_a_stream_that_made_it_prepares_it():
    """A stream that is fed the recorded latents has the same inputs at every segment."""
    world, data = Toy(), batch()
    cfg, net, clips = world.cfg.stream, world.network, FLOW.clips(world, PARAMS, data)
    carry, control, _ = memory_stage.first_carry(cfg, net, clips)
    made = memory.prepare_first(cfg, net, carry, control)
    prepare = jit(functools.partial(memory.prepare_next, cfg, net))
    carry = memory._remember(cfg, carry, clips.latents[:, : cfg.first], made)
    for number in (1, 2, 3):
        start, count = cfg.first + cfg.new * (number - 1), cfg.new
        begin = 4 * start
        played = prepare(carry, clips.actions[:, begin : begin + 4 * count])
        given = prepared(number)
        for name in ('segment', 'clean', 'actions', 'retrieved'):
            for one, other in zip(
                *(jax.tree.leaves(getattr(p, name)) for p in (played, given)), strict=True
            ):
                np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)
        carry = memory._remember(cfg, carry, clips.latents[:, start : start + count], played)
    np.testing.assert_array_equal(
        memory_stage.new_frames(cfg, clips, 3), clips.latents[:, start : start + count]
    )


def test_actions_move_the_frame_after_them_and_unknown_ones_stay_unknown():
    keyboard = np.zeros((1, 3, 4), np.int8)
    keyboard[0, 1, 0] = 1
    mouse = np.zeros((1, 3, 2), np.float32)
    keys = ('W', 'S', 'A', 'D', 'space', 'attack')
    made = memory_stage.stream_actions(keys, keyboard, mouse)
    assert made.shape == (1, 3, 8) and made[0, 0, 0] == 1 and made[0, 1:].sum() == 0
    unknown = records.unknown(3)
    made = memory_stage.stream_actions(keys, unknown['keyboard'][None], unknown['mouse'][None])
    np.testing.assert_array_equal(made[0, 0], memory_stage.unknown_action(8))


def test_recorded_poses_are_those_that_the_actions_make_and_missing_ones_are_made():
    known = FLOW.clips(Toy(), PARAMS, batch()).poses
    missing = batch() | {'pose': np.full((B, FRAMES, 6), np.nan, np.float32)}
    made = FLOW.clips(Toy(), PARAMS, missing).poses
    np.testing.assert_allclose(known, made, atol=1e-3)
    walked = batch()
    walked['pose'][..., 0] += np.arange(FRAMES) * 3
    assert FLOW.clips(Toy(), PARAMS, walked).poses[0, -1, 0] == 96
    moves = dataclasses.replace(FLOW, poses='actions').clips(Toy(), PARAMS, walked)
    assert moves.moves and moves.poses[0, -1, 0] == 0
    up = camera.next_pose(np.zeros(5), np.zeros(6), [0.1, 0.0])
    recorded = np.array([0, 0, 0, 0, np.deg2rad(1.5), 0])
    np.testing.assert_allclose(memory_stage.camera_poses(recorded), up, atol=1e-5)


def test_memory_is_what_the_bank_of_a_stream_still_has():
    small = dataclasses.replace(STREAM, capacity=5)
    one = prepared(3, Toy(small))
    frames = np.asarray(one.segment.positions)[:, :2]
    # Of frames 1 to 5, a bank of five slots has 1, the second one, and the last three.
    assert np.isin(frames, (1, 4, 5)).all()


def test_older_memories_are_shown_at_the_furthest_time():
    far = prepared(3, Toy(dataclasses.replace(STREAM, furthest=2)))
    true = prepared(3)
    first = memory.first_latent(STREAM, 3)
    assert np.asarray(true.segment.positions).min() < first - 2
    np.testing.assert_array_equal(
        far.segment.positions, np.maximum(true.segment.positions, first - 2)
    )


def test_without_memory_no_frame_is_retrieved():
    one = prepared(2, Toy(dataclasses.replace(STREAM, reference_offsets=())))
    assert one.segment.memory.shape[1] == 0 and one.segment.positions.shape == (B, 3)


# --- the error buffer ----------------------------------------------------------------------------


def test_the_buffer_replaces_its_oldest_residuals_by_those_of_chosen_examples():
    errors = empty_errors(3, (1, 1, 1))
    given = jnp.arange(1.0, 5).reshape(2, 2, 1, 1, 1)
    errors = keep_errors(errors, given[:1], np.array([True]))
    assert errors['frames'].ravel().tolist() == [1, 2, 0] and errors['next'] == 2
    errors = keep_errors(errors, 10 * given, np.array([False, True]))
    assert errors['frames'].ravel().tolist() == [1, 30, 0]  # the fourth does not fit


def test_residuals_are_kept_and_added_to_history_and_memory_only():
    world = Toy()
    state = states.init(FLOW.start(world, PARAMS, 0), FLOW.trainable, optax.sgd(0.01), 0)
    step = jit(states.make_step(functools.partial(FLOW.loss, world), optax.sgd(0.01), 0.9))
    first, metrics = step(state, batch())
    frames = first.frozen[f'{ERRORS}/frames']
    assert first.frozen[f'{ERRORS}/next'] == 4 and 'buffers' not in metrics
    assert set(first.student) == {'transformer/mix', 'transformer/past'}
    kept = np.abs(np.asarray(frames)).sum(axis=(1, 2, 3)) > 0
    assert kept[:4].any() and not kept[4:].any()

    loud = dataclasses.replace(FLOW, history_errors=1.0, memory_errors=1.0)
    errors = {'frames': jnp.ones((6, H, W, C)), 'next': jnp.int32(0)}
    one = prepared(2)
    segment, clean = loud.with_errors(one.segment, one.clean, errors, KEY)
    moved, remembered = clean - one.clean, segment.memory - one.segment.memory
    for change, count in ((moved, 1), (remembered, 2)):
        change = np.asarray(change).reshape(B, count, -1)
        assert (np.ptp(change, axis=-1) < 1e-6).all() and (change > 0).all() and (change < 1).all()
    quiet = dataclasses.replace(FLOW, history_errors=0.0, memory_errors=0.0)
    segment, clean = quiet.with_errors(one.segment, one.clean, errors, KEY)
    np.testing.assert_array_equal(clean, one.clean)
    np.testing.assert_array_equal(segment.memory, one.segment.memory)


def test_a_refused_update_keeps_the_buffer_and_parts_of_a_batch_keep_the_last():
    def loss(params, given, key):
        return params['a']['x'] * given['y'].mean(), {'buffers': {'a/b': given['y'].mean()}}

    params = {'a': {'x': np.float32(1), 'b': np.float32(5)}}
    start = states.init(params, lambda path: path == 'a/x', optax.sgd(0.1), 0)
    update = states.make_step(loss, optax.sgd(0.1), 0.9)
    assert update(start, {'y': jnp.array([np.nan])})[0].frozen['a/b'] == 5
    assert update(start, {'y': jnp.array([2.0])})[0].frozen['a/b'] == 2
    parts = states.make_step(loss, optax.sgd(0.1), 0.9, accumulate=2)
    assert parts(start, {'y': jnp.array([1.0, 3.0])})[0].frozen['a/b'] == 3


def test_segments_without_conditions_read_neither_memory_nor_actions():
    world = Toy()
    stage = dataclasses.replace(FLOW, null_share=1.0, error_frames=0)
    loss, metrics = stage.loss(world, PARAMS, batch(), KEY)
    segment = world.seen[-1]
    assert np.isfinite(loss) and segment.memory.shape[1] == 0 and 'buffers' not in metrics
    np.testing.assert_array_equal(segment.actions[0, 0], memory_stage.unknown_action(8))
    first = dataclasses.replace(FLOW, first_share=1.0)
    first.loss(world, PARAMS, batch(), KEY)
    assert world.seen[-1].actions.shape == (B, STREAM.first_actions, 8)


# --- segments of the student ---------------------------------------------------------------------


@pytest.mark.parametrize('first_share', [0.0, 1.0])
def test_student_and_critic_learn_in_turns_from_segments_of_the_student(first_share):
    world, stage = (
        Toy(),
        MemorySelfForcing(
            clip_frames=FRAMES, rollout=2, ratio=2, first_share=first_share, guidance=2.0
        ),
    )
    stage.check_world(world)
    params = stage.start(world, PARAMS, 0)
    flat = conversion.flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if stage.trainable(path)}
    assert {path.split('/')[0] for path in trained} == {'transformer', 'critic'}

    @jit
    def gradient(key):
        def compute(trained):
            return stage.loss(world, conversion.unflatten(flat | trained), batch(), key)

        return jax.grad(compute, has_aux=True)(trained)

    turns = set()
    for seed in range(6):
        found, metrics = gradient(jax.random.key(seed))
        moved = {path.split('/')[0] for path, leaf in found.items() if leaf != 0}
        student = bool(metrics['student'])
        # Teacher and critic are equal at first, so only guidance moves the student.
        assert moved <= {'transformer'} if student else moved == {'critic'}
        turns.add(student)
    assert turns == {True, False}


def test_a_rollout_reads_what_the_student_made():
    """The memory of the second segment of a rollout holds frames that no recording has."""
    world = Toy()
    stage = MemorySelfForcing(clip_frames=FRAMES, rollout=3, first_share=0.0)
    clips = stage.clips(world, PARAMS, batch())
    play = jit(lambda key: stage._later(world, PARAMS, clips, key))
    recorded = np.asarray(clips.latents).reshape(B, -1, H * W * C)

    def known(frames):
        found = np.asarray(frames).reshape(B, -1, 1, H * W * C) == recorded[:, None]
        return found.all(axis=-1).any(axis=-1).all()

    played = [play(jax.random.key(seed)) for seed in range(8)]
    assert {bool(known(one.clean)) for one in played} == {True, False}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'clip_frames': 32}, 'stage.clip_frames: got 32'),
        ({'poses': 'guessed'}, "stage.poses: got 'guessed'"),
        ({'first_share': 0.6, 'null_share': 0.5}, 'stage.first_share: got 0.6'),
        ({'error_frames': -1}, 'stage.error_frames: got -1'),
        ({'memory_errors': 2}, 'stage.memory_errors: got 2'),
        ({'shift': 0}, 'stage.shift: got 0'),
    ],
)
def test_bad_fields_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MemoryFlow(**fields)


@pytest.mark.parametrize(
    'recipe, stage, words',
    [
        ('matrix_game_3:TINY', MemoryFlow(clip_frames=17), 'stage.clip_frames: got 17'),
        ('matrix_game_3:TINY_BASE', MemorySelfForcing(clip_frames=33), 'stream.guidance: got 5'),
        ('matrix_game_3:TINY_MOE', MemoryFlow(), 'stream.experts: got Experts'),
        ('matrix_game_3:TINY_WAN', MemoryFlow(), 'trains worlds with memory'),
        ('matrix_game_2:TINY', MemoryFlow(), 'trains worlds with memory'),
    ],
)
def test_stages_refuse_worlds_that_do_not_fit(recipe, stage, words):
    from matrix_jax import worlds

    with pytest.raises(UsageError, match=words):
        stage.check_world(worlds.build(recipes.load(recipe).world))
