"""Clips from recordings of Minecraft in two published layouts: VPT and GameFactory.

VPT (OpenAI's contractor data, github.com/openai/Video-Pre-Training): NAME.jsonl beside NAME.mp4 has
one line per frame, whose keys and mouse act after that frame. While a menu is open, the mouse moves
a cursor; clips leave such frames out.

GameFactory (GF-Minecraft, arXiv 2501.08325): metadata/NAME.json has the action of each frame of
video/NAME.mp4 under its number, and annotation.csv captions of parts of the videos. Frame 0 has no
action.

Records hold the keys W, S, A and D, the mouse, and poses where the recording has positions; a block
is a metre.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax import video
from matrix_jax.data import cameras, files, footage, frame_actions, records
from matrix_jax.data.frame_actions import FrameActions
from matrix_jax.data.ingest import IngestError, IngestReport, VideoSource, check, check_clip_length

DEGREES = 0.15  # that a mouse unit of VPT turns the view
GAMEFACTORY_DEGREES = 15.0  # that a delta of 1 turns the view
KEYS = tuple(f'key.keyboard.{key.lower()}' for key in records.KEYS)
SPARE = 2  # lines that a recording may have more or less than frames
LAYOUTS = ('vpt', 'gamefactory')


@dataclass(frozen=True)
class MinecraftReader:
    """Reads clips with keys, mouse and poses.

    Attributes:
      height, width, fps: size and rate of the clips.
      shortest: frames of the shortest clip.
      held_out: share of the videos in heldout-* shards.
      kind: layout of the recordings, one of LAYOUTS.
    """

    height: int
    width: int
    fps: int = 16
    shortest: int = 33
    held_out: float = 0.1
    kind: str = 'vpt'

    def __post_init__(self):
        check(self)
        check_clip_length(self.shortest, footage.LONGEST)

    def clips(
        self, root: Path, source: VideoSource, report: IngestReport
    ) -> Iterator[records.Clip]:
        """Yields the clips of one recording in order; `report` counts the short ones.

        Raises:
          VideoError: the video is damaged.
          IngestError: its actions cannot be read, or are those of another number of frames.
        """
        path = root / source.path
        rate = video.frame_rate(path)
        frame_actions.check_rate(rate, self.fps, path)
        times = video.frame_times(path)
        report.seconds += len(times) / rate
        read = read_vpt if self.kind == 'vpt' else read_gamefactory
        actions = read(actions_file(path, self.kind), times)
        chosen = frame_actions.sample(actions.times, self.fps)
        frames = _chosen(video.read_frames(path, None), chosen)
        yield from frame_actions.clips(frames, chosen, actions, self, source, report)


def find(root: Path, layout: str, caption: str = '') -> list[VideoSource]:
    """Returns the videos below a folder that have actions.

    Args:
      root: the folder; links in it are followed.
      layout: one of LAYOUTS.
      caption: caption of videos without one.

    Raises:
      IngestError: there is no folder, or no video with actions.
    """
    if not root.is_dir():
        raise IngestError(f'--{layout} {root}: no such folder')
    found = []
    for path in footage.videos(root):
        labels = actions_file(path, layout)
        if labels is not None:
            digest = files.digest(labels) + files.digest(_annotation(path, layout))
            name = path.relative_to(root).as_posix()
            found.append(VideoSource(name, footage.caption_of(path, caption), labels=digest))
    if not found:
        wanted = {'vpt': 'NAME.jsonl beside it', 'gamefactory': 'metadata/NAME.json'}[layout]
        raise IngestError(f'--{layout} {root}: no video with {wanted}')
    return found


def actions_file(path: Path, layout: str) -> Path | None:
    """Returns the file with the actions of a video, or None."""
    if layout == 'vpt':
        return files.beside(path, '.jsonl')
    return files.beside(path.parent.parent / 'metadata' / path.name, '.json')


def _annotation(path: Path, layout: str) -> Path | None:
    """The captions of a GameFactory video, or None."""
    return files.beside(path.parent.parent / 'annotation', '.csv') if layout != 'vpt' else None


def _chosen(frames: Iterator[np.ndarray], chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the frames with the indices `chosen`, which ascend and may repeat."""
    counts = np.bincount(chosen)
    for count, frame in zip(counts.tolist(), frames, strict=False):
        for _ in range(count):
            yield frame


# --- VPT -------------------------------------------------------------------------------------


def read_vpt(path: Path, times: np.ndarray) -> FrameActions:
    """Reads the actions of a video.

    Args:
      path: the .jsonl file.
      times: time of each frame of the video, in seconds.

    Raises:
      IngestError: a line is not an action, or there are more or fewer lines than frames.
    """
    rows = [_vpt_row(content, where) for where, content in files.read_json_lines(path)]
    if abs(len(rows) - len(times)) > SPARE or not rows:
        raise IngestError(
            f'{path}: got {len(rows)} lines, expected one for each of the {len(times)} frames'
        )
    count = min(len(rows), len(times))
    keys, turns, usable, poses = (list(column) for column in zip(*rows[:count], strict=True))
    usable = frame_actions.delayed(np.array(usable), 1)
    usable[0] = False  # its action comes before the recording
    return FrameActions(
        times=times[:count],
        keyboard=frame_actions.delayed(np.array(keys), 1),
        turns=frame_actions.delayed(np.array(turns), 1),
        pose=None if any(pose is None for pose in poses) else minecraft_poses(np.array(poses)),
        usable=usable,
    )


def _vpt_row(row: Any, where: str):
    """(keys, turn in degrees, whether it can be used, (x, y, z, yaw, pitch) or None) of a line."""
    if not isinstance(row, dict):
        raise IngestError(f'{where}: expected an object with keyboard and mouse')
    keyboard, mouse = row.get('keyboard'), row.get('mouse')
    place = [row.get(name) for name in ('xpos', 'ypos', 'zpos', 'yaw', 'pitch')]
    pose = place if all(map(_is_number, place)) else None
    if keyboard is None or mouse is None:  # some recorders wrote null
        return [False] * len(KEYS), [0.0, 0.0], False, pose
    pressed = keyboard.get('keys') if isinstance(keyboard, dict) else None
    if not isinstance(pressed, list):
        raise IngestError(f'{where}: keyboard: expected an object with a list "keys"')
    moved = [mouse.get(name) if isinstance(mouse, dict) else None for name in ('dy', 'dx')]
    if not all(map(_is_number, moved)):
        raise IngestError(f'{where}: mouse: expected an object with numbers "dx" and "dy"')
    turn = [-DEGREES * moved[0], DEGREES * moved[1]]
    return [key in pressed for key in KEYS], turn, not row.get('isGuiOpen'), pose


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


# --- GameFactory -----------------------------------------------------------------------------


def read_gamefactory(path: Path, times: np.ndarray) -> FrameActions:
    """Reads the actions of a video, and its captions from annotation.csv.

    Args:
      path: the .json file in the folder `metadata`.
      times: time of each frame of the video, in seconds.

    Raises:
      IngestError: an entry is not an action, or there are more or fewer entries than frames.
    """
    content = files.read_json(path)
    entries = content.get('actions') if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise IngestError(f'{path}: expected an object with "actions" of the frames')
    if abs(len({'0', *entries}) - len(times)) > SPARE:
        raise IngestError(
            f'{path}: got {len(entries)} actions, expected one for each of the {len(times)} frames'
        )
    count = len(times)
    keys, turns = np.zeros((count, len(KEYS)), bool), np.zeros((count, 2))
    usable, poses = np.zeros(count, bool), []
    for frame in range(1, count):
        entry = entries.get(str(frame))
        if entry is not None:
            keys[frame], turns[frame], pose = _gamefactory_row(entry, f'{path} action {frame}')
            usable[frame] = True
            poses.append(pose)
    known = bool(poses) and None not in poses
    pose = np.full((count, len(records.POSE)), np.nan, np.float32)
    if known:
        pose[usable] = minecraft_poses(np.array(poses))
    annotation = _annotation(path, 'gamefactory')
    return FrameActions(
        times=times,
        keyboard=keys,
        turns=turns,
        pose=pose if known else None,
        usable=usable,
        captions=_captions(annotation, path.stem, count) if annotation else (),
    )


def _gamefactory_row(entry: Any, where: str):
    """(keys, turn in degrees, (x, y, z, yaw, pitch) or None) of an action."""
    if not isinstance(entry, dict):
        raise IngestError(f'{where}: expected an object with ws and ad')
    for name in ('ws', 'ad'):
        if entry.get(name) not in (0, 1, 2) or isinstance(entry[name], bool):
            raise IngestError(
                f'{where}: {name}: got {str(entry.get(name))[:40]}, expected 0, 1 or 2'
            )
    delta = [entry.get(name, 0) for name in ('pitch_delta', 'yaw_delta')]
    if not all(map(_is_number, delta)):
        raise IngestError(f'{where}: expected numbers pitch_delta and yaw_delta')
    turn = [-GAMEFACTORY_DEGREES * delta[0], GAMEFACTORY_DEGREES * delta[1]]
    place = entry.get('pos')
    place = list(place) if isinstance(place, list) and len(place) == 3 else [None]
    pose = [*place, entry.get('yaw'), entry.get('pitch')]
    ws, ad = entry['ws'], entry['ad']
    return [ws == 1, ws == 2, ad == 1, ad == 2], turn, pose if all(map(_is_number, pose)) else None


def _captions(path: Path, stem: str, count: int) -> tuple[tuple[int, int, str], ...]:
    """(first frame, end, caption) of the parts of a video that annotation.csv describes.

    Raises:
      IngestError: the file is not such a table.
    """
    rows = csv.DictReader(io.StringIO(files.read_text(path)))
    found = []
    try:
        named = {re.sub('[ _]', '', name or '').lower(): name for name in rows.fieldnames or ()}
        columns = ('originalvideoname', 'startframeindex', 'endframeindex', 'prompt')
        if not set(columns) <= set(named):
            raise IngestError(
                f'{path}: expected columns Original video name, Start frame index, '
                'End frame index and Prompt'
            )
        for number, row in enumerate(rows, 2):
            name, start, end, prompt = ((row[named[one]] or '').strip() for one in columns)
            # Some rows leave out the number of the part, which is that of the seed.
            name = re.sub(r'^seed_(\d+)_part$', r'seed_\1_part_\1', name.removesuffix('.mp4'))
            if name == stem:
                if not (re.fullmatch(r'\d{1,9}', start) and re.fullmatch(r'\d{1,9}', end)):
                    raise IngestError(f'{path} row {number}: expected whole numbers of frames')
                found.append((int(start), min(int(end) + 1, count), ' '.join(prompt.split())))
    except csv.Error as error:
        raise IngestError(f'{path}: not a table ({error})') from error
    return tuple(found)


# --- poses -----------------------------------------------------------------------------------


def minecraft_poses(places: np.ndarray) -> np.ndarray:
    """Positions and angles of Minecraft [N 5] -> poses of records, float32 [N 6].

    Args:
      places: x (east), y (up), z (south) in blocks, yaw (from south to the right) and pitch
        (downwards) in degrees.
    """
    x, y, z, yaw, pitch = np.asarray(places, np.float64).T
    ours = np.stack([z, x, y], axis=-1) * cameras.UNITS
    angles = np.stack([records.wrap(-np.radians(yaw)), -np.radians(pitch), 0 * yaw], axis=-1)
    return np.concatenate([ours, angles], axis=-1).astype(np.float32)
