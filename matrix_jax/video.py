"""Writes videos and images, and scales frames; frames are uint8 [F H W 3].

Writing gives H.264 or GIF; it enlarges small frames by a whole factor and can draw the pressed
keys. A file appears when it is complete, or not at all. `video_reader` reads.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from matrix_jax.video_reader import (
    FPS,
    VideoError,
    first_line,
    frame_rate,
    frame_times,
    is_video,
    read_frames,
    read_frames_at,
    read_image,
    read_video,
    shown_at,
    to_rgb,
)

__all__ = [
    'FPS',
    'KeyOverlay',
    'Mp4Encoder',
    'VideoError',
    'arrows',
    'check_path',
    'contact_sheet',
    'draw_keys',
    'enlarge',
    'fit',
    'frame_rate',
    'frame_times',
    'is_video',
    'read_frames',
    'read_frames_at',
    'read_image',
    'read_video',
    'resize',
    'shown_at',
    'to_rgb',
    'write_image',
    'write_video',
]
EXTREME = 16  # ratio of the shapes of a frame and its target from which the ends are cut first
MIN_WIDTH = 384  # narrower videos are enlarged, because 96x64 is tiny on a screen
SUFFIXES = ('.mp4', '.gif')
ARROWS = {  # letter of a driving control: name of its key, row, column
    'D': ('\u25b2', 0, 1),
    'L': ('\u25c0', 1, 0),
    'B': ('\u25bc', 1, 1),
    'R': ('\u25b6', 1, 2),
}
POLYGONS = {  # keys that are drawn as polygons: their points
    '\u25b2': ((0.5, 0.26), (0.78, 0.7), (0.22, 0.7)),
    '\u25c0': ((0.26, 0.5), (0.7, 0.22), (0.7, 0.78)),
    '\u25bc': ((0.5, 0.74), (0.78, 0.3), (0.22, 0.3)),
    '\u25b6': ((0.74, 0.5), (0.3, 0.22), (0.3, 0.78)),
}
LIT, DARK = (255, 214, 10, 245), (20, 20, 20, 130)  # RGBA of pressed and other keys
EDGE, FAINT = (255, 255, 255, 200), (255, 255, 255, 170)


class KeyOverlay(NamedTuple):
    """Keys and mouse that are drawn on a frame.

    Attributes:
      layout: (name, row, column) of each key.
      pressed: names of the pressed keys.
      mouse: (up, right) movement of the mouse, or None for no mouse.
    """

    layout: tuple[tuple[str, int, int], ...]
    pressed: frozenset[str]
    mouse: tuple[float, float] | None = None


# --- writing ---------------------------------------------------------------------------------


def check_path(path: str | Path) -> Path:
    """Returns `path` if it can name a video; creates nothing.

    Raises:
      VideoError: it is a folder, or its suffix is not in SUFFIXES.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise VideoError(f'{path}: is a folder, expected the name of a video file')
    if path.suffix.lower() not in SUFFIXES:
        raise VideoError(
            f'{path}: got suffix {path.suffix or "none"!r}, expected {" or ".join(SUFFIXES)}'
        )
    return path


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float = FPS,
    keys: Iterable[KeyOverlay | str] | None = None,
    min_width: int = MIN_WIDTH,
    key_frames: int | None = None,
) -> int:
    """Writes a video and returns its number of frames; creates missing folders.

    Args:
      path: file to write, .mp4 or .gif.
      frames: uint8 [H W 3] each, all of one size; may be a generator.
      fps: frames per second.
      keys: for each frame a `KeyOverlay` or a driving control ('D', 'BL', 'N', ...); None draws
        nothing.
      min_width: narrower frames are enlarged by the smallest whole factor that reaches it.
      key_frames: frames from one key frame of an .mp4 to the next; None = up to the encoder.

    Raises:
      VideoError: there are no frames, or a frame, `keys` or the path does not fit.
    """
    import av

    path = check_path(path)
    pictures = _pictures(frames, keys, min_width)
    first = next(pictures, None)
    if first is None:
        raise VideoError(f'{path}: no frames to write')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix.lower()}')
    pictures = itertools.chain([first], pictures)
    try:
        if part.suffix == '.gif':
            count = _write_gif(part, pictures, fps)
        else:
            count = _write_mp4(part, pictures, fps, key_frames)
        part.replace(path)
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f'{path}: could not be written ({first_line(error)})') from error
    finally:
        part.unlink(missing_ok=True)
    return count


def write_image(path: str | Path, picture: np.ndarray):
    """Writes uint8 [H W 3] as PNG or JPEG, by suffix; creates missing folders."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        Image.fromarray(picture).save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Mp4Encoder:
    """Encodes frames as H.264 in an MP4 file, in this process.

    A program like ffmpeg would have to be started by a fork, after which a process with the threads
    of JAX can hang.

    Args:
      file: path, or an object with a `write` method.
      fps: frames per second.
      options: options of the encoder x264 by name, like `crf`.
      container: options of the MP4 file by name, like `movflags`.
    """

    def __init__(
        self, file: Path | IO[bytes], fps: float, options: dict[str, str], container: dict[str, str]
    ):
        import av

        target = str(file) if isinstance(file, Path) else file
        self._file = av.open(target, 'w', format='mp4', options=container)
        self._options, self._rate = options, Fraction(fps).limit_denominator(1_000_000)
        self._stream: Any = None
        self.count = 0

    def add(self, picture: np.ndarray) -> None:
        """Encodes one frame, uint8 [H W 3] of even size, all of one size."""
        import av

        if self._stream is None:
            self._stream = self._file.add_stream('libx264', self._rate, options=self._options)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = 'yuv420p'
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
        frame.pts, self.count = self.count, self.count + 1
        frame.time_base = 1 / self._rate
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Writes what the encoder holds back and the end of the file."""
        try:
            if self._stream is not None:
                self._file.mux(self._stream.encode())
        finally:
            self._file.close()


def _write_mp4(
    path: Path, pictures: Iterable[np.ndarray], fps: float, key_frames: int | None
) -> int:
    seek = {} if key_frames is None else {'g': str(key_frames)}
    encoder = Mp4Encoder(path, fps, {'crf': '16', **seek}, {'movflags': '+faststart'})
    with contextlib.closing(encoder):
        for picture in pictures:
            encoder.add(picture)
    return encoder.count


def _write_gif(path: Path, pictures: Iterable[np.ndarray], fps: float) -> int:
    from PIL import Image

    images = [Image.fromarray(picture).quantize(128) for picture in pictures]
    # GIF durations are multiples of 10 ms; cumulative rounding keeps the mean rate right.
    ends = [round(100 * (i + 1) / fps) * 10 for i in range(len(images))]
    durations = [end - start for start, end in zip([0, *ends], ends)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return len(images)


def _pictures(frames, keys, min_width: int) -> Iterator[np.ndarray]:
    """Yields the frames enlarged to an even size, with keys drawn."""
    keys = itertools.repeat(None) if keys is None else iter(keys)
    size = None
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise VideoError(
                f'frame {index}: got {frame.dtype}{list(frame.shape)}, expected uint8 [H W 3]'
            )
        if frame.shape != (size := size or frame.shape):
            raise VideoError(
                f'frame {index}: got {list(frame.shape)}, expected {list(size)} like the first'
            )
        overlay = next(keys, '')
        if overlay == '':
            raise VideoError(f'keys: got {index}, expected one per frame')
        picture = enlarge(frame, min_width)
        yield picture if overlay is None else draw_keys(picture, overlay)


def enlarge(frame: np.ndarray, min_width: int = MIN_WIDTH) -> np.ndarray:
    """Enlarges [H W 3] by the smallest whole factor to `min_width`; pads odd sides by a line."""
    factor = max(1, math.ceil(min_width / frame.shape[1]))
    frame = frame.repeat(factor, 0).repeat(factor, 1)
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')


def arrows(symbol: str) -> KeyOverlay:
    """Returns the arrow keys of a driving control: D up, B down, L left, R right, N none."""
    return KeyOverlay(
        tuple(ARROWS.values()),
        frozenset(ARROWS[letter][0] for letter in symbol if letter in ARROWS),
    )


def draw_keys(picture: np.ndarray, overlay: KeyOverlay | str) -> np.ndarray:
    """Returns a copy of uint8 [H W 3] with keys, and the mouse if any, in the lower left corner."""
    overlay = arrows(overlay) if isinstance(overlay, str) else overlay
    height, width = picture.shape[:2]
    drawn = _drawn(overlay, max(8, min(height // 9, width // 12)))
    rows, columns = drawn.shape[:2]
    edge = max(2, height // 40)
    picture = picture.copy()
    corner = picture[max(0, height - edge - rows) : height - edge, edge : edge + columns]
    drawn = drawn[-corner.shape[0] :, : corner.shape[1]]
    alpha = drawn[..., 3:] / 255
    corner[:] = np.round(corner * (1 - alpha) + drawn[..., :3] * alpha)
    return picture


@functools.lru_cache(1024)
def _drawn(overlay: KeyOverlay, cell: int) -> np.ndarray:
    """Draws keys and mouse as RGBA uint8 [2*cell W 4], at 4 times the size for smooth edges."""
    from PIL import Image, ImageDraw, ImageFont

    big, columns = 4 * cell, 3 if overlay.mouse is None else 5
    image = Image.new('RGBA', (columns * big, 2 * big))
    draw = ImageDraw.Draw(image)
    line, margin = max(1, big // 24), big * 0.06
    for key, row, column in overlay.layout:
        pressed = key in overlay.pressed
        ink = (20, 20, 20, 255) if pressed else FAINT
        left, top = column * big, row * big
        box = [left + margin, top + margin, left + big - margin, top + big - margin]
        fill = LIT if pressed else DARK
        draw.rounded_rectangle(box, radius=big * 0.18, fill=fill, outline=EDGE, width=line)
        if key in POLYGONS:
            points = [((column + x) * big, (row + y) * big) for x, y in POLYGONS[key]]
            draw.polygon(points, fill=ink)
        else:
            font, middle = ImageFont.load_default(big * 0.55), (column + 0.5) * big
            draw.text((middle, (row + 0.5) * big), key, fill=ink, anchor='mm', font=font)
    if overlay.mouse is not None:
        # A joystick knob that leans in the direction of the turn, already for small movements.
        up, right = (math.tanh(6 * one) for one in overlay.mouse)
        x, y, size = (4.05 + 0.55 * right) * big, (1 - 0.55 * up) * big, 0.28 * big
        base = [3.15 * big, 0.1 * big, 4.95 * big, 1.9 * big]
        draw.ellipse(base, fill=DARK, outline=EDGE, width=line)
        fill = LIT if up or right else FAINT
        draw.ellipse([x - size, y - size, x + size, y + size], fill=fill)
    return np.asarray(image.resize((columns * cell, 2 * cell), Image.Resampling.LANCZOS))


# --- sizes -----------------------------------------------------------------------------------


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales to cover a size (bicubic) and crops the centre: [F H W 3] -> [F height width 3]."""
    from PIL import Image

    frames = _middle(frames, height, width)
    scale = max(height / frames.shape[1], width / frames.shape[2])
    covered = resize(
        frames,
        max(height, round(frames.shape[1] * scale)),
        max(width, round(frames.shape[2] * scale)),
        Image.Resampling.BICUBIC,
    )
    top, left = (covered.shape[1] - height) // 2, (covered.shape[2] - width) // 2
    return covered[:, top : top + height, left : left + width]


def _middle(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of frames that are much longer or wider than the target: scaled as a whole, a
    line of 60,000 pixels would need gigabytes."""
    rows, columns = frames.shape[1:3]
    tall = min(rows, math.ceil(EXTREME * columns * height / width))
    wide = min(columns, math.ceil(EXTREME * rows * width / height))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return frames[:, top : top + tall, left : left + wide]


def resize(frames: np.ndarray, height: int, width: int, method: int | None = None) -> np.ndarray:
    """Scales uint8 [F H W 3] -> [F height width 3], by default with Lanczos filtering."""
    from PIL import Image

    if frames.shape[1:3] == (height, width):
        return frames
    method = Image.Resampling.LANCZOS if method is None else method
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), method)) for frame in frames]
    )


def contact_sheet(frames: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Returns uint8 images [H W 3] of one size in rows of `columns`, on white."""
    height, width, _ = frames[0].shape
    rows = math.ceil(len(frames) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        y, x = divmod(index, columns)
        top, left = gap + y * (height + gap), gap + x * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet
