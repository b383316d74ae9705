"""A world as an iterator of frames, driven by a list of controls or by a function of the frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from matrix_jax import config, recipes, video
from matrix_jax.serve.runtime import batched_stream, session_log, start_frames

Policy = Callable[[np.ndarray], str | None]


def live_frames(
    recipe: str | config.Run = recipes.DEFAULT_WORLD,
    actions: Iterable[str] | Policy = (),
    *,
    prompt: str | None = None,
    image: str | Path | np.ndarray | None = None,
    start: str | None = None,
    weights: str | None = None,
    seed: int = 42,
    control_binding: str = 'early',
    opened: tuple | None = None,
) -> Iterator[np.ndarray]:
    """Yields the frames of each step, uint8 [F H W 3], for as long as there are controls.

        for frames in live_frames('carracing', ['D'] * 8 + ['DL'] * 4, prompt='snow'): ...
        for frames in live_frames('doom', lambda seen: 'W' if seen.mean() > 90 else None): ...

    The arguments are checked, and the programs compiled, before this returns.

    Args:
      recipe: 'world:RECIPE', or a `config.Run`.
      actions: controls of the world's vocabulary, one per step; or a function of the newest frames
        [F H W 3] that returns the next control, or None at the end. Its first frames are those that
        the stream continues.
      prompt: text; the world's own by default.
      image: file or uint8 [H W 3] to start from.
      start: name of a start clip; one that fits the prompt by default.
      weights: as of `load`.
      seed: seed of all noise.
      control_binding: 'early' shows controls sooner; 'late' is as published.
      opened: result of `batched_stream.open_stream`, instead of recipe and weights, so that several
        calls compile once.

    Raises:
      UsageError, ControlError: an argument cannot be used.
    """
    if image is not None and start is not None:
        raise config.UsageError('image and start: got both, expected one start')
    if prompt is not None and not session_log.is_text(prompt):
        raise config.UsageError(
            f'prompt: expected text of at most {session_log.MAX_PROMPT} characters'
        )
    if not 0 <= seed <= session_log.MAX_SEED:
        raise config.UsageError(f'seed: got {seed}, expected 0 to {session_log.MAX_SEED}')
    if opened is None:
        run = recipe if isinstance(recipe, config.Run) else recipes.load(recipe)
        run = dataclasses.replace(run, weights=weights or run.weights)
        with config.usage_errors():
            opened = batched_stream.open_stream(run, 1, control_binding)
    stream, folder = opened[0].empty_copy(), opened[1]
    world = stream.world
    prompt, chosen = start_frames.choose(world, folder, prompt, start)
    if image is None:
        clip = start_frames.load_clip(world, folder, chosen)
    else:
        picture = image if isinstance(image, np.ndarray) else video.read_image(image)
        clip = np.repeat(world.fit(picture[None]), stream.start_frames, 0)
    stream.write(0, stream.init(stream.condition(prompt, clip)[0], seed))
    shown = 1 + (world.cfg.stream.context - 1) * world.vocabulary.frames_per_control
    seen = clip[np.maximum(np.arange(shown - stream.frames_per_step, shown), 0)]
    if callable(actions):
        return _steps(stream, actions, seen)
    rest = iter(actions)
    return _steps(stream, lambda _: next(rest, None), seen)


def _steps(stream: batched_stream.BatchedStream, policy: Policy, seen: np.ndarray):
    """Yields the frames of each step."""
    active = np.arange(stream.num_slots) == 0
    while (control := policy(seen)) is not None:
        control = stream.world.vocabulary.canonical(control)
        controls = np.repeat(stream.encode(control)[None], stream.num_slots, axis=0)
        frames, finite = stream.step(controls, active)
        seen = np.asarray(frames)[0]
        if not np.asarray(finite)[0]:
            raise FloatingPointError('the world broke: a number is not finite')
        yield seen
