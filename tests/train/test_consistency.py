"""train/consistency.py: the jump that is learned is the one that the sampler makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.diffusion import schedules, solvers
from matrix_jax.stream import swin
from matrix_jax.train.consistency import StreamConsistency, tables

SCHEDULER = schedules.SchedulerConfig()
STREAM = swin.Config(groups=4, group_frames=2, context=3, steps=4, solver='lcm')


def test_points_of_a_shift_end_at_the_phase_boundaries():
    table = tables(STREAM, SCHEDULER, points=5, balance=0.5)
    np.testing.assert_array_equal(
        table.levels[0], [0] * 3 + [249] * 2 + [499] * 2 + [749] * 2 + [999] * 2
    )
    np.testing.assert_array_equal(table.levels[-1, 3::2], [49, 299, 549, 799])
    plan = swin.shift_table(STREAM, SCHEDULER).plan
    # Where the few-step sampler lands, the target of the teacher's last step lies as well.
    np.testing.assert_allclose(table.skip[0], plan.keep[0], rtol=1e-6)
    np.testing.assert_allclose(table.out[0], plan.clean[0], rtol=1e-6)


def test_a_perfect_network_jumps_where_many_small_steps_go():
    """With v exact for one known clean clip, the flow is a straight mix: both ways must agree."""
    table = tables(STREAM, SCHEDULER, points=5, balance=1.0)
    keys = jax.random.split(jax.random.key(0), 2)
    clean, noise = (jax.random.normal(key, (1, 8, 2, 2, 1)) for key in keys)
    schedule = schedules.make(SCHEDULER)
    x = start = schedules.add_noise(schedule, clean, noise, jnp.asarray(table.levels[:1, 3:]))
    for i in range(5):
        row = solvers.SolverTable(*(column[i] for column in table.plan))
        v = schedules.velocity(schedule, clean, noise, jnp.asarray(table.levels[i : i + 1, 3:]))
        x = solvers.step(row, solvers.init(x), x, v)[1]
    jump = table.skip[0][:, None, None, None] * start + table.out[0][:, None, None, None] * clean
    np.testing.assert_allclose(x, jump, atol=1e-5)


def test_weights_balance_the_groups():
    plain = tables(STREAM, SCHEDULER, 5, balance=0.0).weights
    np.testing.assert_allclose(plain, 1)
    even = tables(STREAM, SCHEDULER, 5, balance=1.0)
    products = even.weights * even.out[0] ** 2
    np.testing.assert_allclose(products, products[0], rtol=1e-5)


@pytest.fixture(scope='module')
def tiny():
    run = recipes.load('the_matrix:TINY_CONSISTENCY')
    net = run.world.dit  # layers that are all alike compile in half the time
    net = dataclasses.replace(
        net, layers=2, control=dataclasses.replace(net.control, start=0, end=2)
    )
    world, params = worlds.start(
        dataclasses.replace(run, world=dataclasses.replace(run.world, dit=net))
    )
    noisy = np.random.default_rng(0)
    params['transformer'] = jax.tree.map(
        lambda leaf: leaf + 0.1 * noisy.normal(size=leaf.shape).astype(np.float32),
        params['transformer'],
    )
    cfg = world.cfg
    frames = cfg.stream.frames + 2
    batch = {
        'latents': noisy.normal(size=(2, frames, 4, 6, 4)).astype(np.float16),
        'controls': noisy.integers(0, 9, (2, frames)).astype(np.int32),
        'ids': world.tokenize(['a', 'b']),
    }
    return world, params, batch


@pytest.mark.parametrize(
    'stage',
    [
        StreamConsistency(points=2),
        StreamConsistency(points=2, rollout=2, rollout_share=1.0),
        StreamConsistency(points=2, guidance=3.0),
        StreamConsistency(objective='window', points=2),
    ],
    ids=['shift', 'rollout', 'guided', 'window'],
)
def test_only_the_student_learns(tiny, stage):
    world, params, batch = tiny
    params = stage.start(world, params, 0)
    learned = {name: params.pop(name) for name in ('transformer', 'teacher')}
    grads, metrics = jax.jit(
        jax.grad(
            lambda learned: stage.loss(world, {**params, **learned}, batch, jax.random.key(1)),
            has_aux=True,
        )
    )(learned)
    sizes = {
        name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(part))
        for name, part in grads.items()
    }
    assert sizes['transformer'] > 1e-3
    assert sizes['teacher'] == 0
    assert all(np.isfinite(value) and value > 0 for value in metrics.values())


def test_a_teacher_of_one_step_is_matched_from_the_start(tiny):
    world, params, batch = tiny
    stage = StreamConsistency(points=1)
    loss, _ = jax.jit(lambda p: stage.loss(world, p, batch, jax.random.key(1)))(
        stage.start(world, params, 0)
    )
    assert 0 <= float(loss) < 1e-9


@pytest.mark.parametrize(
    'fields, said',
    [
        (dict(objective='x'), "stage.objective: got 'x'"),
        (dict(points=0), 'stage.points: got 0'),
        (dict(guidance=101), 'stage.guidance: got 101'),
        (dict(balance=2), 'stage.balance: got 2'),
        (dict(objective='window', rollout=1), 'stage.rollout: got 1'),
        (dict(control_guidance=-1), 'stage.control_guidance: got -1'),
    ],
)
def test_wrong_settings_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        StreamConsistency(**fields)
