"""data/latents.py: whole episodes encoded once, windows that resume exactly."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.data import latents, records

PARAMS = {'vae': {'encoder': {'kernel': np.ones(2)}}}


class World:
    """Stands in for a world: a latent frame is the mean colour of its last frame."""

    cfg = types.SimpleNamespace(mirror=True, vae=types.SimpleNamespace(scaling_factor=1.0))
    calls = 0

    def encode_step(self, params, cache, frames):
        self.calls += 1
        kept = frames[:, ::4] if cache is None else frames[:, 3::4]
        half = kept.shape[3] // 2
        sides = [kept[:, :, :, :half].mean((2, 3)), kept[:, :, :, half:].mean((2, 3))]
        return 0, jnp.stack(sides, 2)[:, :, None]


@pytest.fixture
def recorded(tmp_path):
    def clip(index, count):
        frames = np.zeros((count, 8, 8, 3), np.uint8)
        frames[:, :, :4] = 100
        return records.Clip(frames=frames, controls=np.full(count, 1, np.int8),
                            caption=f'c{index % 2}', theme='meadow', seed=index, fps=16,
                            telemetry=np.zeros((count, len(records.TELEMETRY)), np.float32))

    clips = [clip(0, 33), clip(1, 41), clip(2, 21)]
    records.write_shard(tmp_path / f'train-0{records.SUFFIX}', iter(clips))
    return tmp_path


def test_every_clip_is_mirrored_and_padding_is_cut(recorded, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    # 21 frames are 1 + 8 + 8 + 4: the last chunk saw padding, so its latent frame is not kept.
    assert np.diff(store.starts).tolist() == [9, 11, 5] * 2
    assert store.texts == ['c0', 'c1'] and store.captions == [0, 1, 0] * 2
    first, second = store.latents[0], store.latents[store.starts[3]]
    assert first[0, 0, 0] == 100 and first[0, 1, 0] == 0
    np.testing.assert_array_equal(second, first[:, ::-1])
    assert store.controls[0] == 1 and store.controls[store.starts[3]] == 2


def test_a_store_is_made_once(recorded, tmp_path):
    world = World()
    latents.encode(recorded, world, PARAMS, tmp_path / 'cache')
    calls = world.calls
    latents.encode(recorded, world, PARAMS, tmp_path / 'cache')
    assert world.calls == calls > 0
    other = {'vae': {'encoder': {'kernel': np.zeros(2)}}}
    latents.encode(recorded, world, other, tmp_path / 'cache')
    assert world.calls == 2 * calls


def test_windows_resume_exactly_and_refuse_other_data(recorded, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    ids = np.arange(6).reshape(2, 3)
    windows = latents.Windows(store, 4, 2, 7, ids)
    next(windows)
    state = windows.state()
    wanted = next(windows)
    assert wanted['latents'].shape == (2, 4, 1, 2, 3) and wanted['ids'].shape == (2, 3)
    again = latents.Windows(store, 4, 2, 7, ids)
    again.restore(state)
    got = next(again)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
    with pytest.raises(ValueError, match='seed 8'):
        latents.Windows(store, 4, 2, 8, ids).restore(state)
    with pytest.raises(records.RecordError, match='no episode has 12'):
        latents.Windows(store, 12, 2, 7, ids)
