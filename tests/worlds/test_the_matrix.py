import dataclasses
import shutil

import numpy as np
import pytest

from matrix_jax import config, worlds
from matrix_jax.checkpoint import CheckpointError
from matrix_jax.controls import SYMBOLS

RUN = config.load('the_matrix:TINY')


def test_the_folder_decides_the_sizes(tiny):
    wrong = dataclasses.replace(RUN.world, dit=dataclasses.replace(RUN.world.dit, layers=9,
                                                                   dtype='bfloat16'))
    cfg = worlds.describe(wrong, tiny).cfg
    assert (cfg.dit.layers, cfg.dit.dtype) == (4, 'bfloat16')
    assert cfg == dataclasses.replace(RUN.world, dit=dataclasses.replace(RUN.world.dit,
                                                                         dtype='bfloat16'))


def test_a_released_folder_borrows_its_control_encoder(tiny, tmp_path):
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
    np.testing.assert_array_equal(params['control_encoder']['projection']['kernel'],
                                  expected['control_encoder']['projection']['kernel'])
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


@pytest.mark.parametrize('fields, said', [
    (dict(height=33), 'got 33x48 pixels'), (dict(fps=0), 'world.fps: got 0'),
    (dict(decode_chunk=3), 'world.decode_chunk: got 3')])
def test_wrong_sizes_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(RUN.world, **fields)
