import numpy as np
import pytest

from matrix_jax.diffusion import schedules, solvers
from matrix_jax.diffusion.schedules import SchedulerConfig

CFG = SchedulerConfig()
ABAR = schedules.alphas_cumprod(CFG)


def run(plan, x, x0, noise):
    """Runs a solver on a network that predicts the true x0."""
    history = solvers.init(x)
    for index in range(len(plan.keep)):
        row = solvers.SolverTable(*(column[index] for column in plan))
        signal, sigma = row.signal[..., None, None, None], row.sigma[..., None, None, None]
        v = (signal * x - x0) / sigma
        history, x = solvers.step(row, history, x, v, noise)
    return x


@pytest.mark.parametrize('solver', ['ddim', 'dpm'])
@pytest.mark.parametrize('steps', [1, 5, 50])
def test_a_perfect_network_is_solved_exactly(solver, steps):
    plan = solvers.make(solver, CFG, schedules.timesteps(CFG, steps)[:, None], steps)
    assert all(np.isfinite(column).all() for column in plan)
    assert plan.noisy == (solver == 'dpm' and steps > 1)
    x, x0, noise = np.random.default_rng(0).normal(size=(3, 1, 2, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(run(plan, x, x0, noise), x0, atol=1e-4)


@pytest.mark.parametrize('level', [25, 499, 999])
def test_one_update_keeps_the_statistics_of_its_level(level):
    """With the true x0, DDIM keeps the noise and DPM redraws it; both reach level t'."""
    ddim = solvers.ddim(ABAR, [level], [level - 25])
    dpm = solvers.dpm(ABAR, [level], [level - 25])
    here, there = ABAR[level], ABAR[level - 25]
    for plan in (ddim, dpm):
        signal = plan.keep * np.sqrt(here) + plan.clean
        np.testing.assert_allclose(signal, np.sqrt(there), atol=1e-6)
        spread = plan.keep**2 * (1 - here) + plan.noise**2
        np.testing.assert_allclose(spread, 1 - there, atol=1e-6)


def test_the_first_and_the_last_row_are_first_order_for_all_frames():
    rows = schedules.grouped(schedules.timesteps(CFG, 20), 4, 2)[:, 1:]
    plan = solvers.make('dpm', CFG, rows, 20)
    assert np.all(plan.past[[0, 4]] == 0)
    assert np.all(plan.past[1, :-2] != 0)
    assert np.all(plan.past[1, -2:] == 0)  # coming from pure noise, r is infinite
    assert np.all(plan.past[2:4] != 0)


def test_consistency_jumps_add_noise_only_inside_a_phase():
    levels = schedules.lcm_timesteps(4, 40)
    assert not solvers.lcm(CFG, levels[None], levels, 4).noisy
    levels = schedules.lcm_timesteps(8, 40)
    rows = schedules.grouped(levels, 4, 1)[:, 1:]
    plan = solvers.lcm(CFG, rows, levels, 4)
    assert np.all(plan.noise[0] > 0) and np.all(plan.noise[1] == 0)


@pytest.mark.parametrize('steps, original, phases', [(4, 50, 4), (8, 50, 4), (4, 40, 8)])
def test_a_jump_over_a_phase_boundary_is_refused(steps, original, phases):
    levels = schedules.lcm_timesteps(steps, original)
    with pytest.raises(ValueError, match=f'jumps over the phase boundary .* {phases} phases'):
        solvers.lcm(CFG, levels[None], levels, phases)


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="got 'euler', expected 'ddim' or 'dpm'"):
        solvers.make('euler', CFG, [[999]], 1)
