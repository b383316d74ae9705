"""The bundled worlds: complete, small, and run by the shortest commands."""

import numpy as np
import pytest

from matrix_jax import recipes, video, worlds
from matrix_jax.pipelines import generate
from matrix_jax.weights import diffusers_layout
from tools import generate as tool

FOLDER, WALK = diffusers_layout.ASSETS / 'carracing', diffusers_layout.ASSETS / 'doom'


@pytest.fixture(scope='module')
def opened():
    run = recipes.load('carracing')
    return worlds.open_run(run)


@pytest.fixture(scope='module')
def walked():
    """`walked(actions, seed=0)` -> frames and actions of the bundled first-person world."""
    world, params = worlds.open_run(recipes.load('doom'))

    def walk(actions, seed=0):
        frames, clip = generate.generate(world, params, WALK, control=actions, seed=seed)
        return np.stack(list(frames)), clip

    return walk


@pytest.mark.parametrize(
    'folder, parts',
    [
        (
            FOLDER,
            {'text_encoder', 'tokenizer', 'scheduler', 'control_encoder', 'control_tokenizer'},
        ),
        (WALK, {'image_encoder'}),
    ],
)
def test_the_folder_is_complete_and_small(folder, parts):
    names = {path.name for path in folder.iterdir()}
    assert parts | {'transformer', 'vae', 'starts', 'model_index.json', 'card.md'} <= names
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    assert size <= 12 * 2**20


def test_same_seed_same_frames_and_keys_matter(opened):
    world, params = opened

    def drive(control, seed):
        frames, clip = generate.generate(
            world, params, FOLDER, control=control, pad='hold', length=2, seed=seed
        )
        return np.stack(list(frames)), clip

    left, clip = drive('DL', 1)
    assert left.shape == (32, 64, 96, 3) and left.dtype == np.uint8
    assert clip.controls == ['DL'] * 8
    np.testing.assert_array_equal(left, drive('DL', 1)[0])
    right = drive('DR', 1)[0]
    assert np.abs(left.astype(int) - right).mean() > 2  # grey levels: the road turns away
    assert np.abs(left.astype(int) - drive('DL', 2)[0]).mean() > 0


def test_prompt_picks_the_start(opened):
    world, _ = opened
    snow = generate.start_clip(world, FOLDER, 'a road in white snow', None, False)
    night = generate.start_clip(world, FOLDER, 'a dark night', None, False)
    assert snow.shape == night.shape and snow.mean() > 150 > 80 > night.mean()


def test_default_command_writes_a_video(tmp_path, capsys):
    out = tmp_path / 'new' / 'drive.mp4'
    tool.main(['--length', '1', '--out', str(out)])
    assert video.read_video(out).shape[0] == 16
    assert f'{out}: 16 frames' in capsys.readouterr().out


def test_the_view_turns_under_the_mouse(walked):
    """Turning right moves the picture left; the same actions and seed make the same video."""
    right, clip = walked('right*33')
    assert right.shape == (33, 96, 160, 3) and right.dtype == np.uint8
    assert clip.controls[-1] == 'right'
    np.testing.assert_array_equal(right[:13], walked('right*13')[0])
    left = walked('left*33')[0]
    assert wandered(right[9:33]) < 0 < wandered(left[9:33])


def wandered(frames, most=8):
    """Mean shift of the picture to the right from frame to frame, in columns."""
    rows = frames.mean(axis=(1, 3))  # mean of each column
    rows = rows - rows.mean(axis=1, keepdims=True)
    moves = range(-most, most + 1)
    found = [
        min(
            moves,
            key=lambda by: np.abs(
                after[most + by : len(after) - most + by] - before[most:-most]
            ).mean(),
        )
        for before, after in zip(rows, rows[1:], strict=False)
    ]
    return np.mean(found)


def test_the_first_person_command_of_the_readme(tmp_path, capsys):
    out = tmp_path / 'walk.mp4'
    tool.main(['doom', '--actions', 'W*8,right*8,W*5', '--out', str(out)])
    assert video.read_video(out).shape == (21, 288, 480, 3)
    assert f'{out}: 21 frames' in capsys.readouterr().out
