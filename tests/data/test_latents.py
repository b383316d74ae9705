"""data/latents.py: whole episodes encoded once, windows that resume exactly."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.data import latents, records

PARAMS = {'vae': {'encoder': {'kernel': np.ones(2)}}}


class World:
    """Stands in for a world: a latent frame is the mean colour of its last frame."""

    cfg = types.SimpleNamespace(
        mirror=True, height=8, width=8, vae=types.SimpleNamespace(normalisation={})
    )
    calls = 0

    def encode_step(self, params, cache, frames):
        self.calls += 1
        kept = frames[:, ::4] if cache is None else frames[:, 3::4]
        half = kept.shape[3] // 2
        sides = [kept[:, :, :, :half].mean((2, 3)), kept[:, :, :, half:].mean((2, 3))]
        return 0, jnp.stack(sides, 2)[:, :, None]


def clip(index, count, labelled=True, size=8):
    frames = np.zeros((count, size, 8, 3), np.uint8)
    frames[:, :, :4] = 100 + index
    known = records.unknown(count)
    if labelled:
        known['controls'] = np.full(count, 1, np.int8)
    return records.Clip(
        frames=frames,
        caption=f'c{index % 2}' if labelled else '',
        theme='meadow',
        seed=index,
        fps=16,
        **known,
    )


@pytest.fixture
def recorded(tmp_path):
    clips = [clip(0, 33), clip(1, 41), clip(2, 21)]
    folder = tmp_path / 'recorded'
    folder.mkdir()
    records.write_shard(folder / f'train-0{records.SUFFIX}', iter(clips))
    return folder


@pytest.fixture
def footage(tmp_path):
    folder = tmp_path / 'footage'
    folder.mkdir()
    records.write_shard(
        folder / f'train-0{records.SUFFIX}',
        (clip(50 + index, 33, labelled=False) for index in range(2)),
    )
    return folder


def test_every_clip_is_mirrored_and_padding_is_cut(recorded, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    # 21 frames are 1 + 8 + 8 + 4: the last chunk saw padding, so its latent frame is not kept.
    assert np.diff(store.starts).tolist() == [9, 11, 5] * 2
    assert store.names[1] == f'{recorded}/train-0{records.SUFFIX} record 1'
    assert store.names[4] == f'{store.names[1]} mirrored'
    assert store.texts == ['c0', 'c1'] and store.captions == [0, 1, 0] * 2
    first, second = store.cut(0, 1)[0], store.cut(store.starts[3], 1)[0]
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


def test_windows_hold_the_actions_of_their_frames(recorded, tmp_path):
    assert not latents.encode(recorded, World(), PARAMS, tmp_path / 'cache').actions
    folder, count = tmp_path / 'walks', 25
    folder.mkdir()
    walk = dataclasses.replace(
        clip(9, count, labelled=False),
        keyboard=np.tile(np.array([1, 0, 1, 0], np.int8), (count, 1)),
        mouse=np.arange(2 * count, dtype=np.float32).reshape(count, 2),
        pose=np.arange(count, dtype=np.float32)[:, None].repeat(6, 1),
    )
    records.write_shard(folder / f'train-0{records.SUFFIX}', [walk])
    store = latents.encode([folder, recorded], World(), PARAMS, tmp_path / 'cache')
    batch = next(latents.LatentWindows(store, 4, 24, 0, np.zeros((3, 1), int)))
    assert batch['keyboard'].shape == (24, 13, 4) and batch['pose'].shape == (24, 13, 6)
    walked = batch['clip'] < 2  # the walk and its mirror image
    assert walked.any() and np.isnan(batch['mouse'][~walked]).all()
    pitch, yaw = batch['mouse'][walked, :, 0], batch['mouse'][walked, :, 1]
    # A window from latent frame s on begins with pixel frame 4 s.
    assert (pitch[:, 0] % 8 == 0).all() and set(pitch[:, 0]) <= {0, 8, 16, 24}
    np.testing.assert_array_equal(np.diff(pitch), 2)
    turned = batch['clip'][walked] == 1
    np.testing.assert_array_equal(yaw, np.where(turned, -1, 1)[:, None] * (pitch + 1))
    keys = batch['keyboard'][walked][:, 0]
    np.testing.assert_array_equal(keys, np.where(turned[:, None], [1, 0, 0, 1], [1, 0, 1, 0]))


def test_windows_resume_exactly_and_refuse_other_data(recorded, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    ids = np.arange(6).reshape(2, 3)
    windows = latents.LatentWindows(store, 4, 2, 7, ids)
    next(windows)
    state = windows.state()
    wanted = next(windows)
    assert wanted['latents'].shape == (2, 4, 1, 2, 3) and wanted['ids'].shape == (2, 3)
    for clip, window, one in zip(wanted['clip'], wanted['latents'], wanted['ids'], strict=True):
        mirrored = window[0, 0, 0, 0] == 0
        assert store.names[clip].endswith('mirrored') == mirrored
        np.testing.assert_array_equal(one, ids[store.captions[clip]])
    again = latents.LatentWindows(store, 4, 2, 7, ids)
    again.restore(state)
    got = next(again)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
    with pytest.raises(ValueError, match='has seed 7, expected 8'):
        latents.LatentWindows(store, 4, 2, 8, ids).restore(state)
    with pytest.raises(records.RecordError, match='no episode has 12'):
        latents.LatentWindows(store, 12, 2, 7, ids)


def test_clips_of_another_size_are_refused(recorded, tmp_path):
    records.write_shard(recorded / f'train-1{records.SUFFIX}', [clip(0, 33, size=16)])
    with pytest.raises(
        records.RecordError,
        match=r'train-1.*record 0: got frames \[16, 8\], '
        r'expected \[8, 8\]',
    ):
        latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


def test_folders_are_encoded_by_themselves_and_joined(recorded, footage, tmp_path):
    world = World()
    alone = latents.encode(recorded, world, PARAMS, tmp_path / 'cache')
    more = latents.encode(footage, world, PARAMS, tmp_path / 'cache')
    calls = world.calls
    both = latents.encode(f'{recorded},{footage}', world, PARAMS, tmp_path / 'cache')
    assert world.calls == calls
    assert both.starts == alone.starts + [alone.starts[-1] + one for one in more.starts[1:]]
    assert both.texts == ['', 'c0', 'c1'] and both.captions == [1, 2, 1] * 2 + [0] * 4
    assert both.recordings == [0, 1, 2] * 2 + [3, 4] * 2 and both.names[6] == more.names[0]
    for store, first in ((alone, 0), (more, 6)):
        for episode, start in enumerate(store.starts[:-1]):
            at = both.starts[first + episode]
            np.testing.assert_array_equal(both.cut(at, 3), store.cut(start, 3))
    assert set(both.controls[: both.starts[6]]) == {1, 2}
    assert set(both.controls[both.starts[6] :]) == {records.NULL}


def drawn(store, count=6, **settings):
    """(batches of 4 drawn, the windows): a batch as (clip, first control) pairs."""
    ids = np.zeros((len(store.texts), 2))
    windows = latents.LatentWindows(store, 4, 4, 7, ids, **settings)
    batches = [next(windows) for _ in range(count)]
    return [list(zip(one['clip'], one['controls'][:, 0], strict=True)) for one in batches], windows


@pytest.mark.parametrize('labelled, wanted', [(1.0, 4), (0.75, 3), (0.5, 2), (0.0, 0)])
def test_every_batch_holds_the_share_of_labelled_windows(
    recorded, footage, tmp_path, labelled, wanted
):
    store = latents.encode([recorded, footage], World(), PARAMS, tmp_path / 'cache')
    batches, _ = drawn(store, labelled=labelled)
    for batch in batches:
        known = [control != records.NULL for _, control in batch]
        assert known == [clip < 6 for clip, _ in batch] and sum(known) == wanted


def test_without_a_share_windows_come_as_they_lie(recorded, footage, tmp_path):
    store = latents.encode([recorded, footage], World(), PARAMS, tmp_path / 'cache')
    places = [
        (clip, offset)
        for clip, (start, end) in enumerate(zip(store.starts, store.starts[1:], strict=False))
        for offset in range(end - start - 3)
    ]
    batches, _ = drawn(store, count=len(places) // 4)
    seen = sorted(int(clip) for batch in batches for clip, _ in batch)
    assert seen == sorted(clip for clip, _ in places)


def test_a_mixture_resumes_exactly_and_refuses_another(recorded, footage, tmp_path):
    store = latents.encode([recorded, footage], World(), PARAMS, tmp_path / 'cache')
    rest, windows = drawn(store, 9, labelled=0.25, label_share=0.5)
    _, again = drawn(store, 5, labelled=0.25, label_share=0.5)
    _, fresh = drawn(store, 0, labelled=0.25, label_share=0.5)
    fresh.restore(again.state())
    for one in rest[5:]:
        batch = next(fresh)
        assert list(zip(batch['clip'], batch['controls'][:, 0], strict=True)) == one
    _, other = drawn(store, 0, labelled=0.5, label_share=0.5)
    with pytest.raises(ValueError, match='the state has labelled 0.25, expected 0.5'):
        other.restore(again.state())


def test_a_kind_that_is_missing_is_named(recorded, footage, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    with pytest.raises(records.RecordError, match='labelled: got 0.5.*no unlabelled windows of 4'):
        drawn(store, labelled=0.5)
    store = latents.encode(footage, World(), PARAMS, tmp_path / 'cache')
    with pytest.raises(records.RecordError, match='labelled: got 0.5.*no labelled windows of 4'):
        drawn(store, labelled=0.5)


def test_a_smaller_share_of_labels_is_part_of_a_larger_one(tmp_path):
    records.write_shard(tmp_path / f'train-0{records.SUFFIX}', (clip(i, 17) for i in range(20)))
    store = latents.encode(tmp_path, World(), PARAMS, tmp_path / 'cache')
    kept = {}
    for share in (1.0, 0.5, 0.1, 0.0):
        controls = drawn(store, 0, label_share=share)[1].controls
        kept[share] = {
            store.recordings[episode]
            for episode, start in enumerate(store.starts[:-1])
            if controls[start] != records.NULL
        }
        # A mirror image is labelled if and only if its clip is.
        half = len(controls) // 2
        assert ((controls[:half] == records.NULL) == (controls[half:] == records.NULL)).all()
    assert [len(one) for one in kept.values()] == [20, 10, 2, 0]
    assert kept[0.1] < kept[0.5] < kept[1.0]


def test_processes_share_the_rows_of_a_batch(recorded, tmp_path):
    store = latents.encode(recorded, World(), PARAMS, tmp_path / 'cache')
    whole, _ = drawn(store)
    halves = [drawn(store, process=(index, 2))[0] for index in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    with pytest.raises(ValueError, match='train.batch: got 4, expected a multiple of 3'):
        drawn(store, process=(0, 3))
