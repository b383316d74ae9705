"""Labelled and unlabelled windows in one run: the share, and what the network is told."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.controls.driving import NULL
from matrix_jax.data import records
from matrix_jax.train.swin_dpm import SwinDPM
from matrix_jax.train.whole_clip import WholeClip

PARAMS = {'vae': {'encoder': {'kernel': np.ones(2)}}}


class World:
    """Stands in for a world: a latent is the corner of a frame, a control its own one-hot."""

    cfg = types.SimpleNamespace(
        mirror=False,
        height=8,
        width=8,
        frames_per_control=4,
        vae=types.SimpleNamespace(normalisation={}),
        dit=types.SimpleNamespace(control=True),
        stream=types.SimpleNamespace(frames=5),
    )

    def encode_step(self, params, cache, frames):
        kept = frames[:, ::4] if cache is None else frames[:, 3::4]
        return 0, jnp.asarray(kept[:, :, :1, :1, :1])

    def tokenize(self, texts):
        return np.zeros((len(texts), 2))

    def embed_ids(self, params, ids):
        return ids

    empty_ids = np.zeros((1, 2))

    def embed_controls(self, params):
        return jnp.eye(NULL + 1)


def folder(path, labelled):
    def clip(seed):
        known = records.unknown(33)
        if labelled:
            known['controls'] = np.full(33, seed, np.int8)
        return records.Clip(
            frames=np.full((33, 8, 8, 3), seed, np.uint8),
            caption='',
            theme='',
            seed=seed,
            fps=16,
            **known,
        )

    path.mkdir()
    records.write_shard(path / f'train-0{records.SUFFIX}', (clip(seed) for seed in range(4)))
    return path


@pytest.mark.parametrize('make', [SwinDPM, lambda **more: WholeClip(clip_frames=(17,), **more)])
def test_a_batch_holds_the_share_and_tells_nothing_of_the_others(make, tmp_path):
    folders = [folder(tmp_path / 'a', True), folder(tmp_path / 'b', False)]
    stage, world = make(labelled=0.25, control_dropout=0.0), World()
    loader = stage.loader(world, PARAMS, ','.join(map(str, folders)), 8, 0, tmp_path / 'cache')
    batch = next(loader)
    assert batch['latents'].shape == (8, 5, 1, 1, 1)
    known = batch['clip'] < 4
    assert known.sum() == 2
    keys = jax.random.split(jax.random.key(0))
    _, told = stage.conditions(world, PARAMS, batch['ids'], batch['controls'], keys)
    told = np.asarray(told).argmax(axis=-1)
    np.testing.assert_array_equal(told[~known], NULL)
    np.testing.assert_array_equal(told[known], batch['latents'][known][:, :, 0, 0, 0])


@pytest.mark.parametrize('field', ['labelled', 'label_share'])
def test_shares_are_checked(field):
    with pytest.raises(ValueError, match=f'stage.{field}: got 1.5, expected 0 to 1'):
        SwinDPM(**{field: 1.5})
