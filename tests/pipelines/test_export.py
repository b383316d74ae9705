"""Programs in files make the frames of the stream that they were written from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import UsageError
from matrix_jax.pipelines import export
from tests.cli.command import run

pytest.importorskip('flatbuffers')


def test_exported_programs_make_the_same_frames(tiny, tmp_path, capsys):
    out = tmp_path / 'programs'
    assert run('convert', '--export', 'the_matrix:TINY', '--weights', tiny, out) == 0
    assert 'condition, init, prefill, step of the_matrix:TINY' in capsys.readouterr().out
    recipe = dataclasses.replace(recipes.load('the_matrix:TINY'), weights=str(tiny))
    world, params = worlds.open_run(recipe)
    stream = world.stream()
    frames = np.full((world.start_frames, world.cfg.height, world.cfg.width, 3), 90, np.uint8)
    inputs, _ = world.inputs('snow', frames)
    controls = world.vocabulary.encode(['DL'] * world.cfg.stream.controls_per_step)[None]

    def play(condition, init, step, **_):
        cond = jax.jit(condition)(params, *inputs)
        carry = jax.jit(init)(params, cond, np.array([[0, 7]], np.uint32))
        compiled, made = jax.jit(step), []
        for _ in range(3):
            carry, shown = compiled(params, carry, controls)
            made.append(np.asarray(shown))
        return np.stack(made)

    wanted = play(world.condition, stream.init, stream.step)
    np.testing.assert_array_equal(play(**export.load(out)), wanted)

    with pytest.raises(UsageError, match='is there already'):
        export.save(recipe, out)
    index = json.loads((out / export.INDEX).read_text())
    (out / export.INDEX).write_text(json.dumps(index | {'types': ['os:environ']}))
    with pytest.raises(UsageError, match='os:environ: not a class of this package'):
        export.load(out)
    with pytest.raises(UsageError, match='makes whole clips'):
        export.save(recipes.load('the_matrix:STAGE2'), tmp_path / 'other')
