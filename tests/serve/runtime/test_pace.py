"""When steps start and frames are due."""

import asyncio

import pytest

from matrix_jax.serve.runtime.pace import Pace
from matrix_jax.serve.runtime.session import Session
from matrix_jax.serve.runtime.slot_state import EncodedFrame
from matrix_jax.serve.web.metrics import Metrics


def steady(seconds=0.07, **fields):
    """A pace after 40 steps of equal length, and the time."""
    pace, now = Pace(0.25, **fields), 0.0
    for _ in range(40):
        now = max(now, now + pace.wait(now)) + seconds
        pace.collect(now - seconds, now)
    return pace, now


def test_a_steady_step_starts_just_in_time():
    pace, now = steady()
    assert pace.lead == pytest.approx(0.07 + pace.margin, abs=1e-3)
    assert pace.wait(now) == pytest.approx(pace.due - pace.lead - now)
    assert pace.spacing == 0.25 and pace.steps == 40


def test_steps_of_various_lengths_start_earlier_but_not_more_than_before():
    pace, now = Pace(0.25), 0.0
    for index in range(40):
        seconds = 0.04 + 0.06 * (index % 2)
        now += seconds
        pace.collect(now - seconds, now)
    assert pace.seconds + pace.margin < pace.lead <= 1.15 * pace.seconds + 0.02
    pace.spreads = float('inf')
    assert pace.lead == pytest.approx(1.15 * pace.seconds + 0.02)


def test_a_key_halves_the_time_to_the_next_frames():
    pace, _ = steady()
    now = pace.due - 0.24
    assert pace.hurry(now) == pytest.approx(0.5) and pace.due == pytest.approx(now + 0.12)
    # A step needs its time, whatever the player does.
    assert pace.hurry(now) == pytest.approx(pace.lead / 0.12)
    assert pace.hurry(now) == 1 and pace.wait(now) == pytest.approx(0)
    still, _ = steady(most_hurry=1.0)
    assert still.hurry(still.due - 0.24) == pytest.approx(1)


def test_frames_that_wait_are_shown_faster_and_in_order():
    async def run():
        player = Session(asyncio.get_running_loop(), 16, Metrics(), 'token', 4)
        player.socket = object()
        player.deliver([EncodedFrame(10 + index / 16, index, 0, b'') for index in range(4)])
        player.hurry(10.0, 0.5)
        await asyncio.sleep(0)
        return [frame.due for frame in player._frames]

    assert asyncio.run(run()) == [10 + index / 32 for index in range(4)]
