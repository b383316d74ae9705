"""Exported programs make what jax makes of the same carry, keys and noise."""

import jax
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.browser import programs, weights
from matrix_jax.config import UsageError

onnxruntime = pytest.importorskip('onnxruntime', reason='needs matrix_jax[web]')
pytest.importorskip('onnx', reason='needs matrix_jax[web]')
TOLERANCE = 1e-4  # of the largest value of a leaf, or of 1
# A whole compilation would take twice as long.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


class Exported:
    """The programs of a world as onnxruntime runs them."""

    def __init__(self, web, folder, bits, names=('start', 'step')):
        store = weights.Store()
        self.made = web.export(bits, store, 'weights.bin', names)
        (folder / 'weights.bin').write_bytes(store.data())
        self.sessions = {}
        for name, one in self.made.items():
            (folder / f'{name}.onnx').write_bytes(one.model.SerializeToString())
            self.sessions[name] = onnxruntime.InferenceSession(folder / f'{name}.onnx')

    def start(self, frames, noise):
        """Returns the carry by name."""
        return self._run('start', {'frames': frames}, noise)

    def step(self, carry, control, noise):
        """Returns (carry, frames)."""
        made = self._run('step', {'control': control, **carry}, noise)
        return carry | {name: made[f'next.{name}'] for name in self.made['step'].changed}, made[
            'frames'
        ]

    def noise(self, name, random):
        return [random.standard_normal(one.shape, np.float32) for one in self.made[name].noise]

    def operators(self):
        return {node.op_type for node in self.made['step'].model.graph.node}

    def _run(self, name, inputs, noise):
        session = self.sessions[name]
        given = {one.name: value for one, value in zip(self.made[name].noise, noise, strict=True)}
        outputs = [one.name for one in session.get_outputs()]
        return dict(zip(outputs, session.run(None, inputs | given), strict=True))


def agree(web, carry, got):
    wanted = dict(zip(web.carry_names(), jax.tree.leaves(carry), strict=True))
    for name, value in got.items():
        scale = max(1, np.abs(np.asarray(wanted[name], np.float64)).max())
        np.testing.assert_allclose(
            value, wanted[name], rtol=0, atol=TOLERANCE * scale, err_msg=name
        )


def both(web, exported, random, step, index, carry, got):
    """Makes a step here and there; returns both carries."""
    world = web.world
    controls = [world.vocabulary.choices[index % len(world.vocabulary.choices)]]
    control = world.vocabulary.encode(controls * world.cfg.stream.controls_per_step)[None]
    noise = exported.noise('step', random)
    carry, wanted = step(web.params, carry, control, noise)
    got, shown = exported.step(got, control, noise)
    agree(web, carry, got)
    assert np.abs(np.asarray(wanted, int) - shown).max() <= 1  # a value may round either way
    return carry, got


def test_driving_starts_and_steps_alike(tmp_path):
    world, params = worlds.open_run(recipes.load('carracing'))
    web = programs.WebWorld(world, params)
    exported, random = Exported(web, tmp_path, 32), np.random.default_rng(0)
    frames = random.integers(0, 256, web.frames.shape, np.uint8)
    noise = exported.noise('start', random)
    start, step = (jax.jit(one, compiler_options=QUICK) for one in (web.start, web.step))
    carry, got = start(params, frames, noise), exported.start(frames, noise)
    agree(web, carry, got)
    for index in range(20):
        carry, got = both(web, exported, random, step, index, carry, got)
    assert {'Gelu', 'LayerNormalization', 'Softmax'} <= exported.operators()


def test_walking_steps_alike(tmp_path):
    """Rounding grows from step to step in this world, so the steps are few."""
    world, params = worlds.open_run(recipes.load('doom'))
    web = programs.WebWorld(world, params)
    exported, random = Exported(web, tmp_path, 32, ['step']), np.random.default_rng(0)

    def filled(leaf):
        drawn = random.standard_normal(leaf.shape, np.float32)
        return drawn if leaf.dtype == np.float32 else np.zeros(leaf.shape, leaf.dtype)

    carry = jax.tree.map(filled, web.carry)
    named = dict(zip(web.carry_names(), jax.tree.leaves(carry), strict=True))
    got = {one.name: named[one.name] for one in exported.made['step'].carry}
    step = jax.jit(web.step, compiler_options=QUICK)
    for index in range(2):
        carry, got = both(web, exported, random, step, index, carry, got)
    assert {'RotaryEmbedding', 'SimplifiedLayerNormalization'} <= exported.operators()


@pytest.mark.parametrize('bits, error', [(32, 0), (16, 2**-11), (8, 0.5 / 127)])
def test_packed_weights_are_near(bits, error):
    kernel = np.random.default_rng(0).uniform(-1, 1, (64, 32)).astype(np.float32)
    got = weights.unpack(weights.pack(kernel, bits))
    assert np.abs(got - kernel).max() <= 1.01 * error
    coarse = kernel.astype('bfloat16').astype(np.float32)
    if bits == 16:
        np.testing.assert_array_equal(weights.unpack(weights.pack(coarse, 16)), coarse)


def test_worlds_too_large_are_refused(tmp_path):
    from matrix_jax.browser import folder

    world = worlds.build(recipes.load('the_matrix:STAGE4').world)
    with pytest.raises(UsageError, match='million parameters, expected at most 64 million'):
        folder._check_size('the_matrix:STAGE4', world)
