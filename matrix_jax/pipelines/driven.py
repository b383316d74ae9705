"""Videos that drive themselves: the frame-only driver of `evals.driver` chooses the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.data.carracing import HEIGHT, THEMES, WIDTH
from matrix_jax.evals import driver
from matrix_jax.pipelines.stream_runner import StreamRunner
from matrix_jax.worlds.protocols import World

NAME = 'driver'  # as a control of `matrix-jax generate`
SPEED = 18.0  # units/s that the driver keeps


def can_drive(world: World) -> bool:
    """Whether the driver knows the pictures of a world: CarRacing, with one control per step."""
    cfg = world.cfg
    return (
        world.evaluator == 'carracing'
        and cfg.clip is None
        and (cfg.height, cfg.width) == (HEIGHT, WIDTH)
        and cfg.stream.controls_per_step == 1
    )


def choose_control(world: World, control: str | None) -> str | None:
    """What a control of the command line means for a world.

    Args:
      control: 'driver', 'random', controls as text, or None for the driver where it can drive.

    Returns:
      'driver', controls as text, or None for random controls.

    Raises:
      UsageError: 'driver' for a world that the driver does not know.
    """
    if control is None:
        return NAME if can_drive(world) else None
    if control == NAME and not can_drive(world):
        raise UsageError(
            f'--control: got {NAME}, expected controls or random: the driver knows only streams '
            f'of CarRacing ({HEIGHT}x{WIDTH})'
        )
    return None if control == 'random' else control


def theme(frame: np.ndarray) -> str:
    """The theme of CarRacing whose colours fit a frame uint8 [H W 3] best."""
    return max(THEMES, key=lambda name: float(driver.palette_match(frame, name)))


def drive(
    runner: StreamRunner, carry: Any, start: np.ndarray, known: list[str], controls: list[str]
) -> Iterator[np.ndarray]:
    """Yields frames uint8 [F H W 3] of each step, and writes the keys that show into `controls`.

    Args:
      runner: the stream, compiled, with early control binding.
      carry: where it starts.
      start: start frames uint8 [F H W 3].
      known: controls that the start was made with.
      controls: one entry per step; entry i is replaced before the frames of step i are yielded.
    """
    stream = runner.world.cfg.stream.with_control_binding('early')
    first, lag = stream.context, stream.binding_slot - stream.context
    view = start[runner.world.vocabulary.frames_per_control * (first - 1)]
    cfg = driver.Config(lag=lag, cruise=SPEED)
    pilot = driver.FrameDriver(cfg, theme(view), known[first : first + lag], SPEED)
    pressed = known[first : first + lag]
    for index in range(len(controls)):
        pressed.append(pilot.key(view))
        controls[index] = pressed[index]
        carry, frames = runner.step(carry, pressed[-1:])
        shown = np.asarray(frames)[0]
        view = shown[-1]
        yield shown
