"""Camera files of videos: NAME.npz beside NAME.mp4, with a camera for each of its N frames.

    extrinsics_c2w   [N 4 4]  camera to world; the camera looks along +z, x is right and y is down
    intrinsics       [N 4]    fx, fy, cx, cy in pixels of the video

The world of such a file has any axes. Poses of records have z up, so the mean of the cameras' up
axes is taken as up, and the first camera stands at the origin and looks along +x.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matrix_jax.data import files
from matrix_jax.data.ingest import IngestError

SUFFIX = '.npz'
UNITS = 100.0  # units of a pose per metre; 100 of them are a world unit of a network
ARRAYS = {'extrinsics_c2w': (4, 4), 'intrinsics': (4,)}


class Cameras(NamedTuple):
    """Cameras of the N frames of a video.

    Attributes:
      poses: float32 [N 6], `records.POSE`.
      intrinsics: float64 [N 4], fx, fy, cx, cy in pixels of the video.
    """

    poses: np.ndarray
    intrinsics: np.ndarray


def digest(video: Path) -> str:
    """Digest of the camera file beside a video; empty if there is none."""
    return files.digest(files.beside(video, SUFFIX))


def read(path: Path, units: float = UNITS) -> Cameras:
    """Reads a camera file.

    Args:
      path: the .npz file.
      units: units of a pose per unit of the file.

    Raises:
      IngestError: the file is no camera file; says what is wrong.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name], np.float64) for name in ARRAYS}
    except KeyError as error:
        raise IngestError(f'{path}: has no {error}; expected {" and ".join(ARRAYS)}') from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise IngestError(f'{path}: not a readable camera file ({error})') from None
    count = len(found['intrinsics']) if found['intrinsics'].ndim else 0
    for name, shape in ARRAYS.items():
        if found[name].shape != (count, *shape) or not count:
            wanted = ' '.join(map(str, ('N', *shape)))
            raise IngestError(f'{path}: {name}: got {list(found[name].shape)}, expected [{wanted}]')
        if not np.isfinite(found[name]).all():
            raise IngestError(f'{path}: {name}: expected finite numbers')
    turns = found['extrinsics_c2w'][:, :3, :3]
    if not (
        np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3), atol=1e-3)
        and (np.linalg.det(turns) > 0).all()
    ):
        raise IngestError(f'{path}: extrinsics_c2w: expected rotations and translations')
    if found['intrinsics'][:, :2].min() <= 0:
        raise IngestError(f'{path}: intrinsics: expected focal lengths above 0')
    return Cameras(poses(found['extrinsics_c2w'], units), found['intrinsics'])


def poses(cameras: np.ndarray, units: float = UNITS) -> np.ndarray:
    """Cameras to world [N 4 4] -> poses of records, float32 [N 6].

    Args:
      cameras: x right, y down, z ahead.
      units: units of a pose per unit of the cameras.
    """
    turns, places = cameras[:, :3, :3], cameras[:, :3, 3]
    up = -turns[:, :, 1].mean(axis=0)
    up /= np.linalg.norm(up)
    ahead = turns[0, :, 2] - (turns[0, :, 2] @ up) * up
    if np.linalg.norm(ahead) < 1e-6:  # looks straight up or down
        ahead = turns[0, :, 1] - (turns[0, :, 1] @ up) * up
    ahead /= np.linalg.norm(ahead)
    axes = np.stack([ahead, np.cross(up, ahead), up])  # rows: x ahead, y left, z up
    place = units * (places - places[0]) @ axes.T
    look, left, top = turns[..., 2] @ axes.T, -turns[..., 0] @ axes.T, -turns[..., 1] @ axes.T
    yaw = np.arctan2(look[:, 1], look[:, 0])
    pitch = np.arcsin(np.clip(look[:, 2], -1, 1))
    roll = np.arctan2(left[:, 2], top[:, 2])
    return np.column_stack([place, yaw, pitch, roll]).astype(np.float32)


def crop_box(
    size: tuple[int, int], intrinsics: np.ndarray, focal: float, aspect: float
) -> tuple[int, int, int, int] | None:
    """The part of a frame that a camera of another focal length sees.

    Args:
      size: height and width of the frame.
      intrinsics: [4], in pixels of the frame.
      focal: the wanted focal length as a multiple of the width.
      aspect: height / width of the part.

    Returns:
      (top, left, height, width) around the principal point; None if it is not within the frame.
    """
    width = intrinsics[0] / focal
    height = aspect * width * intrinsics[1] / intrinsics[0]
    left, top = intrinsics[2] - width / 2, intrinsics[3] - height / 2
    spare = 0.02 * np.array([height, width])  # of rounding and of principal points off the centre
    if min(top + spare[0], left + spare[1]) < 0:
        return None
    if top + height > size[0] + spare[0] or left + width > size[1] + spare[1]:
        return None
    top, left = max(0, round(top)), max(0, round(left))
    return top, left, min(round(height), size[0] - top), min(round(width), size[1] - left)
