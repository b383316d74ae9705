"""Clips from videos whose frames have recorded actions, at the frame rate of a world.

A recording has keys, turns of the view, poses or driving controls for each frame of a video, at the
video's own rate. `clips` takes the frames that a player shows at the times of the clip, and sums up
what was pressed and how far the view turned since the frame before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from matrix_jax import video
from matrix_jax.controls import driving
from matrix_jax.data import footage, records
from matrix_jax.data.ingest import IngestError, IngestReport, VideoSource, clip

FASTEST = 2  # how many times as fast as its video a clip may be: every frame is shown twice


@dataclass(frozen=True)
class FrameActions:
    """What is known of the N frames of a video; None where nothing is.

    Attributes:
      times: float64 [N], ascending, in seconds.
      keyboard: bool [N 4], `records.KEYS` held while each frame was made.
      turns: float64 [N 2], degrees that the view turned up and to the right since the frame before.
      pose: float32 [N 6], `records.POSE`.
      controls: int8 [N], driving controls held while each frame was made.
      usable: bool [N]; clips have usable frames only. None = all are.
      captions: (first frame, end, text) of parts of the video; frames outside of all parts have the
        caption of the source.
    """

    times: np.ndarray
    keyboard: np.ndarray | None = None
    turns: np.ndarray | None = None
    pose: np.ndarray | None = None
    controls: np.ndarray | None = None
    usable: np.ndarray | None = None
    captions: tuple[tuple[int, int, str], ...] = field(default=())


def check_rate(rate: float, fps: float, what: Any):
    """Raises IngestError if a video has too few frames per second for clips of `fps`."""
    if rate < fps / FASTEST:
        raise IngestError(
            f'{what}: got {rate:g} frames per second, expected at least {fps / FASTEST:g}'
        )


def sample(times: np.ndarray, fps: float) -> np.ndarray:
    """Indices [F] of the frames that a player shows every 1 / fps seconds.

    Args:
      times: ascending times of the frames, in seconds.
      fps: frames per second of the clip.
    """
    count = int(np.floor((times[-1] - times[0]) * fps + 1e-6)) + 1
    return video.shown_at(times - times[0], np.arange(count) / fps)


def clips(
    frames: Iterator[np.ndarray],
    chosen: np.ndarray,
    actions: FrameActions,
    settings: Any,
    source: VideoSource,
    report: IngestReport,
) -> Iterator[records.Clip]:
    """Yields the clips of one recording; `report` counts those that are too short.

    Args:
      frames: the chosen frames, uint8 [H W 3] each, of any size.
      chosen: indices [F] of these frames in the recording (`sample`).
      actions: what is known of all frames of the recording.
      settings: a reader with height, width, fps and `shortest` frames of a clip.
      source: where the recording comes from.
      report: counts.
    """
    numbered = enumerate(frames)
    for first, end, caption in _spans(chosen, actions):
        for start, stop in footage.pieces([(first, end)]):
            if stop - start < settings.shortest:
                report.dropped['short'] += 1
                continue
            kept = []
            for index, frame in numbered:
                if index >= start:
                    kept.append(video.fit(frame[None], settings.height, settings.width)[0])
                if index == stop - 1:
                    break
            if len(kept) < stop - start:
                raise IngestError(f'{source.name}: has fewer frames than actions')
            known = _sampled(actions, chosen, start, stop, settings.fps)
            yield clip(kept, settings, source, caption=caption, **known)


def _spans(chosen: np.ndarray, actions: FrameActions) -> Iterator[tuple[int, int, str | None]]:
    """Yields (first, end, caption) of runs of chosen frames that are usable and of one caption."""
    part = np.full(len(actions.times), -1)
    for number, (first, end, _) in enumerate(actions.captions):
        part[first:end] = number
    bad = np.zeros(len(part), bool) if actions.usable is None else ~actions.usable
    part[bad] = -2
    state = part[chosen]
    # A frame that is left out between two chosen ones still acts on the second one.
    state[_sums(bad[:, None], _since(chosen), chosen)[:, 0] > 0] = -2
    edges = np.flatnonzero(np.diff(state)) + 1
    for first, end in pairwise([0, *edges.tolist(), len(state)]):
        if state[first] != -2:
            number = state[first]
            yield first, end, actions.captions[number][2] if number >= 0 else None


def _sampled(
    actions: FrameActions, chosen: np.ndarray, start: int, stop: int, fps: float
) -> dict[str, np.ndarray]:
    """Controls and actions of the chosen frames `start` to `stop`, as fields of a clip."""
    known = records.unknown(stop - start)
    first, last = _since(chosen)[start:stop], chosen[start:stop]
    if actions.keyboard is not None:
        held = _sums(actions.keyboard, first, last) * 2 >= (last - first + 1)[:, None]
        known['keyboard'] = held.astype(np.int8)
    if actions.turns is not None:
        again = np.diff(chosen, prepend=-1)[start:stop] == 0  # the same frame as before
        turned = np.where(again[:, None], 0, _sums(actions.turns, first, last))
        with np.errstate(over='ignore'):  # `records.Clip` refuses what is not finite
            known['mouse'] = (turned * fps / records.MOUSE_RATE).astype(np.float32)
    if actions.pose is not None:
        known['pose'] = actions.pose[last].astype(np.float32)
    if actions.controls is not None:
        every = records.FRAMES_PER_LATENT
        held = actions.controls[last[::every]]
        known['controls'] = np.concatenate([held[:1], np.repeat(held[1:], every)]).astype(np.int8)
    return known


def _since(chosen: np.ndarray) -> np.ndarray:
    """First frames [F] of the recording whose actions lead to each of the chosen frames [F]."""
    before = np.concatenate([chosen[:1] - 1, chosen[:-1]])
    return np.minimum(before + 1, chosen)


def _sums(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Sums of values[first] to values[last], float64 [F D]; a single value stays exact."""
    totals = np.concatenate(
        [np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=float)]
    )
    several = totals[last + 1] - totals[first]
    return np.where((first == last)[:, None], values[last].astype(float), several)


def delayed(values: np.ndarray, offset: int) -> np.ndarray:
    """Values [N ...] at the frames `offset` later; the first ones repeat."""
    return values[np.maximum(np.arange(len(values)) - offset, 0)]


def driving_controls(
    forward: np.ndarray, back: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Driving controls int8 [N] of four keys [N] each; opposite keys cancel each other."""
    ahead = forward.astype(int) - back
    aside = right.astype(int) - left
    names = np.array([['BL', 'B', 'BR'], ['NL', 'N', 'NR'], ['DL', 'D', 'DR']])
    numbers = np.array([[driving.SYMBOLS.index(name) for name in row] for row in names], np.int8)
    return numbers[ahead + 1, aside + 1]
