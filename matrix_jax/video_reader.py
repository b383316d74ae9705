"""Reads videos and pictures of any container and pixel format; frames are uint8 [F H W 3].

Frames are chosen by their times, not by their number, so videos with a variable frame rate keep
their speed. Every picture comes out as a player shows it: turned and flipped as the file says, with
square pixels, without transparency, and with high dynamic range mapped to that of a usual screen.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax.config import UsageError

FPS = 16
MAX_PIXELS = 40_000_000  # of one frame or picture
LONGEST_FRAME = 60  # seconds that a frame of a variable frame rate may stay
GROUND = 255  # grey level behind transparent pixels
STILLS = ('image2', 'webp_pipe')  # formats of ffmpeg that hold one picture
PQ, HLG = 16, 18  # transfer functions of high dynamic range, as numbered in ITU-T H.273
BT2020_TO_BT709 = np.array(
    ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)), np.float32
)
KNEE, PEAK = 0.6, 1000 / 203  # linear light that stays, and that becomes white; 1 = white paper


class VideoError(UsageError):
    """A video or image cannot be read or written."""


# --- videos ----------------------------------------------------------------------------------


def read_video(path: str | Path, fps: float = FPS, count: int | None = None) -> np.ndarray:
    """Returns uint8 [F H W 3]: the frames nearest to `fps`, at most the first `count`.

    Raises:
      VideoError: the file cannot be read as a video, or has no frames.
    """
    with contextlib.closing(read_frames(path, fps, count)) as frames:
        return np.stack(list(frames))


def read_frames(
    path: str | Path, fps: float | None = FPS, count: int | None = None
) -> Generator[np.ndarray]:
    """Yields the frames nearest to `fps`, uint8 [H W 3] each; every frame if it is None.

    At a constant frame rate, frame indices are round(arange(0, N, video fps / fps)), as in the
    reference, without those that rounding pushes past the end. At a variable one, the result shows
    at each time the frame that a player shows then.

    Args:
      path: the file.
      fps: frames per second of the result.
      count: frames of the result, at most.

    Raises:
      VideoError: the file cannot be read as a video, or has no frames.
    """
    chosen = itertools.count()
    with _opened(path) as (container, stream):
        if fps:
            chosen = _timing(path).choose(_decoded(container, stream), fps)
        else:
            chosen = _decoded(container, stream)
        found, last, picture, convert = 0, None, None, _Converter(path, stream)
        for frame in itertools.islice(chosen, count):
            if frame is not last:
                last, picture = frame, convert(frame)
            found += 1
            yield picture
    if not found:
        raise VideoError(f'{path}: has no frames')


def read_frames_at(path: str | Path, times: np.ndarray) -> Generator[np.ndarray]:
    """Yields the frame nearest to each of some times, uint8 [H W 3] each.

    Reading starts at the key frame before the first time, so parts of long videos are read fast.

    Args:
      path: the file.
      times: ascending times in seconds, as the file counts them.

    Raises:
      VideoError: the file cannot be read as a video, or has no frame at one of the times.
    """
    with _opened(path) as (container, stream):
        half = 1 / (2 * float(stream.average_rate or stream.guessed_rate or FPS))
        container.seek(max(0, int(times[0] / stream.time_base)), stream=stream)
        waiting, convert = iter(times.tolist()), _Converter(path, stream)
        time = next(waiting)
        timed = (frame for frame in _decoded(container, stream) if frame.pts is not None)
        for frame in timed:
            at, picture = float(frame.pts * frame.time_base), None
            while time is not None and time < at + half and time >= at - half - 1e-6:
                picture = convert(frame) if picture is None else picture
                yield picture
                time = next(waiting, None)
            if time is None or time < at - half - 1e-6:
                break
        if time is not None:
            raise VideoError(f'{path}: has no frame at {time:.3f} s')


def frame_rate(path: str | Path) -> float:
    """Returns the mean frames per second of a video."""
    return _timing(path).rate


def frame_times(path: str | Path) -> np.ndarray:
    """Returns the time of every frame in seconds, float64 [F], from 0 on; decodes all of them.

    Raises:
      VideoError: a part of the video is damaged; reading would give broken frames.
    """
    timing, times = _timing(path), []
    with _opened(path, strict=True) as (container, stream):
        for frame in _decoded(container, stream, path):
            times.append(None if frame.pts is None else frame.pts * stream.time_base)
    if not times:
        raise VideoError(f'{path}: has no frames')
    if timing.regular:
        return np.arange(len(times)) / timing.rate
    return np.array([float(time - times[0]) for time in times])


def shown_at(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the index of the frame that a player shows at each time, int [F].

    Args:
      times: ascending times of the frames, in seconds.
      wanted: times in seconds; half a usual frame early counts as in time.
    """
    gaps = np.diff(times)
    half = np.minimum(gaps, np.median(gaps)) / 2 if len(gaps) else gaps
    return np.searchsorted(times[1:] - half, wanted + 1e-9, side='right')


def is_video(path: Path) -> bool:
    """Returns whether a file is a video of any container, judged by its content."""
    import av

    try:
        with av.open(str(path)) as container:
            still = container.format.name in STILLS or container.format.name.endswith('_pipe')
            return not still and _best(container) is not None
    except (av.FFmpegError, OSError, ValueError):
        return False


@dataclass(frozen=True)
class _Timing:
    """When the frames of a video are shown.

    Attributes:
      rate: mean frames per second.
      regular: whether the frame rate is constant.
      usual: median time between two frames, in seconds.
    """

    rate: float
    regular: bool
    usual: Fraction

    def choose(self, frames: Iterator[Any], fps: float) -> Iterator[Any]:
        """Yields frames at `fps` per second; a frame may come several times, or not at all."""
        return self._by_index(frames, fps) if self.regular else self._by_time(frames, fps)

    def _by_index(self, frames: Iterator[Any], fps: float) -> Iterator[Any]:
        step, found = self.rate / fps, 0
        for index, frame in enumerate(frames):
            # PARITY: numpy rounds half to even, and so does Python.
            while round(found * step) == index:
                found += 1
                yield frame

    def _by_time(self, frames: Iterator[Any], fps: float) -> Iterator[Any]:
        found, start, half = 0, None, self.usual / 2
        timed = ((frame, frame.pts * frame.time_base) for frame in frames if frame.pts is not None)
        for (frame, time), after in itertools.pairwise(itertools.chain(timed, [None])):
            start = time if start is None else start
            stays = (frame.duration or 0) * frame.time_base if after is None else after[1] - time
            end = time - start + min(stays - min(stays / 2, half), LONGEST_FRAME)
            if after is None:
                end = max(end, time - start + half)
            while found / fps < end - Fraction(1, 10**9):
                found += 1
                yield frame
            if stays > LONGEST_FRAME:
                raise VideoError(
                    f'the frame at {float(time - start):.1f} s stays for {float(stays):.1f} s, '
                    f'expected at most {LONGEST_FRAME}'
                )


def _timing(path: str | Path) -> _Timing:
    """Reads the times of all frames of a video, without decoding them."""
    with _opened(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        base, rate = stream.time_base, stream.average_rate
        guess = stream.guessed_rate or rate
    if None in stamps or len(stamps) < 3 or not base:
        if not guess or guess <= 0:
            raise VideoError(f'{path}: got {guess} frames per second, expected a positive number')
        return _Timing(float(guess), True, 1 / guess)
    stamps, rate = sorted(stamps), float(rate or 0)
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    usual = max(Fraction(statistics.median_low(gaps)) * base, Fraction(1, 10**6))
    times = np.array([float((stamp - stamps[0]) * base) for stamp in stamps])
    mean = (len(times) - 1) / times[-1] if times[-1] > 0 else rate
    for one in (rate, mean):
        if one > 0 and np.abs(times * one - np.arange(len(times))).max() < 0.25:
            return _Timing(one, True, usual)
    return _Timing(mean, False, usual)


@contextlib.contextmanager
def _opened(path: str | Path, strict: bool = False):
    """(container, stream) of a video; errors become a VideoError that names the file."""
    import av

    path = _readable(path)
    try:
        with av.open(str(path)) as container:
            stream = _best(container)
            if stream is None:
                raise VideoError('no picture stream')
            if strict:
                stream.codec_context.options = {'err_detect': 'explode'}
            if stream.width * stream.height > MAX_PIXELS:
                raise VideoError(
                    f'got {stream.width}x{stream.height} pixels, '
                    f'expected at most {MAX_PIXELS // 10**6} million'
                )
            yield container, stream
    except VideoError as error:
        text = str(error)
        raise VideoError(text if text.startswith(f'{path}: ') else f'{path}: {text}') from error
    except (av.FFmpegError, OSError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise VideoError(f'{path}: not readable as a video ({first_line(error)})') from error


def _best(container: Any) -> Any:
    """The stream of pictures that a player shows; None if there is only a cover picture."""
    import av

    best = container.streams.best('video')
    covers = av.stream.Disposition.attached_pic
    if best is None or best.disposition & covers:
        rest = [one for one in container.streams.video if not one.disposition & covers]
        best = rest[0] if rest else None
    return best


def _decoded(container: Any, stream: Any, strict: str | Path | None = None) -> Iterator[Any]:
    """Yields the decoded frames. Damaged parts are left out, or raise if `strict` is the path."""
    import av

    stream.thread_type = 'SLICE' if strict else 'AUTO'
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if strict:
                raise VideoError(f'{strict}: is damaged ({first_line(error)})') from error
            continue
        for frame in frames:
            if strict and (frame.is_corrupt or packet.is_corrupt):
                raise VideoError(f'{strict}: is damaged: ffmpeg cannot decode all of it')
            yield frame


class _Converter:
    """Decoded frame -> uint8 [H W 3] as a player shows it; all frames in the size of the first."""

    def __init__(self, path: str | Path, stream: Any):
        self.path = path
        self.size: Any = None
        self.aspect = Fraction(stream.sample_aspect_ratio or 1)
        if not Fraction(1, 8) <= self.aspect <= 8:
            raise VideoError(f'{path}: got pixels {self.aspect} times as wide as high, expected 1')

    def __call__(self, frame: Any) -> np.ndarray:
        if self.size is None:
            wide = max(self.aspect, 1)
            tall = max(1 / self.aspect, 1)
            self.size = max(1, round(frame.width * wide)), max(1, round(frame.height * tall))
            if self.size[0] * self.size[1] > MAX_PIXELS:
                raise VideoError(f'{self.path}: got {self.size} pixels, expected fewer')
        width, height = self.size
        options = dict(width=width, height=height, interpolation='BICUBIC')
        if int(frame.color_trc or 0) in (PQ, HLG):
            wide = frame.to_ndarray(format='rgb48le', **options)
            picture = tone_mapped(wide, int(frame.color_trc))
        elif any(part.is_alpha for part in frame.format.components):
            picture = opaque(frame.to_ndarray(format='rgba', **options))
        else:
            picture = frame.to_ndarray(format='rgb24', **options)
        return _turned(picture, frame)


def _turned(picture: np.ndarray, frame: Any) -> np.ndarray:
    """The picture turned and flipped by the display matrix of its frame."""
    matrix = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    if max(abs(a), abs(d)) < max(abs(b), abs(c)):  # columns become rows
        picture = picture.transpose(1, 0, 2)
        right, down = c > 0, b > 0
    else:
        right, down = a > 0, d > 0
    return np.ascontiguousarray(picture[:: 1 if down else -1, :: 1 if right else -1])


def tone_mapped(picture: np.ndarray, transfer: int) -> np.ndarray:
    """uint16 [H W 3] of BT.2020 with high dynamic range -> uint8 [H W 3] for a usual screen.

    Light up to `KNEE` stays as it is; what is brighter is compressed.

    Args:
      picture: PQ or HLG coded values, 65535 = 1.
      transfer: `PQ` (SMPTE ST 2084) or `HLG` (ARIB STD-B67).
    """
    code = np.arange(65536, dtype=np.float64) / 65535
    if transfer == PQ:
        root = code ** (1 / 78.84375)
        light = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = 10000 / 203 * light ** (1 / 0.1593017578125)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = (light / 0.2649) ** 1.2  # 75 % of the signal is white paper
    linear = light.astype(np.float32)[picture] @ BT2020_TO_BT709.T
    peak = linear.max(-1, keepdims=True)
    over, span = np.maximum(peak - KNEE, 0), PEAK - KNEE
    mapped = KNEE + (1 - KNEE) * over * (1 + (1 - KNEE) / span) / (over + 1 - KNEE)
    linear = np.where(peak > KNEE, linear * mapped / np.maximum(peak, 1e-6), linear).clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(coded * 255).astype(np.uint8)


# --- pictures --------------------------------------------------------------------------------


def read_image(path: str | Path) -> np.ndarray:
    """Returns uint8 [H W 3] of any image that Pillow reads, as a viewer shows it (`to_rgb`).

    Raises:
      VideoError: the file cannot be read as an image.
    """
    from PIL import Image

    path = _readable(path)
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f'{path}: not readable as an image ({first_line(error)})') from error


def to_rgb(image: Any) -> np.ndarray:
    """Returns uint8 [H W 3] of a Pillow image as a viewer shows it.

    It is turned as its EXIF data say, transparent pixels show a white ground, and more than 8 bits
    become 8: the smallest of 255, 65535 and 2**32 - 1 that holds the values is white, for floating
    point the smallest of 1, 255 and 65535.

    Raises:
      ValueError: it has values that are not finite.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == 'F' or image.mode.startswith('I'):
        return _grey(np.asarray(image), image.mode)
    if image.has_transparency_data:
        return opaque(np.asarray(image.convert('RGBA')))
    return np.asarray(image.convert('RGB'))


def _grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits [H W] -> uint8 [H W 3]."""
    if not np.isfinite(values).all():
        raise ValueError('it has values that are not finite')
    values = values.astype(np.float64)
    highest = {'F': (1, 255), 'I': (255,)}.get(mode, ())
    whites = (*highest, 65535, 2**32 - 1)
    white = next((one for one in whites if values.max() <= one), values.max())
    levels = np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=-1)


def opaque(picture: np.ndarray) -> np.ndarray:
    """uint8 RGBA [H W 4] on a white ground: uint8 [H W 3]."""
    alpha = picture[..., 3:].astype(np.uint16)
    mixed = picture[..., :3] * alpha + GROUND * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _readable(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'is not a file' if path.exists() else ''
        raise VideoError(f'{path}: {what or "no such file"}')
    return path


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
