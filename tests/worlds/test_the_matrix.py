import dataclasses
import shutil

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.nn import linear
from matrix_jax.stream import swin
from matrix_jax.stream.base import rollout
from matrix_jax.weights import conversion
from matrix_jax.weights.diffusers_layout import CheckpointError

RUN = recipes.load('the_matrix:TINY')


@pytest.mark.parametrize(
    'fields, int8', [({'steps': 8, 'guidance': 3.0}, 'none'), ({'solver': 'lcm'}, 'attention')]
)
def test_a_stream_of_a_folder_runs_in_8_bits_as_well(tiny, fields, int8):
    cfg = dataclasses.replace(RUN.world.stream, **fields)
    run = dataclasses.replace(
        RUN,
        weights=str(tiny),
        world=dataclasses.replace(
            RUN.world, stream=cfg, dit=dataclasses.replace(RUN.world.dit, int8=int8)
        ),
    )
    world, params = worlds.open_run(run)
    assert isinstance(
        conversion.flatten(params)['transformer/before/attention/query/kernel'], linear.Int8
    ) == (int8 != 'none')
    stream = swin.make(cfg, world.cfg.scheduler, world.denoise)
    latents = np.random.default_rng(0).normal(size=(1, cfg.frames, 4, 6, 4)).astype('float32')

    @jax.jit
    def play(params):
        cond = swin.Cond(
            latents,
            world.embed_ids(params, world.tokenize(['A road.'])),
            world.embed_controls(params),
            np.full([1, cfg.known_controls], 3),
            world.embed_ids(params, world.empty_ids),
        )
        carry = stream.init(params, cond, jax.random.key(0))
        return rollout(stream, params, carry, np.array([[[0, 1]], [[2, 8]]]))[1]

    made = play(params)
    assert np.isfinite(made).all() and np.std(made) > 0.1


def test_the_folder_decides_the_sizes(tiny):
    wrong = dataclasses.replace(
        RUN.world, dit=dataclasses.replace(RUN.world.dit, layers=9, dtype='bfloat16')
    )
    cfg = worlds.describe(wrong, tiny).cfg
    assert (cfg.dit.layers, cfg.dit.dtype) == (4, 'bfloat16')
    assert cfg == dataclasses.replace(
        RUN.world, dit=dataclasses.replace(RUN.world.dit, dtype='bfloat16')
    )


def test_an_autoencoder_in_half_precision_takes_weights_in_full(tiny, tmp_path):
    world, stored = worlds.open_run(dataclasses.replace(RUN, weights=str(tiny)))
    folder = tmp_path / 'full'
    world.with_tokenizers(None).save(folder, stored, dtype=None)
    half = recipes.load(
        'the_matrix:TINY',
        [
            '--world.dit.dtype',
            'bfloat16',
            '--world.vae.dtype',
            'bfloat16',
            '--weights',
            str(folder),
        ],
    )
    world, params = worlds.open_run(half)
    assert world.cfg.vae.dtype == 'bfloat16'
    assert {leaf.dtype for leaf in jax.tree.leaves(params['vae'])} == {np.dtype('float32')}
    frames = np.zeros((1, 1, 32, 48, 3), np.uint8)
    made = jax.eval_shape(world.encode_frames, params, frames)
    assert made.dtype == 'float32' and made.shape == (1, 1, 4, 6, 4)
    cache, shown = jax.eval_shape(world.decoder().prefill, params, made)
    assert shown.dtype == 'uint8'
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cache)} == {'bfloat16'}


def test_a_published_folder_takes_its_control_encoder_from_elsewhere(tiny, tmp_path):
    folder, clip = tmp_path / 'stage', tmp_path / 'clip'
    shutil.copytree(tiny, folder)
    shutil.move(folder / 'control_encoder', clip)
    for path in (folder / 'control_tokenizer').iterdir():
        shutil.move(path, clip)
    (folder / 'control_tokenizer').rmdir()
    cfg = dataclasses.replace(RUN.world, control_weights=str(clip))
    run = dataclasses.replace(RUN, world=cfg, weights=str(folder))
    world, params = worlds.open_run(run)
    whole, expected = worlds.open_run(dataclasses.replace(RUN, weights=str(tiny)))
    np.testing.assert_array_equal(world.control_ids, whole.control_ids)
    np.testing.assert_array_equal(
        params['control_encoder']['projection']['kernel'],
        expected['control_encoder']['projection']['kernel'],
    )
    lost = dataclasses.replace(cfg, control_weights=str(tmp_path / 'nowhere'))
    with pytest.raises(CheckpointError, match='nowhere'):
        worlds.open_run(dataclasses.replace(run, world=lost))


def test_prompts_are_cut_and_padded_to_the_length_of_the_model():
    world = worlds.build(RUN.world).with_tokenizers(None)
    ids, cut = world.tokenize_and_cut(['A car', 'A car drives on'])
    assert ids.shape == (2, 12) and ids.dtype == np.int32
    assert cut == ('', 's on') and (ids[0, 6:] == 0).all()
    assert world.control_ids.shape[0] == len(SYMBOLS) + 1
    assert world.replace(height=64).tokenizer is world.tokenizer


@pytest.mark.parametrize(
    'fields, said',
    [
        (dict(height=33), 'got 33x48 pixels'),
        (dict(fps=0), 'world.fps: got 0'),
        (dict(decode_chunk=3), 'world.decode_chunk: got 3'),
    ],
)
def test_invalid_sizes_raise(fields, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(RUN.world, **fields)
