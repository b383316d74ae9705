"""The evaluation of worlds with memory, on one whose view turns back and forgets without memory."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import config, recipes, worlds
from matrix_jax.cli import evaluate
from matrix_jax.data import gallery
from matrix_jax.data.loader import Clips
from matrix_jax.data.records import SUFFIX, Clip, unknown, write_shard
from matrix_jax.evals import report, revisit, tables
from matrix_jax.stream.base import Stream, StreamDecoder
from matrix_jax.worlds import matrix_game_3

FPS, H, W = 8, 16, 24
CFG = revisit.Config(streams=2, clips=2, clip_frames=25, minutes=(0.5,))


class Turning(matrix_game_3.World):
    """Shows its start picture as a panorama. Without memory, each turn to the left goes astray."""

    def inputs(self, prompt, frames, controls=None):
        return (np.asarray(frames)[None],), ''

    def condition(self, params, frames):
        return jnp.asarray(frames)[:, 0]

    def encode_step(self, params, cache, frames):
        return jnp.zeros(()), jnp.asarray(frames, jnp.float32)[:, (0 if cache is None else 3) :: 4]

    def decoder(self):
        def show(params, cache, latents, first=False):
            frames = jnp.repeat(latents.astype(jnp.uint8), 4, axis=1)
            return jnp.zeros(()), frames[:, 3:] if first else frames

        return StreamDecoder(lambda params, latents: show(params, None, latents, True), show)

    def stream(self, control_binding=None):
        remembers = bool(self.cfg.stream.reference_offsets)
        pixels = self.cfg.stream.camera.degrees * W / 360

        def step(params, carry, control):
            picture, at = carry
            moved = pixels * control[..., 7]
            moved = jnp.where(remembers | (moved > 0), moved, 0.3 * moved)
            after = at[:, None] + jnp.cumsum(moved, axis=1)
            places = jnp.concatenate([at[:, None], after[:, :-1]], axis=1)
            columns = (jnp.arange(W) + jnp.round(places[..., None]).astype(int)) % W
            frames = jnp.take_along_axis(picture[:, None], columns[:, :, None, :, None], axis=3)
            return (picture, after[:, -1]), frames

        return Stream(
            lambda params, cond, key: (cond, jnp.zeros(len(cond))),
            lambda *given: step(*given),
            step,
        )


def clip(seed, frames=25):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (2, 3, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return Clip(
        frames=np.broadcast_to(blocks, (frames, H, W, 3)).copy(),
        caption='',
        theme='',
        seed=seed,
        fps=FPS,
        **unknown(frames),
    )


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recorded')
    write_shard(folder / f'heldout-0{SUFFIX}', [clip(1), clip(2)])
    return folder


@pytest.fixture(scope='module')
def world():
    return Turning(dataclasses.replace(recipes.load('matrix_game_3:TINY').world, fps=FPS))


def test_a_world_that_remembers_is_told_from_one_that_does_not(world, recorded, tmp_path):
    results = report.evaluate(world, {}, str(recorded), tmp_path, CFG, lambda line: None)
    memory, floor = results['memory'], results['no_memory']
    assert list(memory['visits']) == ['0', '0.5']
    for one in memory['visits'].values():
        assert one['turned'] == pytest.approx(1) and one['start'] == pytest.approx(1)
        assert one['color'] < 0.01 and one['sharpness'] == pytest.approx(1)
    assert floor['visits']['0.5']['turned'] < 0.7
    assert results['ceiling']['similarity'] == pytest.approx(1)
    assert results['ceiling']['other_places'] < 0.7
    assert memory['returns']['slope']['start'] == pytest.approx(0, abs=1e-3)
    assert len(memory['returns']['minutes']) > 3
    text = (tmp_path / 'report.md').read_text()
    assert '| with memory | 0.5 | 1.00 | 1.00 | 0.00 | 1.00 |' in text
    assert (tmp_path / 'memory.png').is_file() and (tmp_path / 'no_memory.png').is_file()
    assert '| 0.5 | 1.00 |' in tables.compare([str(tmp_path)])


def test_the_player_turns_away_by_120_degrees_and_comes_back(world):
    plan = revisit.make_plan(world, (0.5,))
    vectors = world.vocabulary.encode(plan.actions)
    yaw = world.cfg.stream.camera.degrees * np.append(0, np.cumsum(vectors[:, 7]))  # before frame
    for before, away, back in plan.visits.values():
        turns = yaw[[before, away, back]] % 360
        np.testing.assert_allclose((turns + 1) % 360 - 1, [0, 120, 0], atol=0.1)
        assert back - before == 4 * FPS - 1
    np.testing.assert_allclose((yaw[plan.returns] + 1) % 360 - 1, 0, atol=0.2)
    keys = vectors[:, :2].sum(axis=0)
    assert keys[0] == keys[1] > 0  # as far back as ahead
    assert world.round_up_controls(len(plan.actions)) == len(plan.actions)


def test_similarity_is_about_colours_at_places():
    one, other = clip(1).frames[0], clip(2).frames[0]
    assert revisit.similarity(one, one) == pytest.approx(1)
    assert revisit.similarity(one, np.roll(one, 1, axis=1)) > 0.9
    assert revisit.similarity(one, other) < 0.7
    assert revisit.similarity(one, np.full_like(one, 99)) == 0


def test_a_start_picture_in_a_gallery_shows_a_landmark(tmp_path):
    layout = gallery.layout(1)
    number = next(n for n, room in enumerate(layout.rooms) if room.pillar is None)
    at, away = layout.picture(number)
    x, y = at + 300 * away
    ahead = np.arctan2(-away[1], -away[0])
    pose = np.zeros((25, 6), np.float32)
    pose[:, :2], pose[:, 3] = (x, y), ahead + 1.5
    pose[12, 3] = ahead
    shown = dataclasses.replace(clip(1), theme='gallery', pose=pose)
    assert layout.room_at(x, y) == number and revisit.landmark_frame(shown) == 12
    assert revisit.landmark_frame(clip(1)) is None
    write_shard(tmp_path / f'heldout-0{SUFFIX}', [shown, clip(3)])
    assert revisit.starts(Clips(tmp_path, 'heldout'), 2) == [(0, 12)]


def test_recorded_actions_are_those_of_the_next_frames(world):
    keyboard, mouse = np.zeros((25, 4), np.int8), np.zeros((25, 2), np.float32)
    keyboard[2, 3], mouse[3, 1] = 1, -0.1
    known = dataclasses.replace(clip(1), keyboard=keyboard, mouse=mouse)
    assert revisit.recorded_controls(world, known, 4) == ['idle', 'D', 'left', 'idle']
    for count, one in ((25, known), (4, clip(1))):
        with pytest.raises(config.UsageError, match=f'expected {count + 1} with known'):
            revisit.recorded_controls(world, one, count)


def test_worlds_without_memory_and_other_settings_are_refused(world, recorded, tmp_path):
    stream = dataclasses.replace(world.cfg.stream, reference_offsets=())
    with pytest.raises(config.UsageError, match='reference_offsets'):
        report.evaluate(world.replace(stream=stream), {}, str(recorded), tmp_path / 'out', CFG)
    other = world.replace(fps=12)
    with pytest.raises(config.UsageError, match='at 12 as this world'):
        report.evaluate(other, {}, str(recorded), tmp_path / 'out', CFG)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(ValueError, match='ascending'):
        revisit.Config(minutes=(5, 1))
    other = recipes.load('matrix_game_2:TINY').world
    with pytest.raises(config.UsageError, match='--minutes: is not a setting'):
        report.settings(worlds.build(other), minutes=(1.0,))
    with pytest.raises(config.UsageError, match="--minutes: got '1,x'"):
        evaluate.main(['matrix_game_3:TINY', '--minutes', '1,x'])
