"""Clocks and latency, on programs whose answer is known."""

import types

import numpy as np
import pytest

from matrix_jax.benchmark import measure, report
from matrix_jax.benchmark import target as targets
from matrix_jax.controls import driving
from matrix_jax.stream import causal, swin

FRAMES = 2
OTHER = driving.SYMBOLS.index('DL')


class Delayed:
    """A stream whose frames show a key `delay` steps later, at their second frame, and faintly
    one step before."""

    def __init__(self, delay, noise=0):
        self.delay, self.noise, self.calls = delay, noise, 0

    def start(self):
        return ()

    def __call__(self, carry, key):
        self.calls += 1
        carry += (float(key[0, 0] == OTHER),)
        frames = np.zeros((1, FRAMES, 4, 4, 3), np.uint8) + (self.calls % 2) * self.noise

        def pressed(back):
            return carry[-back] if len(carry) >= back else 0

        frames[:, 1, 0, 0, 0] += np.uint8(9 * pressed(self.delay - 1))
        frames[:, 1] += np.uint8(60 * pressed(self.delay))
        return carry, frames


def example(groups=4, warmup_steps=0):
    cfg = types.SimpleNamespace(stream=swin.Config(groups=groups, group_frames=1, steps=groups))
    world = types.SimpleNamespace(
        cfg=cfg, vocabulary=driving.DrivingVocabulary(), warmup_steps=warmup_steps
    )
    return targets.Target('x', world, {}, None, None, None, True)


def test_latency_names_the_first_frame_that_differs():
    found = measure.latency(example(), Delayed(3))
    assert found['noise'] == 0
    assert (found['changed']['steps'], found['changed']['frame']) == (2, 1)
    assert (found['visible']['steps'], found['visible']['frame']) == (3, 1)
    assert 0 < found['changed']['ms'] <= found['visible']['ms']


def test_what_two_equal_runs_differ_by_is_no_change():
    found = measure.latency(example(groups=4), Delayed(3, noise=20))  # nine calls per run
    assert found['noise'] == 20
    assert found['changed']['steps'] == 3


def test_a_key_waits_until_all_steps_are_alike():
    class Counted(Delayed):
        def __call__(self, carry, key):
            made = super().__call__(carry, key)
            pressed.append(key[0, 0] == OTHER)
            return made

    pressed = []
    found = measure.latency(example(warmup_steps=7), Counted(3))
    assert pressed.index(True) % len(pressed[: len(pressed) // 3]) == measure.SETTLE + 7
    assert (found['visible']['steps'], found['visible']['frame']) == (3, 1)


def test_entries_are_those_of_the_stream():
    few = swin.Config(groups=2)  # whose head would be its group 2
    assert (
        measure.control_bindings(few, None) == ['late'] and measure.control_bindings(few, ()) == []
    )
    assert measure.control_bindings(swin.Config(), None) == ['late', 'early']
    assert measure.control_bindings(causal.Config(), ('tail', 'head')) == ['block']
    with pytest.raises(ValueError, match='--entries head: stream.head_group: got 2'):
        measure.control_bindings(few, ('head',))


def test_a_key_without_effect_is_never_seen():
    found = measure.latency(example(), Delayed(99))
    assert found['changed'] is None and found['visible'] is None


def test_intervals_leave_the_warm_up_out():
    given = []

    def program(carry):
        given.append(carry)
        return carry + 1, np.zeros(1)

    program.start = lambda: 0
    seconds = measure.intervals(program, measure.Settings(steps=5, warmup=2))
    assert seconds.shape == (5,) and (seconds >= 0).all()
    assert given == list(range(8))
    # Nor do steps count whose caches are still warmup_steps.
    assert measure.intervals(program, measure.Settings(steps=5, warmup=2), 3).shape == (5,)
    assert given[8:] == list(range(11))


def test_figures_of_a_part():
    settings = measure.Settings(peak_tflops=2.0)
    found = report.speed(np.array([0.1, 0.3, 0.1, 0.3]), 8, 4e11, 2, settings)
    assert found['fps'] == pytest.approx(40)
    assert found['p50_ms'] == pytest.approx(200) and found['jitter_ms'] == pytest.approx(200)
    assert found['tflops'] == pytest.approx(2) and found['peak_share'] == pytest.approx(0.5)


@pytest.mark.parametrize(
    'fields, said',
    [
        ({'steps': 0}, '--steps: got 0'),
        ({'warmup': 0}, '--warmup: got 0'),
        ({'entries': ('middle',)}, "--entries: got 'middle'"),
        ({'peak_tflops': 0.0}, '--peak-tflops: got 0.0'),
        ({'seed': -1}, '--seed: got -1'),
    ],
)
def test_settings_are_checked(fields, said):
    with pytest.raises(ValueError, match=said):
        measure.Settings(**fields)
