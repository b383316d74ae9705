"""Encodes frames for the browser."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np

from matrix_jax import video


def to_jpeg(frame: np.ndarray) -> bytes:
    """uint8 [H W 3] -> JPEG.

    Chroma is not subsampled, and small frames get a high quality: the page enlarges them, and with
    them every artifact.
    """
    from PIL import Image

    file, quality = io.BytesIO(), 98 if frame.shape[1] <= 256 else 85
    Image.fromarray(frame).save(file, 'JPEG', quality=quality, subsampling=0)
    return file.getvalue()


def to_mp4(frames: list[bytes], fps: float) -> bytes:
    """Encoded frames -> mp4."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'drive.mp4'
        video.write_video(path, (np.asarray(Image.open(io.BytesIO(one))) for one in frames), fps)
        return path.read_bytes()
