"""Stages 1 and 2: what trains, at which levels, and what their runs leave behind."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import config, recipes, worlds
from matrix_jax.diffusion import schedules
from matrix_jax.encoders import tokenizers
from matrix_jax.nn import lora
from matrix_jax.train import loop
from matrix_jax.train.optim import Optimizer
from matrix_jax.train.whole_clip import ControlSFT, LoRA, WholeClip
from matrix_jax.weights import conversion, converter, diffusers_layout

LORA, CONTROL = (recipes.load(f'the_matrix:{name}') for name in ('TINY_LORA', 'TINY_CONTROL'))
OPTIMIZER = Optimizer(learning_rate=0.01)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A base model as released: no control blocks, no encoder of control prompts; and that one."""
    folder = tmp_path_factory.mktemp('base')
    converter.write_random(LORA.world, str(folder / 'base'), seed=0)
    shutil.move(folder / 'base/control_encoder', folder / 'clip')
    tokenizers.write_clip_byte_tokenizer(str(folder / 'clip'))
    return folder / 'base', str(folder / 'clip')


@pytest.fixture(scope='module')
def runs(base, clips, tmp_path_factory, compiled_once):
    """Both stages, one after the other, exported with every bit."""
    out, made, weights = tmp_path_factory.mktemp('runs'), {}, base[0]
    for run in (LORA, CONTROL):
        run = dataclasses.replace(
            run,
            weights=str(weights),
            data=str(clips),
            out=str(out / run.name[11:]),
            world=dataclasses.replace(run.world, control_weights=base[1], mirror=False),
            stage=dataclasses.replace(run.stage, optimizer=OPTIMIZER, ema=0.0, export='float32'),
        )
        world, params = worlds.start(run)
        assert loop.fit(run, world, params)['step'] == 2
        weights = out / run.name[11:] / 'weights'
        made[run.name] = run, world, params, weights
    return made


def transformer(folder):
    return dict(diffusers_layout.read_component(folder, 'transformer')[1])


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_stage_1_leaves_the_merged_model_and_its_adapter(base, runs):
    run, world, _, weights = runs['the_matrix:TINY_LORA']
    before, after = transformer(base[0]), transformer(weights)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {
        f'transformer_blocks.{i}.attn1.{name}.weight'
        for i in range(4)
        for name in ('to_q', 'to_k', 'to_v', 'to_out.0')
    }
    assert names(weights) == names(base[0]) | {lora.FILE}  # the control encoder stays borrowed
    # The base with the file merged at the door is the exported model.
    whole = worlds.open_run(dataclasses.replace(run, weights=str(weights)))[1]
    adapted = worlds.open_run(dataclasses.replace(run, lora=str(weights)))[1]
    jax.tree.map(np.testing.assert_array_equal, adapted, whole)
    half = worlds.open_run(dataclasses.replace(run, lora=str(weights / lora.FILE), lora_scale=0.5))[
        1
    ]
    kernel = 'before/attention/query/kernel'
    first, second, third = (
        conversion.flatten(tree['transformer'])[kernel]
        for tree in (worlds.open_run(run)[1], half, whole)
    )
    np.testing.assert_allclose(second, (first + third) / 2, rtol=1e-5, atol=1e-7)


def test_stage_2_starts_as_the_model_it_steers(runs):
    _, narrow, _, weights = runs['the_matrix:TINY_LORA']
    _, world, params, _ = runs['the_matrix:TINY_CONTROL']
    assert world.cfg.dit.control and not narrow.cfg.dit.control
    random = np.random.default_rng(0)
    x, text, control = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((1, 2, 4, 6, 4), (1, 12, 16), (1, 2, 16))
    )
    level = np.array([[300, 300]])
    before = jax.jit(narrow.denoise)(
        narrow.load(weights, only=('transformer',)), x, level, text, None
    )
    after = jax.jit(world.denoise)(params, x, level, text, control)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_stage_2_changes_the_control_path_alone(runs):
    weights, result = (runs[f'the_matrix:{name}'][3] for name in ('TINY_LORA', 'TINY_CONTROL'))
    before, after = transformer(weights), transformer(result)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    added = set(after) - set(before)
    assert added and all('control' in name for name in added)
    assert after['control_blocks.0.norm1.linear.weight'].any()  # was zero
    assert names(result) == names(weights) - {lora.FILE}


def test_what_is_exported_in_float32_comes_back_bit_for_bit(runs, tmp_path):
    for run, _, _, weights in runs.values():
        world, params = worlds.start(dataclasses.replace(run, weights=str(weights)))
        world.save(tmp_path / run.name, params, start=weights, dtype='float32')
        for part in ('transformer', 'vae', 'text_encoder'):
            assert all(
                np.array_equal(tensor, again) and tensor.dtype == again.dtype
                for (_, tensor), (_, again) in zip(
                    *(
                        sorted(diffusers_layout.read_component(folder, part)[1].items())
                        for folder in (weights, tmp_path / run.name)
                    ),
                    strict=True,
                )
            )


def test_a_borrowed_encoder_does_not_train(runs):
    run = runs['the_matrix:TINY_CONTROL'][0]
    run = dataclasses.replace(run, stage=ControlSFT(train_encoders=True))
    with pytest.raises(config.UsageError, match='stage.train_encoders: got True'):
        worlds.start(run)


class Stub:
    """A world whose network sees nothing: it predicts v = 0 and notes what it was given."""

    def __init__(self, steered):
        self.cfg = types.SimpleNamespace(dit=types.SimpleNamespace(control=steered))
        self.schedule = schedules.make(schedules.SchedulerConfig())
        self.empty_ids = np.zeros((1, 3), np.int32)

    def embed_ids(self, params, ids):
        return ids

    def embed_controls(self, params):
        return jnp.arange(10.0)[:, None]

    def denoise(self, params, noisy, levels, text, control):
        self.levels, self.text, self.control = levels, text, control
        return jnp.zeros_like(noisy)


def batch(size):
    return {
        'latents': np.zeros((size, 5, 2, 2, 1), np.float16),
        'ids': np.ones((size, 3), np.int32),
        'controls': np.full((size, 5), 4),
    }


def test_a_clip_has_one_level_and_all_its_frames_count():
    world = Stub(steered=True)
    stage = WholeClip(control_dropout=0.3, text_dropout=0.6)
    loss, _ = stage.loss(world, {}, batch(2000), jax.random.key(0))
    levels = np.asarray(world.levels)
    assert levels.shape == (2000, 5) and (levels == levels[:, :1]).all()
    assert levels.min() < 10 and levels.max() > 989
    np.testing.assert_allclose(levels.mean(), 499.5, atol=25)
    # Clean latents are zero, so v is a_t eps, and its square the mean of abar over the levels.
    np.testing.assert_allclose(loss, world.schedule.alphas_cumprod[levels].mean(), rtol=0.05)
    dropped = np.asarray(world.control)[..., 0] == 9
    assert (dropped == dropped[:, :1]).all() and abs(dropped.mean() - 0.3) < 0.05
    assert (np.asarray(world.control)[~dropped] == 4).all()
    assert abs((np.asarray(world.text) == 0).mean() - 0.6) < 0.05


def test_stage_1_sees_no_control():
    stage, world = LoRA(rank=1), Stub(steered=None)
    params = {'transformer': {}, 'lora': {}}
    stage.loss(world, params, batch(4), jax.random.key(0))
    assert world.control is None
    steered = Stub(steered=True)
    stage.loss(steered, params, batch(4), jax.random.key(0))
    assert (np.asarray(steered.control) == 9).all()


def test_what_trains():
    world = worlds.build(CONTROL.world)
    for row in world.tables['transformer']:
        path = f'transformer/{row.path}'
        assert ControlSFT().trainable(path) is ('control' in row.torch)
        assert WholeClip().trainable(path) and not LoRA().trainable(path)
    path = 'control_encoder/projection/kernel'
    assert not ControlSFT().trainable(path) and ControlSFT(train_encoders=True).trainable(path)
    adapter = lora.init(world.tables['transformer'], world.shapes()['transformer'], 2, 2.0, 0)
    paths = conversion.flatten({'lora': adapter})
    assert {path[-1] for path in paths if LoRA().trainable(path)} == {'a', 'b'}
    assert set(paths) <= set(LoRA().axes(world))


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: WholeClip(clip_frames=(65, 64)), 'stage.clip_frames: got 64, expected 1 [+] 4k'),
        (lambda: ControlSFT(control_dropout=2.0), 'stage.control_dropout: got 2'),
        (lambda: LoRA(rank=0), 'stage.rank: got 0'),
        (lambda: LoRA(alpha=-1.0), 'stage.alpha: got -1'),
        (lambda: LoRA(train_encoders=True), 'stage.train_encoders: got True'),
        (lambda: LoRA(labelled=1.5), 'stage.labelled: got 1.5'),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
