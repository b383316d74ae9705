"""Evaluation of worlds with memory: whether a landmark still stands there after a turn.

Streams begin with a picture of a landmark. At set minutes the player turns away from it, waits, and
turns back, three seconds in all. In between the player looks around and walks on the spot, so that
the camera is at its first pose again and again. `similarity` compares the picture after the turn
with the one before it and with the start picture.

The ceiling is that of true frames and the same frames through the autoencoder. The floor is that of
the same network without memory frames. Start pictures of different places give the value of frames
that have nothing in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.data import doom_maps, gallery
from matrix_jax.data.loader import Clips
from matrix_jax.data.records import KEYS, Clip, wrap
from matrix_jax.evals import drift as drifts
from matrix_jax.evals.settings import EvaluationSettings
from matrix_jax.evals.video import Streams, bar, check_clips, sheet, spread

NAME = 'revisit'
TURN = 120.0  # degrees of the turn away from the landmark, in one second
CELL = 8  # pixels per side of the cells whose mean colours are compared
LANDMARK = (150.0, 450.0)  # map units from which a picture in a gallery is seen well
AHEAD = np.deg2rad(12)  # largest angle between the view and a landmark


@dataclasses.dataclass(frozen=True)
class Config(EvaluationSettings):
    """Settings of the evaluation.

    Attributes:
      minutes: when the player turns away and back, besides once at the start.
    """

    streams: int = 4
    minutes: tuple[float, ...] = (1.0, 5.0, 20.0)

    def __post_init__(self):
        object.__setattr__(self, 'minutes', tuple(self.minutes))
        if not self.minutes or sorted(set(self.minutes)) != list(self.minutes):
            raise ValueError(f'minutes: got {self.minutes}, expected ascending numbers')
        if self.minutes[0] < 0.5:
            raise ValueError(f'minutes: got {self.minutes[0]:g}, expected at least 0.5')

    def quick(self) -> Config:
        """Settings of a rough evaluation in a few minutes."""
        return dataclasses.replace(self, minutes=(1.0,), streams=2, clips=3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the player does.

    Attributes:
      actions: one per frame.
      visits: minute -> frames before the turn, away and back again; 0 is the visit at the start.
      returns: frames at which the camera is at its first pose.
    """

    actions: list[str]
    visits: dict[float, tuple[int, int, int]]
    returns: list[int]


def recorded(world, data: str, cfg: Config) -> Clips:
    """Held-out clips.

    Raises:
      UsageError: the world has no memory, or the clips have another size or rate.
    """
    if not getattr(world.cfg.stream, 'reference_offsets', ()):
        raise UsageError(
            'world.stream.reference_offsets: got none, expected a world with memory; its floor '
            'without memory is measured as well'
        )
    clips = Clips(data, 'heldout', cfg.clip_frames, cache=False)
    check_clips(world, clips, data)
    return clips


def shape(world) -> tuple[int, int]:
    """(latent frames of the start picture, latent frames of a step)."""
    return world.cfg.stream.context, world.cfg.stream.step_frames


def recorded_controls(world, clip: Clip, count: int) -> list[str]:
    """The first `count` recorded actions of a clip.

    A stream takes the action with which the next frame is made, see `data.records`.

    Raises:
      UsageError: the clip has too few, or unknown ones.
    """
    if len(clip.frames) <= count or not (clip.knows('keyboard') and clip.knows('mouse')):
        raise UsageError(
            f'--data: got a clip of {len(clip.frames)} frames, expected {count + 1} with known '
            'keys and mouse'
        )
    keys = [
        clip.keyboard[:, KEYS.index(key)] if key in KEYS else np.zeros(len(clip.frames))
        for key in world.vocabulary.mode.keys
    ]
    vectors = np.column_stack([*keys, clip.mouse])[1 : count + 1]
    return world.vocabulary.decode(vectors)


def sections(world, params, data: str, held_out: Clips, rebuilt, cfg: Config, out: Path):
    """Yields (name, results) of each section of the report, and writes its pictures to `out`.

    Args:
      data: folder of recorded clips.
      held_out: from `recorded`.
      rebuilt: some of them after the autoencoder, from `video.rebuild`.
    """
    fps = world.cfg.fps
    chosen = starts(held_out, cfg.streams)
    pictures = np.stack([held_out[clip].frames[frame] for clip, frame in chosen])
    streams = Streams(world, params)
    yield 'speed', speed(streams, pictures[0])
    through = zip((held_out[index] for index in spread(held_out, cfg.clips)), rebuilt, strict=True)
    yield (
        'ceiling',
        {
            'similarity': mean_similarity(
                pair
                for clip, frames in through
                for pair in zip(
                    clip.frames[cfg.clip_frames - len(frames) : cfg.clip_frames : fps],
                    frames[::fps],
                    strict=True,
                )
            ),
            'other_places': mean_similarity(
                (one, other) for one in pictures for other in pictures if one is not other
            ),
        },
    )
    plan = make_plan(world, cfg.minutes)
    without = world.replace(stream=dataclasses.replace(world.cfg.stream, reference_offsets=()))
    for name, one in (('memory', streams), ('no_memory', Streams(without, params))):
        shown = play(one, pictures, plan, cfg.seed, name)
        draw(plan, shown, pictures, out / f'{name}.png')
        yield name, measure(plan, shown, pictures, fps)


# --- what the player does ------------------------------------------------------------------------


def make_plan(world, minutes: Iterable[float]) -> Plan:
    """Plan of a stream; between visits it returns to its first pose every few seconds."""
    fps = world.cfg.fps
    speed = round(TURN / world.cfg.stream.camera.degrees / fps, 4)
    right, left, idle = f'right:{speed}', f'left:{speed}', world.vocabulary.idle
    around = [right] * (3 * fps) + [idle] * fps
    walk = ['W'] * (fps // 2) + ['S'] * (fps // 2) + [idle] * fps
    look = [left] * fps + [idle] * fps + [right] * fps + [idle] * fps
    actions, visits, returns = [idle] * fps, {}, []

    def visit(minute: float):
        out = len(actions)
        actions.extend([right] * fps + [idle] * fps + [left] * fps + [idle] * fps)
        visits[minute] = out, out + fps + fps // 2, len(actions) - 1

    visit(0.0)
    for minute in minutes:
        end, cycle = round(60 * minute * fps), 0
        while len(actions) < end:
            actions += (around, walk, look)[cycle % 3]
            returns.append(len(actions) - 1)
            cycle += 1
        visit(minute)
    missing = world.round_up_controls(len(actions)) - len(actions)
    return Plan(actions + [idle] * missing, visits, returns)


def play(streams: Streams, pictures, plan: Plan, seed: int, name: str) -> dict[int, np.ndarray]:
    """Plays a plan in one stream per picture -> frames uint8 [B H W 3] by number.

    Only the frames that the plan names are kept.
    """
    kept = {*plan.returns, *(at for visit in plan.visits.values() for at in visit)}
    shown: dict[int, np.ndarray] = {}
    first = 0
    texts = [plan.actions] * len(pictures)
    for frames in streams.play(pictures[:, None], texts, seed, bar(name)):
        following = first + frames.shape[1]
        shown |= {at: frames[:, at - first].copy() for at in kept if first <= at < following}
        first = following
    return shown


def starts(clips, count: int) -> list[tuple[int, int]]:
    """(clip, frame) of at most `count` start pictures with a landmark ahead, of different clips.

    Clips of galleries are searched for such a frame; all others begin with their first frame.
    """
    found = []
    for index in spread(clips, len(clips)):
        frame = landmark_frame(clips[index])
        if frame is not None:
            found.append((index, frame))
    if not found:
        found = [(index, 0) for index in range(len(clips))]
    return [found[index] for index in spread(found, count)]


def landmark_frame(clip: Clip) -> int | None:
    """The frame of a clip with the picture of a room straight ahead; None if there is none."""
    if clip.theme != doom_maps.GALLERY or not clip.knows('pose'):
        return None
    layout, best = gallery.layout(clip.seed), (AHEAD, None)
    for frame in range(0, len(clip.frames), 4):
        x, y, _, yaw, pitch, _ = map(float, clip.pose[frame])
        room = layout.room_at(x, y)
        if room is None or abs(pitch) > AHEAD:
            continue
        away = layout.picture(room)[0] - (x, y)
        angle = abs(float(wrap(np.arctan2(away[1], away[0]) - yaw)))
        if LANDMARK[0] < np.hypot(*away) < LANDMARK[1] and angle < best[0]:
            best = angle, frame
    return best[1]


def speed(streams: Streams, picture, steps: int = 20) -> dict:
    """Frames per second of one stream on this machine, decoder included, without compilation."""
    world = streams.world
    given, _ = world.inputs(world.cfg.prompt, picture[None], [])
    first, others = (
        world.vocabulary.encode(['W'] * count)[None]
        for count in (world.first_step_controls, world.cfg.stream.controls_per_step)
    )
    return {
        **streams.pace(streams.enter(given, 0), first, others, steps),
        'calls_per_shift': world.cfg.stream.passes,
    }


# --- what is measured ----------------------------------------------------------------------------


def similarity(one, other) -> float:
    """How alike two frames uint8 [H W 3] are: 1 for the same, about 0 for unrelated ones.

    The correlation of mean colours (CIE L*a*b*) of cells of 8x8 pixels, each frame's own mean
    colour subtracted. Frames that are 2 pixels apart are still alike.
    """

    def cells(frame):
        height, width = (size // CELL * CELL for size in frame.shape[:2])
        split = frame[:height, :width].reshape(height // CELL, CELL, width // CELL, CELL, 3)
        colors = drifts.lab(split.mean(axis=(1, 3)))
        return colors - colors.mean(axis=(0, 1))

    one, other = cells(one), cells(other)
    size = np.sqrt(np.square(one).sum() * np.square(other).sum())
    return float((one * other).sum() / size) if size > 1e-9 else 0.0


def mean_similarity(pairs) -> float:
    """Mean of `similarity` over pairs of frames; 0 without pairs."""
    found = [similarity(one, other) for one, other in pairs]
    return float(np.mean(found)) if found else 0.0


def measure(plan: Plan, shown: dict[int, np.ndarray], pictures, fps: int) -> dict:
    """Figures of each visit, and of the returns to the first pose over time.

    Returns:
      visits: minute -> `turned` (similarity of back and before), `start` (of back and the start
      picture), `color` (Delta E of their mean colours), `sharpness` (relative to that of the start
      picture). returns: `start`, `color` and `sharpness` by return, and the `slope` of each per
      minute.
    """

    def against_start(frames) -> dict[str, float]:
        apart = drifts.lab(drifts.mean_color(frames)) - drifts.lab(drifts.mean_color(pictures))
        sharp = drifts.sharpness(frames) / np.maximum(drifts.sharpness(pictures), 1e-6)
        return {
            'start': mean_similarity(zip(frames, pictures, strict=True)),
            'color': float(np.linalg.norm(apart, axis=-1).mean()),
            'sharpness': float(sharp.mean()),
        }

    visits = {
        f'{minute:g}': {
            'turned': mean_similarity(zip(shown[back], shown[before], strict=True)),
            **against_start(shown[back]),
        }
        for minute, (before, _, back) in plan.visits.items()
    }
    back = [against_start(shown[at]) for at in plan.returns]
    times = np.array(plan.returns) / fps / 60
    curves = {name: [round(one[name], 4) for one in back] for name in back[0]}
    return {
        'visits': visits,
        'returns': {
            'minutes': times.round(3).tolist(),
            **curves,
            'slope': {name: slope(times, values) for name, values in curves.items()},
        },
    }


def slope(times, values) -> float:
    """Slope of a line through values at times, by least squares; 0 for fewer than two values."""
    return float(np.polyfit(times, values, 1)[0]) if len(values) > 1 else 0.0


def draw(plan: Plan, shown: dict[int, np.ndarray], pictures, path: Path):
    """Writes a contact sheet: the start picture, then out, away and back; a row per visit."""
    rows = [
        np.stack([pictures[stream], *(shown[at][stream] for at in visit)])
        for stream in range(len(pictures))
        for visit in plan.visits.values()
    ]
    video.write_image(path, sheet(rows, range(4), 1, width=160))
