"""The frames that a stream starts from: a bundled start clip, a player's picture, or plain grey."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.data import start_clips
from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.key_runs import ReplayError
from matrix_jax.weights import diffusers_layout
from matrix_jax.worlds.protocols import World

MAX_PIXELS = 40_000_000


def clips_folder(world: World, folder) -> Path:
    """The folder of a world's start clips; without clips of their own, the bundled ones."""
    folders = Path(folder), diffusers_layout.ASSETS / world.cfg.name.lower()
    return next(filter(start_clips.listing, folders), folders[0])


def captions(world: World, folder) -> dict[str, str]:
    """Start clip -> its caption."""
    found = start_clips.listing(clips_folder(world, folder))
    return {name: clip['caption'][: session_log.MAX_PROMPT] for name, clip in found.items()}


def choose(world: World, folder, prompt: str | None, start: str | None) -> tuple[str, str]:
    """Fills in whichever of prompt and start clip is None -> (prompt, name of a start clip).

    Raises:
      ReplayError: there is no such start clip.
    """
    _check(world, folder, start)
    if prompt is None:
        prompt = captions(world, folder)[start] if start else world.cfg.prompt
        prompt = prompt[: session_log.MAX_PROMPT]
    if start is None:
        start = start_clips.match(clips_folder(world, folder), prompt) or ''
    return prompt, start


def load(stream: BatchedStream, folder, start: str | None, picture: str | None) -> np.ndarray:
    """Start frames uint8 [F H W 3] of a log's `start` or `picture`.

    Raises:
      ReplayError: there is no such start clip, or the picture is not base64.
      VideoError: the picture is not readable.
    """
    if picture is not None:
        try:
            data = base64.b64decode(picture, validate=True)
        except ValueError as error:
            raise ReplayError('replay.picture: not base64') from error
        return np.repeat(decode_picture(data, stream.world)[None], stream.start_frames, 0)
    return load_clip(stream.world, folder, start)


def load_clip(world: World, folder, start: str) -> np.ndarray:
    """Start frames uint8 [F H W 3] of a start clip.

    Raises:
      ReplayError: there is no such start clip.
    """
    cfg, count = world.cfg, world.start_frames
    if start == '':
        return np.full((count, cfg.height, cfg.width, 3), 128, np.uint8)
    _check(world, folder, start)
    return start_clips.read(clips_folder(world, folder), start, cfg.height, cfg.width)[:count]


def decode_picture(data: bytes, world: World) -> np.ndarray:
    """Decodes an untrusted picture as the world's first frame, uint8 [H W 3].

    Raises:
      VideoError: the picture is not readable, or has too many pixels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=('PNG', 'JPEG', 'WEBP')) as image:
            if image.width * image.height > MAX_PIXELS:  # checked before any pixel is decoded
                raise video.VideoError(
                    f'picture: got {image.width}x{image.height} pixels, '
                    f'expected at most {MAX_PIXELS // 10**6} million'
                )
            image.draft('RGB', (4 * world.cfg.width, 4 * world.cfg.height))
            pixels = video.to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, video.VideoError):
            raise
        raise video.VideoError('picture: not readable as PNG, JPEG or WebP') from error
    return world.fit(pixels[None])[0]


def encode_picture(pixels: np.ndarray) -> str:
    """uint8 [H W 3] -> PNG, base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()


def _check(world: World, folder, start: str | None):
    found = captions(world, folder)
    if start not in (None, '', *found):
        raise ReplayError(
            f'start: got {start!r}, expected one of '
            f'{", ".join(found) or "none: this world brings no start clips"}'
        )
