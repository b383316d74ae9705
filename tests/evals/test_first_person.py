"""The report of first-person worlds, on clips that shift under a mouse: one that stands still, and
one whose picture goes round with it."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import config, recipes, worlds
from matrix_jax.cli.parser import main_guard
from matrix_jax.data.records import SUFFIX, Clip, unknown, write_shard
from matrix_jax.evals import action_probe, first_person, report, tables
from matrix_jax.stream.base import Stream, StreamDecoder
from matrix_jax.worlds import matrix_game_2

TOOL = Path(__file__).parents[2] / 'tools' / 'evaluate.py'
CFG = first_person.Config(
    seconds=2,
    drive_seconds=8,
    long_seconds=1,
    streams=1,
    clips=1,
    clip_frames=25,
    times=(1.0, 2.0),
    probe=action_probe.Config(widths=(8, 16), hidden=16, steps=150, batch=16, learning_rate=5e-3),
)
FPS = 8


class Round(matrix_game_2.World):
    """Latents are every fourth frame. A stream shows its picture, which goes `by` pixels a frame to
    the side of the mouse."""

    def __init__(self, cfg, by=0):
        super().__init__(cfg)
        self.by = by

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
        def step(params, carry, control):
            picture, at = carry
            places = at[:, None] + self.by * jnp.cumsum(jnp.sign(control[..., 5]), axis=1)
            columns = (jnp.arange(24) + places[..., None].astype(int)) % 24  # [B F W]
            frames = jnp.take_along_axis(picture[:, None], columns[:, :, None, :, None], axis=3)
            return (picture, places[:, -1]), frames

        return Stream(
            lambda params, cond, key: (cond, jnp.zeros(len(cond))),
            lambda *given: step(*given),
            step,
        )


def clip(seed, frames=49, known=True):
    """Noise under a view that turns by the mouse, two latent frames each way; keys do nothing."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 255, (16, 600), np.uint8)
    way = np.repeat(rng.integers(-1, 2, 2 + frames // 8), 8)[7 : frames + 7]
    keyboard = np.zeros((frames, 4), np.int8)
    keyboard[:, seed % 4] = 1
    left = 300 + np.cumsum(2 * way)
    pictures = np.stack([noise[:, at : at + 24] for at in left])[..., None].repeat(3, -1)
    told = {'keyboard': keyboard, 'mouse': np.stack([0 * way, 0.1 * way], 1).astype(np.float32)}
    return Clip(
        frames=pictures,
        caption='noise',
        theme='',
        seed=seed,
        fps=FPS,
        **unknown(frames) | (told if known else {}),
    )


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recorded')
    write_shard(folder / f'train-0{SUFFIX}', map(clip, range(30)))
    write_shard(
        folder / f'heldout-0{SUFFIX}', [clip(38, 33), clip(39), clip(40, known=False), clip(41)]
    )
    return folder


@pytest.fixture(scope='module')
def world():
    return Round(dataclasses.replace(recipes.load('matrix_game_2:TINY').world, fps=FPS))


@pytest.fixture(scope='module')
def made(recorded, world, tmp_path_factory):
    """The results and the folder of a world that stands still, and of one that goes round."""
    still, turning = (tmp_path_factory.mktemp(name) for name in ('still', 'turning'))
    first = report.evaluate(world, {}, str(recorded), still, CFG, lambda line: None)
    shutil.copy(still / 'probe.msgpack', turning)
    second = report.evaluate(
        Round(world.cfg, by=2), {}, str(recorded), turning, CFG, lambda line: None
    )
    return (first, still), (second, turning)


def test_a_world_that_stands_still_obeys_nothing(made):
    (still, out), (turning, _) = made
    assert json.loads((out / 'results.json').read_text()) == json.loads(json.dumps(still))
    real = still['probe']['real']['yaw']
    assert real['balanced'] > 0.7 > 0.6 > real['shuffled'] and real['slope'] > 0.5
    assert turning['probe'] == still['probe']  # the same probe, and the same autoencoder
    turned, stood = (
        [one['obedience'][f'turn {side}']['all']['yaw'][side] for side in ('left', 'right')]
        for one in (turning, still)
    )
    assert sum(turned) > 1.4 > 1.1 > sum(stood)  # to one side at most
    assert turning['obedience']['mixed']['all']['yaw']['slope'] > 0.5
    obeyed = still['obedience']
    assert list(obeyed['forward']) == ['all', '0-2']
    assert list(obeyed['mixed']) == ['all', '0-4', '4-8']
    assert 'slope' in obeyed['forward']['all']['ahead']
    assert 'slope' not in obeyed['forward']['all']['yaw']
    rfd = still['fidelity']['rfd']
    assert list(rfd) == ['0-8'] and rfd['0-8'] > 0 < still['fidelity']['rfd_real']
    drift = still['drift']
    assert len(drift['mixed']['color']) == 8 and len(drift['real']['color']) == 6
    assert max(drift['mixed']['change']) == 0 < min(turning['drift']['turn left']['change'])
    assert still['speed']['calls_per_shift'] == 3 and still['speed']['fps'] > 0
    assert np.isfinite(still['reconstruction']['psnr']) and still['long']['change'] == [0]


def test_the_report_and_the_pictures_are_there(made):
    (_, still), (_, turning) = made
    text = (turning / 'report.md').read_text()
    assert '| turn left | turn | ' in text and '| mixed | A and D | ' in text
    assert '| real | 4 | ' in text and 'seen at 4-8 s' in text and ' dB |' in text
    assert {
        'scripts-0.png',
        'mixed.png',
        'drive.png',
        'mixed.mp4',
        'long.png',
        'probe.msgpack',
    } <= {path.name for path in still.iterdir()}
    lines = tables.compare([str(still), str(turning)]).splitlines()
    assert len(lines) == 5 and len({line.count('|') for line in lines}) == 1
    assert [line.split(' | ')[0] for line in lines[2:]] == [
        f'| {still.name}',
        f'| {turning.name}',
        '| real game',
    ]


def test_parts_of_a_stream_are_long_enough():
    assert first_person.spans(60.6, first_person.SPANS) == [(0, 4), (4, 15), (15, 30), (30, 60)]
    assert first_person.spans(16, first_person.SPANS) == [(0, 4), (4, 16)]
    assert first_person.spans(2.5, first_person.SPANS) == [(0, 2)]


def test_scripts_change_where_latent_frames_do(recorded, world):
    clips = first_person.recorded(world, str(recorded), CFG)
    assert len(clips) == 3 and first_person.begin(clips, 5) == [1, 2]
    for name in first_person.SCRIPTS:
        texts = first_person.script(world.vocabulary, clips, 1, name, 117, seed=3)
        assert len(texts) == 117
        changes = [at for at in range(1, 117) if texts[at] != texts[at - 1]]
        assert all(at % 4 == 1 for at in changes), name
    idle, route = (
        first_person.script(world.vocabulary, clips, 1, name, 337, 0) for name in ('idle', 'route')
    )
    assert set(idle) == {'idle'} and len(first_person.SCRIPTS) == 9
    assert route[1:25] == ['W'] * 24 and route[25:49] == ['right'] * 24
    assert route[1:169] == route[169:337]  # the route repeats
    mixed = world.vocabulary.encode(first_person.recorded_actions(world.vocabulary, clips, 2, 81))
    np.testing.assert_allclose(mixed[:49, 4:], clips[2].mouse, atol=1e-6)
    np.testing.assert_array_equal(mixed[49:, :4], clips[0].keyboard[1:])
    mouse = world.vocabulary.encode(
        first_person.script(world.vocabulary, clips, 1, 'mouse', 400, 0)
    )
    assert {-1, 0, 1} == set(np.sign(mouse[:, 4])) == set(np.sign(mouse[:, 5]))


@pytest.mark.parametrize(
    'change, words',
    [
        (
            {'mode': 'templerun'},
            'world.mode: got templerun, expected one of the keys W S A D and a',
        ),
        ({'fps': 25}, 'got clips of 16x24 at 8 fps, expected 16x24 at 25'),
        ({'clip': True}, 'world.clip: got a model of whole clips'),
    ],
)
def test_what_cannot_be_judged_is_named(recorded, world, tmp_path, change, words):
    name = {'mode': 'TINY_RUN', 'clip': 'TINY_CLIP'}.get(next(iter(change)), 'TINY')
    other = worlds.build(recipes.load(f'matrix_game_2:{name}').world)
    with pytest.raises(config.UsageError, match=words):
        report.evaluate(other, None, str(recorded), tmp_path / 'out', CFG)
    assert list(tmp_path.iterdir()) == []


def test_the_tool_names_what_is_missing(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location('evaluate', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for argv, said in (
        (['--data', str(tmp_path)], 'needs --weights'),
        ([], '--data: needs'),
        (['--data', str(tmp_path), '--seconds', '0'], '--seconds: got 0'),
    ):
        with pytest.raises(SystemExit) as stop:
            main_guard(tool.main, ['matrix_game_2:TINY', *argv])
        assert stop.value.code == 2 and said in capsys.readouterr().err
