"""Clips from unlabelled videos: split into shots, resized and resampled, without poor clips.

A video is read twice. The first pass keeps a thumbnail of every frame (`thumbnails`), from which
shots (`shots`) and the quality of clips (`fault`) follow. The second pass keeps the frames of good
clips. The same file always gives the same clips.

The difference of two frames is the mean absolute difference of their thumbnails, 0 to 1. A cut is a
difference of at least `CUT` that is also `CUT_RATIO` times the median of the eight around it: fast
motion gives many large differences in a row, a cut only one. Slow dissolves are not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.data import cameras, files, records
from matrix_jax.data.ingest import (
    IngestError,
    IngestReport,
    VideoSource,
    check,
    check_clip_length,
    clip,
)

SUFFIXES = ('.avi', '.flv', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
# Files beside videos that are not opened to see whether they are videos as well.
OTHERS = ('.bmp', '.csv', '.jpeg', '.jpg', '.json', '.jsonl', '.md', '.npz', '.parquet', '.png')
OTHERS += ('.srt', '.tif', '.tiff', '.txt', '.vtt', '.webp', '.yaml', '.yml', '.zip')
THUMBNAIL = (16, 24)  # rows and columns
CUT, CUT_RATIO, CUT_AROUND = 0.06, 2.5, 4
DARK = 0.06  # mean brightness below which a clip is dropped
FLAT = 0.03  # deviation of brightness within a frame: fog, a wall, a title card
STATIC = 0.002  # mean difference of frames: a still picture, a menu, a paused player
LONGEST = 257  # frames of the longest clip: 16 s, like an episode of the game


@dataclass(frozen=True)
class FootageReader:
    """Reads clips without labels.

    Attributes:
      height, width, fps: size and rate of the clips.
      shortest: frames of the shortest clip.
      held_out: share of the videos in heldout-* shards.
      focal: focal length of the world's camera as a multiple of the width, for videos with camera
        files; None = the world has no camera, and frames keep their field of view.
      camera_units: units of a pose per unit of a camera file; None = `cameras.UNITS`, for metres.
    """

    height: int
    width: int
    fps: int = 16
    shortest: int = 33
    held_out: float = 0.1
    kind: str = 'footage'
    focal: float | None = None
    camera_units: float | None = None

    def __post_init__(self):
        check(self)
        check_clip_length(self.shortest, LONGEST)
        if self.camera_units is not None and not 0 < self.camera_units < np.inf:
            raise IngestError(
                f'--camera-units: got {self.camera_units:g}, expected a number above 0'
            )

    def clips(
        self, root: Path, source: VideoSource, report: IngestReport
    ) -> Iterator[records.Clip]:
        """Yields the good clips of one video in order; `report` counts the dropped ones.

        Raises:
          VideoError: the video is damaged or too slow.
          IngestError: its camera file is damaged or of another length.
        """
        path = root / source.path
        rate = video.frame_rate(path)
        if rate < self.fps / 2:  # every frame would be shown twice
            raise video.VideoError(
                f'{path}: got {rate:g} frames per second, expected at least {self.fps / 2:g}'
            )
        video.frame_times(path)  # raises if a part is damaged
        small = thumbnails(path, self.fps, self.height / self.width)
        report.seconds += len(small) / self.fps
        found = self._cameras(path, rate, len(small)) if source.cameras else None
        frames = enumerate(video.read_frames(path, self.fps))
        for start, end in pieces(shots(small)):
            why = 'short' if end - start < self.shortest else fault(small[start:end])
            if why:
                report.dropped[why] += 1
                continue
            kept = []
            for index, frame in frames:
                if index >= start and not why:
                    part = self._seen(frame, found, index)
                    if part is None:
                        why = 'narrow'
                    else:
                        kept.append(video.fit(part[None], self.height, self.width)[0])
                if index == end - 1:
                    break
            if why:
                report.dropped[why] += 1
                continue
            known = records.unknown(len(kept))
            if found:
                known['pose'] = found.poses[start:end]
            yield clip(kept, self, source, **known)

    def _cameras(self, path: Path, rate: float, count: int) -> cameras.Cameras:
        """Cameras of the `count` frames that are read from a video.

        Raises:
          IngestError: the file is damaged, or has another number of cameras than the video frames.
        """
        path = files.beside(path, cameras.SUFFIX) or path.with_suffix(cameras.SUFFIX)
        found = cameras.read(path, self.camera_units or cameras.UNITS)
        # The frames that `video.read_frames` takes.
        chosen = np.array([round(index * rate / self.fps) for index in range(count)])
        if not 0 <= len(found.poses) - 1 - chosen[-1] < max(2, rate / self.fps + 1):
            raise IngestError(
                f'{path}: got {len(found.poses)} cameras, expected one for each frame of the video'
            )
        return cameras.Cameras(found.poses[chosen], found.intrinsics[chosen])

    def _seen(self, frame: np.ndarray, found: cameras.Cameras | None, index: int):
        """The part of a frame that the world's camera sees; None if it reaches past the frame."""
        if found is None or self.focal is None:
            return frame
        box = cameras.crop_box(
            frame.shape[:2], found.intrinsics[index], self.focal, self.height / self.width
        )
        if box is None:
            return None
        top, left, height, width = box
        return frame[top : top + height, left : left + width]


def find(root: Path, caption: str = '') -> list[VideoSource]:
    """All videos below a folder, sorted by name; other endings are judged by the content.

    Args:
      root: the folder; links in it are followed.
      caption: caption of videos without a .txt file of the same name.

    Raises:
      IngestError: there is no folder or no video, or a caption is not text.
    """
    if not root.is_dir():
        raise IngestError(f'--videos {root}: no such folder')
    paths = videos(root)
    if not paths:
        raise IngestError(f'--videos {root}: no video in it')
    sources = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        text = caption_of(path, caption)
        sources.append(VideoSource(name, text, cameras=cameras.digest(path)))
    return sources


def videos(root: Path) -> list[Path]:
    """Returns the videos below a folder, sorted by name."""
    return [path for path in files.walk(root) if _is_video(path)]


def caption_of(path: Path, default: str = '') -> str:
    """Returns the text of the .txt file beside a video, or the default, in one line.

    Raises:
      IngestError: the file is not text.
    """
    said = files.beside(path, '.txt')
    return ' '.join((files.read_text(said) if said else default).split())


def _is_video(path: Path) -> bool:
    if path.suffix.lower() in OTHERS or path.name.startswith('.'):
        return False
    return path.suffix.lower() in SUFFIXES or (path.is_file() and video.is_video(path))


def thumbnails(path: Path, fps: float, aspect: float) -> np.ndarray:
    """Thumbnails uint8 [F 16 24 3] of the centre crop with height / width = `aspect`."""
    from PIL import Image

    small = []
    for frame in video.read_frames(path, fps):
        height, width = frame.shape[:2]
        rows, columns = min(height, width * aspect), min(width, height / aspect)
        box = (
            (width - columns) / 2,
            (height - rows) / 2,
            (width + columns) / 2,
            (height + rows) / 2,
        )
        small.append(
            np.asarray(Image.fromarray(frame).resize(THUMBNAIL[::-1], Image.Resampling.BOX, box))
        )
    return np.stack(small)


def differences(small: np.ndarray) -> np.ndarray:
    """Differences [F-1] of neighbouring thumbnails [F h w 3], 0 to 1."""
    return (
        np.array(
            [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(small)]
        )
        / 255
    )


def shots(small: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of the shots in thumbnails [F h w 3]."""
    change = differences(small)
    cuts = []
    for index in np.flatnonzero(change >= CUT):
        around = np.delete(
            change[max(0, index - CUT_AROUND) : index + CUT_AROUND + 1], min(index, CUT_AROUND)
        )
        if change[index] >= CUT_RATIO * (np.median(around) if len(around) else 0):
            cuts.append(int(index) + 1)
    return list(pairwise([0, *cuts, len(small)]))


def pieces(spans) -> Iterator[tuple[int, int]]:
    """Splits spans into spans of at most LONGEST frames and of 1 + 4k frames."""
    for start, end in spans:
        for first in range(start, end, LONGEST):
            last = min(first + LONGEST, end)
            yield first, last - (last - first - 1) % records.FRAMES_PER_LATENT


def fault(small: np.ndarray) -> str:
    """What is wrong with a clip of thumbnails [F h w 3]: 'dark', 'flat', 'static' or ''."""
    light = small.mean(axis=-1) / 255
    if light.mean() < DARK:
        return 'dark'
    if light.std(axis=(1, 2)).mean() < FLAT:
        return 'flat'
    return 'static' if differences(small).mean() < STATIC else ''
