"""Clips from the published index format of The Matrix.

`{"list": [{"path", "caption", "control_signal_seq", "valid_frame_idx"}, ...]}`: paths are relative
to the data root; the signal has one symbol per frame of the file, separated by commas; the clip
begins at frame `valid_frame_idx`. The last two may be missing, as in the index of the first stage;
the clip then has no label and begins at 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.controls import driving
from matrix_jax.data import files, records
from matrix_jax.data.ingest import IngestError, IngestReport, VideoSource, check, clip


@dataclass(frozen=True)
class IndexReader:
    """Reads the clips that an index lists.

    Attributes:
      height, width, fps: size and rate of the clips.
      frames: frames F of every clip; the published stages read 17 to 65.
      held_out: share of the videos in heldout-* shards.
    """

    height: int
    width: int
    fps: int = 16
    frames: int = 65
    held_out: float = 0.1
    kind: str = 'index'

    def __post_init__(self):
        check(self)
        if self.frames < 5 or self.frames % records.FRAMES_PER_LATENT != 1:
            raise IngestError(f'--frames: got {self.frames}, expected 1 + 4k, at least 5')

    def clips(
        self, root: Path, source: VideoSource, report: IngestReport
    ) -> Iterator[records.Clip]:
        """Yields the clip of an entry.

        Raises:
          VideoError: the video is damaged.
        """
        path = root / source.path
        times, rate = video.frame_times(path), video.frame_rate(path)
        length = len(times)
        report.seconds += length / rate
        chosen = sample(times, rate, self.frames, source.start, self.fps)
        found = {}
        for index, frame in enumerate(video.read_frames(path, None)):
            if index in chosen:
                found[index] = video.fit(frame[None], self.height, self.width)[0]
            if index == chosen[-1]:
                break
        known = records.unknown(self.frames)
        if source.signal:
            known['controls'] = label(source.signal, chosen, length)
        yield clip([found[index] for index in chosen], self, source, **known)


def sample(times: np.ndarray, rate: float, frames: int, start: int, fps: float = 16) -> np.ndarray:
    """Indices [F] of the frames that the published loader takes from a video.

    At a variable frame rate, which that loader does not know, they are the frames shown at the
    times of the clip.

    Args:
      times: time of each frame of the video, in seconds.
      rate: mean frames per second of the video.
      frames: frames F of the clip.
      start: first frame; moved forward if the clip would run past the end.
      fps: frames per second of the clip.
    """
    length, step = len(times), rate / fps
    if (frames - 1) * step >= length:  # too short at this rate: spread evenly over the video
        return np.round(np.linspace(0, length - 1, frames)).astype(int)
    if np.abs(times * rate - np.arange(length)).max() >= 0.25:
        last = times[-1] - (frames - 1) / fps
        begin = max(0.0, min(times[min(start, length - 1)], last))
        return video.shown_at(times, begin + np.arange(frames) / fps)
    last = int(np.floor(length - (frames - 1) * step)) - 1
    start = max(0, min(start, last))
    chosen = np.round(np.arange(start, length, step))[:frames].astype(int)
    return np.minimum(chosen, length - 1)  # rounding may reach one past the end


def label(signal: Sequence[str], chosen: np.ndarray, length: int) -> np.ndarray:
    """Controls int8 [F]: each latent frame has the symbol of its last sampled frame.

    Args:
      signal: one symbol per frame of the video; the last one continues.
      chosen: indices [F] of the sampled frames.
      length: frames of the video.
    """
    if length < len(chosen):  # PARITY: a video with too few frames is labelled 'D' throughout
        return np.full(len(chosen), driving.SYMBOLS.index('D'), np.int8)
    every = records.FRAMES_PER_LATENT
    held = driving.encode([signal[min(index, len(signal) - 1)] for index in chosen[::every]])
    return np.concatenate([held[:1], np.repeat(held[1:], every)]).astype(np.int8)


def read(path: Path) -> list[VideoSource]:
    """Entries of an index file.

    Raises:
      IngestError: the file is not an index; the message names every malformed entry.
    """
    try:
        listed = files.read_json(path)
    except IngestError as error:
        raise IngestError(f'--index {error}') from error
    listed = listed.get('list') if isinstance(listed, dict) else None
    if not isinstance(listed, list) or not listed:
        raise IngestError(
            f'--index {path}: expected {{"list": [{{"path": ...}}, ...]}} with at least one entry'
        )
    faults = [
        f'entry {number}: {fault}'
        for number, entry in enumerate(listed)
        for fault in _faults(entry)
    ]
    if faults:
        raise IngestError(f'--index {path}: {"; ".join(faults)}')
    return [
        VideoSource(
            entry['path'],
            entry['caption'],
            tuple(_symbols(entry.get('control_signal_seq', ''))),
            entry.get('valid_frame_idx', 0),
        )
        for entry in listed
    ]


def _symbols(signal: str) -> list[str]:
    return [symbol.strip() for symbol in signal.split(',')] if signal else []


def _faults(entry) -> Iterator[str]:
    """Yields the faults of an entry: the key, its value and what was expected."""
    if not isinstance(entry, dict):
        yield f'got {_shown(entry)}, expected an object with path and caption'
        return
    for key in ('path', 'caption'):
        if key not in entry:
            yield f'{key}: is missing, expected a string'
        elif not isinstance(entry[key], str) or (key == 'path' and not entry[key].strip()):
            yield f'{key}: got {_shown(entry[key])}, expected a string' + (
                ' that names a video' if key == 'path' else ''
            )
    signal = entry.get('control_signal_seq')
    if 'control_signal_seq' in entry:
        if not isinstance(signal, str) or not signal.strip():
            yield (
                f'control_signal_seq: got {_shown(signal)}, expected symbols with commas, '
                'one per frame'
            )
        else:
            try:
                driving.parse(signal)
            except driving.ControlError as error:
                yield f'control_signal_seq: {str(error).removeprefix("control: ")}'
    start = entry.get('valid_frame_idx', 0)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        yield f'valid_frame_idx: got {_shown(start)}, expected a whole number of at least 0'


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
