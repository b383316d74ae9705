"""data/scenes.py: clips that begin with a picture, encoded once, batches that resume exactly."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.data import image_clips, records

PARAMS = {'vae': {'encoder': {'kernel': np.ones(2)}}}


class World:
    """Stands in for a world: a latent frame is the mean of two halves of its last frame."""

    cfg = types.SimpleNamespace(
        mirror=True, height=8, width=8, vae=types.SimpleNamespace(normalisation={})
    )
    vocabulary = KeyboardMouseVocabulary('universal')
    calls = 0

    def encode_frames(self, params, frames):
        type(self).calls += 1
        left, right = jnp.split(frames[:, ::4].astype(jnp.float32), 2, axis=3)
        return jnp.stack([left.mean((2, 3)), right.mean((2, 3))], 2)[:, :, None]

    def image_condition(self, params, frames, count):
        return jnp.ones((len(frames), count, 1, 2, 1)) * frames.max()


def clip(index, count, **more):
    frames = np.zeros((count, 8, 8, 3), np.uint8)
    frames[:, :, :4] = (10 * index + np.arange(count))[:, None, None, None]
    known = records.unknown(count) | {
        'keyboard': np.tile(np.int8([1, 0, 0, 1]), (count, 1)),
        'mouse': np.stack([np.arange(count), np.ones(count)], 1).astype(np.float32),
    }
    return records.Clip(frames=frames, caption='a', theme='b', seed=index, fps=16, **known | more)


@pytest.fixture
def recorded(tmp_path):
    folder = tmp_path / 'recorded'
    folder.mkdir()
    records.write_shard(folder / f'train-0{records.SUFFIX}', iter([clip(0, 33), clip(1, 13)]))
    return folder


def test_clips_are_cut_encoded_and_turned(recorded, tmp_path):
    store = image_clips.encode(recorded, World(), PARAMS, tmp_path / 'cache', 9)
    # Of 33 frames there are clips from 0, 12 and 24; of 13 one.
    assert [name.split(' record ')[1] for name in store.names] == [
        '0 frame 0',
        '0 frame 12 mirrored',
        '0 frame 24',
        '1 frame 0 mirrored',
    ]
    assert store.latents.shape == (4, 3, 1, 2, 3) and store.latents.dtype == np.float16
    np.testing.assert_array_equal(store.latents[2, :, 0, :, 0], [[24, 0], [28, 0], [32, 0]])
    np.testing.assert_array_equal(store.latents[1, :, 0, :, 0], [[0, 12], [0, 16], [0, 20]])
    np.testing.assert_array_equal(store.actions[2, 3], [1, 0, 0, 1, 27, 1])
    np.testing.assert_array_equal(store.actions[1, 3], [1, 0, 1, 0, 15, -1])  # D is A there
    assert store.picture[2].max() == 24 and store.condition.shape == (4, 3, 1, 2, 1)
    calls = World.calls
    image_clips.encode(recorded, World(), PARAMS, tmp_path / 'cache', 9)
    assert World.calls == calls


def test_batches_resume_and_keep_to_what_all_arrays_have(recorded, tmp_path):
    store = image_clips.encode(recorded, World(), PARAMS, tmp_path / 'cache', 9)
    batches = image_clips.ClipBatches(store, 2, seed=3, more={'path': np.arange(3)})
    first = [next(batches) for _ in range(2)]
    state = batches.state()
    then = [next(batches) for _ in range(3)]
    again = image_clips.ClipBatches(store, 2, seed=3, more={'path': np.arange(3)})
    again.restore(state)
    for want in then:
        got = next(again)
        assert all(np.array_equal(got[name], value) for name, value in want.items())
    assert {int(one) for batch in first + then for one in batch['clip']} == {0, 1, 2}
    assert all(np.array_equal(batch['clip'], batch['path']) for batch in first + then)
    with pytest.raises(ValueError, match='the batches would differ'):
        image_clips.ClipBatches(store, 2, seed=4).restore(state)


def test_what_cannot_be_used_is_named(recorded, tmp_path):
    with pytest.raises(records.RecordError, match='no train recording of 41 frames'):
        image_clips.encode(recorded, World(), PARAMS, tmp_path / 'cache', 41)
    dumb = tmp_path / 'dumb'
    dumb.mkdir()
    unknown = records.unknown(9)
    records.write_shard(
        dumb / f'train-0{records.SUFFIX}',
        iter([clip(0, 9, keyboard=unknown['keyboard'], mouse=unknown['mouse'])]),
    )
    with pytest.raises(records.RecordError, match='without keyboard and mouse'):
        image_clips.encode(dumb, World(), PARAMS, tmp_path / 'cache', 9)
    with pytest.raises(ValueError, match='world.mode: got keys'):
        image_clips.columns(KeyboardMouseVocabulary('templerun'))
    assert not (tmp_path / 'cache').exists() or not list((tmp_path / 'cache').glob('*/*/store*'))
