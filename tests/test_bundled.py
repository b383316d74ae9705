"""The bundled world: complete, light, and driven by the default command."""

import numpy as np
import pytest

from matrix_jax import checkpoint, config, generate, video, worlds
from tools import generate as tool

FOLDER = checkpoint.ASSETS / 'carracing'


@pytest.fixture(scope='module')
def opened():
    run = config.load('carracing')
    return worlds.open_run(run)


def test_folder_is_complete_and_light():
    names = {path.name for path in FOLDER.iterdir()}
    assert {'transformer', 'vae', 'text_encoder', 'tokenizer', 'scheduler', 'control_encoder',
            'control_tokenizer', 'starts', 'model_index.json', 'card.md'} <= names
    size = sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file())
    assert size <= 12 * 2**20


def test_same_seed_same_frames_and_keys_matter(opened):
    world, params = opened

    def drive(control, seed):
        frames, clip = generate.generate(world, params, FOLDER, control=control, pad='hold',
                                         length=2, seed=seed)
        return np.stack(list(frames)), clip

    left, clip = drive('DL', 1)
    assert left.shape == (32, 64, 96, 3) and left.dtype == np.uint8
    assert clip.symbols == ['DL'] * 8
    np.testing.assert_array_equal(left, drive('DL', 1)[0])
    right = drive('DR', 1)[0]
    assert np.abs(left.astype(int) - right).mean() > 2      # grey levels: the road turns away
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
