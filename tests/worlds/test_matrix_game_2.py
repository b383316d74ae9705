"""Matrix-Game 2.0 as a world; the parity tests compare its networks with the reference."""

import contextlib
import dataclasses
import importlib.util
import io
from pathlib import Path

import jax
import numpy as np
import pytest

from matrix_jax import config, recipes, video, worlds
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.dit import wan as dit
from matrix_jax.nn.kv_cache import Ring
from matrix_jax.parallel import sharding
from matrix_jax.pipelines import generate as making
from matrix_jax.weights import conversion, diffusers_layout
from matrix_jax.worlds import matrix_game_2

ROOT = Path(__file__).parents[2]


def build(name, **fields):
    cfg = recipes.load(f'matrix_game_2:{name}').world
    return worlds.build(dataclasses.replace(cfg, **fields))


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (1, 30, 50, 3), np.uint8)


@pytest.fixture(scope='module')
def world():
    return build('TINY')


def generate(folder, out, *options):
    spec = importlib.util.spec_from_file_location('generate', ROOT / 'tools' / 'generate.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(
        [
            'matrix_game_2:TINY',
            '--weights',
            str(folder),
            '--out',
            str(out),
            '--length',
            '1',
            *options,
        ]
    )


@pytest.fixture(scope='module')
def walk(tiny_walk, start_image, tmp_path_factory):
    """(file, output, runner) of one `generate`; other tests use the compiled runner."""
    players, said = [], io.StringIO()

    class Kept(making.StreamRunner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            players.append(self)

    out = tmp_path_factory.mktemp('walk') / 'walk.mp4'
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(making, 'StreamRunner', Kept)
        generate(tiny_walk, out, '--actions', 'W*12,W+right*21', '--image', str(start_image))
    return out, said.getvalue(), players[0]


@pytest.fixture(scope='module')
def player(walk):
    return walk[-1]


def play(player, actions, seed=0):
    """Returns the frames of a stream [F H W 3]. Its step is compiled for one shape."""
    known, steps = player.world.split_controls(actions)
    carry, _ = player.start('', player.world.fit(picture()), known, seed)
    carry, frames = player.compile(carry, steps)
    shown = [frames[0]]
    for step in steps[1:]:
        carry, frames = player.step(carry, step)
        shown.append(frames[0])
    return np.concatenate(shown)


def test_a_stream_has_9_frames_then_12_per_block(player):
    actions = ['W'] * 9 + ['W+right'] * 24
    frames = play(player, actions)
    assert frames.shape == (33, 16, 24, 3) and frames.dtype == np.uint8 and frames.std() > 5
    np.testing.assert_array_equal(frames, play(player, actions))
    other = play(player, ['W'] * 21 + ['left'] * 12)
    # Only the blocks under other actions differ.
    np.testing.assert_array_equal(frames[:9], other[:9])
    assert (frames[9:21] != other[9:21]).any() and (frames[21:] != other[21:]).any()
    assert (frames != play(player, actions, seed=1)).any()


@pytest.mark.parametrize('seconds, frames', [(1, 33), (2, 57), (4, 105), (24, 609)])
def test_frames_of_whole_blocks(world, seconds, frames):
    assert world.controls_for_seconds(seconds) == frames >= 25 * seconds
    assert (frames - 9) % 12 == 0
    known, steps = world.split_controls(['W'] * frames)
    assert known == [] and list(map(len, steps)) == [9] + [12] * ((frames - 9) // 12)


def test_the_foundation_makes_whole_clips(player):
    world = build('TINY_CLIP')
    assert world.controls_for_seconds(1) == 25
    assert build('TINY_CLIP', fps=12).controls_for_seconds(6) == 73
    with pytest.raises(config.UsageError, match='--length: got 4, expected at most 3: this model'):
        world.controls_for_seconds(4)
    given, _ = world.inputs('', world.fit(picture()), ['W'] * 9)
    frames = jax.jit(world.sample_clip)(player.params, *given, jax.random.key(0))
    assert frames.shape == (1, 9, 16, 24, 3) and frames.dtype == np.uint8


def test_frames_are_rounded_down_as_in_the_reference():
    values = np.float32([-1.5, -1, -0.999, 0, 0.9999, 1, 3])
    assert matrix_game_2.World.to_uint8(values).tolist() == [0, 0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize(
    'name, count',
    [
        ('UNIVERSAL', 1_619_242_304),
        ('GTA_DRIVE', 1_619_238_464),
        ('TEMPLERUN', 1_508_715_584),
        ('FOUNDATION', 1_824_405_824),
    ],
)
def test_released_sizes(name, count):
    world = build(name)
    assert dit.count(world.cfg.dit) == count
    one, many = (
        world.summary(sharding.abstract_mesh(mesh)).splitlines()
        for mesh in (config.Mesh(), config.Mesh(fsdp=4, tensor=2))
    )
    assert f'{count:,} parameters' in one[0] and '126,892,531 parameters' in one[1]
    mine = [float(lines[-1].split()[3].replace(',', '')) for lines in (one, many)]
    assert mine[1] < mine[0] / 3


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'mode': 'templerun'}, 'world.mode: got templerun, which has 7 keys and no mouse'),
        ({'mode': 'flying'}, 'mode: got'),
        ({'height': 18}, 'expected positive multiples of'),
        ({'fps': 0}, 'world.fps'),
        ({'clip': matrix_game_2.ClipConfig()}, 'world.clip: got'),
    ],
)
def test_invalid_configs_raise(fields, words):
    with pytest.raises(ValueError, match=words):
        build('TINY', **fields)


# --- folders and the command line ----------------------------------------------------------------


def test_the_published_transformer_is_read(world, tiny_walk, tmp_path):
    want = conversion.flatten(world.load(tiny_walk)['transformer'])
    for name in ('vae', 'image_encoder'):
        (tmp_path / name).symlink_to(tiny_walk / name)
    _, tensors = diffusers_layout.read_component(tiny_walk, 'transformer')
    diffusers_layout.write_component(
        tmp_path,
        'base_distilled_model',
        world.cfg.dit.to_released(),
        {f'model.{name}': tensors[name] for name in tensors},
        dtype=None,
    )
    found = worlds.describe(world.cfg, tmp_path, whole=True)
    assert found.cfg == world.cfg
    made = conversion.flatten(found.load(tmp_path)['transformer'])
    assert all(np.array_equal(made[path], want[path]) for path in want)
    with pytest.raises(diffusers_layout.CheckpointError, match='no component transformer'):
        worlds.describe(build('TINY_RUN').cfg, tmp_path, whole=True)


def test_training_starts_from_either_kind_of_network(world, tiny_walk, tmp_path):
    """A network of clips only lacks the window; to run one, the recipe must be of its kind."""
    clips = build('TINY_CLIP')
    assert worlds.describe(clips.cfg, tiny_walk).cfg.dit == clips.cfg.dit
    with pytest.raises(ValueError, match='the network has a window'):
        worlds.describe(clips.cfg, tiny_walk, whole=True)
    clips.save(tmp_path, world.load(tiny_walk))
    assert worlds.describe(world.cfg, tmp_path).cfg.dit == world.cfg.dit
    with pytest.raises(ValueError, match='the network has no window'):
        worlds.describe(world.cfg, tmp_path, whole=True)


def test_the_command_line_makes_a_video(walk):
    out, said, _ = walk
    assert '33 frames' in said
    frames = video.read_video(out, fps=25)
    assert frames.shape[0] == 33 and frames.shape[2] >= 384
    # The overlay is drawn: a lit W among dark keys, and the mouse beside them.
    held = KeyboardMouseVocabulary('universal').overlay('W')
    blank = np.zeros(frames.shape[1:], np.uint8)
    drawn = video.draw_keys(blank, held).max(axis=-1) > 240
    assert drawn.sum() > 100 and (frames[0][drawn].astype(int)[:, :2] > 150).mean() > 0.9


@pytest.mark.parametrize(
    'options, words',
    [
        (['--actions', 'hop*33'], "unknown action 'hop' of universal; expected W, S, A, D"),
        (['--actions', 'W*12'], 'got 12 frames, expected 33; positions 13 to 33 are missing'),
        (['--prompt', 'a wood', '--image', 'a.png'], '--prompt: this model reads no text'),
        (['--image', 'none.png'], 'none.png: no such file'),
        ([], 'this world has no start clip: give --video or --image'),
    ],
)
def test_invalid_input_is_one_line(tiny_walk, tmp_path, options, words):
    with pytest.raises(config.UsageError, match=words) as caught:
        generate(tiny_walk, tmp_path / 'no.mp4', *options)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'recipe, want', [('matrix_game_2:UNIVERSAL', 0), ('matrix_game_2:GTA_DRIVE', 0), ('doom', 7)]
)
def test_steps_that_fill_the_caches(recipe, want):
    """Some cache slots are empty in these steps, and none in later steps."""
    cfg = recipes.load(recipe).world
    block, size = cfg.stream.frames, cfg.dit.local
    full = [bool(np.all(Ring(step * block, block, size).visible())) for step in range(1, 12)]
    assert worlds.build(cfg).warmup_steps == full.index(True) == want
