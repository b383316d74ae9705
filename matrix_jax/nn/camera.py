"""Cameras of Matrix-Game 3.0: actions -> poses -> rays, and the overlap of views.

A pose is (x, y, z, pitch, yaw), angles in degrees. A camera is a matrix [4 4] from camera to world
coordinates. It looks along its third axis. `Config` has its field of view and how actions move it.

    poses        actions -> poses
    extrinsics   poses -> cameras
    plucker      cameras -> ray origin and direction of every pixel, stacked per latent pixel
    view_overlap share of the view of one camera that another camera sees
    best_views   candidates with the largest overlap

All functions are pure and in float32; leading axes are batches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

DEAD_ZONE = np.float32(0.02)  # smaller mouse movements do not rotate
SCALE = 0.01  # world units per unit of a pose
AXES = np.float32([[0, 0, 1], [1, 0, 0], [0, -1, 0]])  # camera axes in the frame of a pose
POINTS, NEAR = 10, 0.1  # grid of a view frustum: points per axis, least depth
VIEW = (720, 1280)  # pixels of a view when overlaps are measured

_einsum = functools.partial(jnp.einsum, precision='highest')


@dataclasses.dataclass(frozen=True)
class Config:
    """How actions move the camera, and what it sees; the defaults are those of Matrix-Game 3.0.

    Attributes:
      step: movement per frame under one key, in units of a pose.
      diagonal: movement per frame along each of two axes under two keys.
      degrees: rotation per frame and unit of the mouse.
      focal: focal lengths as multiples of the width and of the height of a frame.
      far: largest depth of the points by which views are compared, in world units.

    Raises:
      ValueError: a value is not above 0.
    """

    step: float = 12.35
    diagonal: float = 8.73
    degrees: float = 15.0
    focal: tuple[float, float] = (0.5, 0.5)
    far: float = 30.0

    def __post_init__(self):
        object.__setattr__(self, 'focal', tuple(self.focal))
        if len(self.focal) != 2 or not min(self.focal) > 0:
            raise ValueError(f'camera.focal: got {self.focal}, expected two numbers above 0')
        for name, low in (('step', 0), ('diagonal', 0), ('degrees', 0), ('far', NEAR)):
            if not getattr(self, name) > low:
                raise ValueError(
                    f'camera.{name}: got {getattr(self, name)}, expected more than {low}'
                )


RELEASED = Config()


# --- poses ---------------------------------------------------------------------------------------


def next_pose(pose, keyboard, mouse, cfg: Config = RELEASED):
    """Returns the pose after one frame.

    Args:
      pose: [... 5].
      keyboard: [... A]; the first four entries are forward, back, left, right.
      mouse: [... 2], pitch and yaw.
      cfg: how actions move the camera.
    """
    pose, mouse = jnp.asarray(pose, jnp.float32), jnp.asarray(mouse, jnp.float32)
    x, y, z, pitch, yaw = jnp.moveaxis(pose, -1, 0)
    turn = jnp.where(jnp.abs(mouse) >= DEAD_ZONE, cfg.degrees * mouse, 0)
    pitch, turned = pitch + turn[..., 0], yaw + turn[..., 1]
    turned = turned + jnp.where(turned > 180, -360, jnp.where(turned < -180, 360, 0))
    forward, back, left, right = jnp.moveaxis(jnp.asarray(keyboard)[..., :4] > 0.5, -1, 0)
    along, across = (
        one.astype(jnp.float32) - other for one, other in ((forward, back), (right, left))
    )
    size = jnp.where((along != 0) & (across != 0), cfg.diagonal, cfg.step)
    # PARITY: the mean of two angles on both sides of 180 degrees is near 0.
    angle = jnp.deg2rad((yaw + turned) / 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack(
        [
            x + size * (cos * along - sin * across),
            y + size * (sin * along + cos * across),
            z,
            pitch,
            turned,
        ],
        axis=-1,
    )


def poses(start, keyboard, mouse, cfg: Config = RELEASED):
    """Returns the poses of the frames of a trajectory.

    Args:
      start: pose of the first frame [... 5].
      keyboard: [... F A].
      mouse: [... F 2].
      cfg: how actions move the camera.

    Returns:
      (poses before each action [... F 5], pose after the last action [... 5]).
    """
    keyboard, mouse = (
        jnp.moveaxis(jnp.asarray(part, jnp.float32), -2, 0) for part in (keyboard, mouse)
    )
    start = jnp.broadcast_to(jnp.asarray(start, jnp.float32), (*keyboard.shape[1:-1], 5))
    last, made = jax.lax.scan(
        lambda pose, action: (next_pose(pose, *action, cfg), pose), start, (keyboard, mouse)
    )
    return jnp.moveaxis(made, 0, -2), last


def extrinsics(poses):
    """Poses [... 5] -> cameras [... 4 4]."""
    poses = jnp.asarray(poses, jnp.float32)
    pitch, yaw = jnp.moveaxis(jnp.deg2rad(poses[..., 3:]), -1, 0)
    cp, sp, cy, sy = jnp.cos(pitch), jnp.sin(pitch), jnp.cos(yaw), jnp.sin(yaw)
    # Rz(yaw) Ry(pitch)
    rotation = jnp.stack(
        [
            jnp.stack([cy * cp, -sy, cy * sp], -1),
            jnp.stack([sy * cp, cy, sy * sp], -1),
            jnp.stack([-sp, jnp.zeros_like(cp), cp], -1),
        ],
        axis=-2,
    )
    return rigid(_einsum('...ij,jk->...ik', rotation, AXES), SCALE * poses[..., :3])


def intrinsics(height: int, width: int, cfg: Config = RELEASED) -> np.ndarray:
    """(fx, fy, cx, cy) of a camera, float32 [4], in pixels."""
    across, down = cfg.focal
    return np.float32([across * width, down * height, width / 2, height / 2])


def rigid(rotation, translation):
    """Rotations [... 3 3] and translations [... 3] -> cameras [... 4 4]."""
    last = jnp.broadcast_to(jnp.float32([0, 0, 0, 1]), (*translation.shape[:-1], 1, 4))
    return jnp.concatenate([jnp.concatenate([rotation, translation[..., None]], -1), last], -2)


def between(reference, camera):
    """Cameras [... 4 4] in the coordinates of a reference camera [... 4 4]."""
    turn = jnp.swapaxes(reference[..., :3, :3], -1, -2)
    moved = camera[..., :3, 3] - reference[..., :3, 3]
    return rigid(
        _einsum('...ij,...jk->...ik', turn, camera[..., :3, :3]),
        _einsum('...ij,...j->...i', turn, moved),
    )


def interpolate(cameras, frames, times):
    """Cameras between given ones: straight lines, and spherical interpolation of rotations.

    Args:
      cameras: [S 4 4] at the times `frames`.
      frames: ascending times [S].
      times: [T], within those of `frames`.

    Returns:
      [T 4 4].
    """
    cameras, frames, times = (jnp.asarray(part, jnp.float32) for part in (cameras, frames, times))
    rotations = cameras[:, :3, :3]
    # Axes may be left-handed, as those of poses are; quaternions are for right-handed ones.
    mirrored = jnp.median(jnp.linalg.det(rotations)) < 0
    sides = jnp.where(mirrored, jnp.float32([1, 1, -1]), 1)
    rotations = rotations * sides
    left = jnp.clip(jnp.searchsorted(frames, times, side='right') - 1, 0, len(frames) - 2)
    part = ((times - frames[left]) / (frames[left + 1] - frames[left]))[:, None]
    quaternions = quaternion(rotations)
    a, b = quaternions[left], quaternions[left + 1]
    cos = jnp.sum(a * b, -1, keepdims=True)
    b, cos = jnp.where(cos < 0, -b, b), jnp.minimum(jnp.abs(cos), 1)
    angle = jnp.arccos(cos)
    near = angle < 1e-3  # where sines of the angle lose digits, a line is as good
    safe = jnp.where(near, 1, angle)
    weights = [
        jnp.where(near, share, jnp.sin(share * safe) / jnp.sin(safe)) for share in (1 - part, part)
    ]
    mixed = weights[0] * a + weights[1] * b
    mixed = mixed / jnp.linalg.norm(mixed, axis=-1, keepdims=True)
    places = cameras[:, :3, 3]
    moved = (1 - part) * places[left] + part * places[left + 1]
    return rigid(rotation_matrix(mixed) * sides, moved)


def quaternion(rotation):
    """Rotations [... 3 3] -> unit quaternions [... 4], real part first."""
    m = rotation
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = (m[..., j, i] + m[..., i, j] for i, j in ((0, 1), (0, 2), (1, 2)))
    wx, wy, wz = (m[..., j, i] - m[..., i, j] for i, j in ((1, 2), (2, 0), (0, 1)))
    # Each row is the quaternion times four times one of its entries; the largest is the safest.
    rows = jnp.stack(
        [
            jnp.stack(row, -1)
            for row in (
                (1 + xx + yy + zz, wx, wy, wz),
                (wx, 1 + xx - yy - zz, xy, xz),
                (wy, xy, 1 - xx + yy - zz, yz),
                (wz, xz, yz, 1 - xx - yy + zz),
            )
        ],
        axis=-2,
    )
    largest = jnp.argmax(jnp.diagonal(rows, axis1=-2, axis2=-1), axis=-1)
    row = jnp.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :]
    return row / jnp.linalg.norm(row, axis=-1, keepdims=True)


def rotation_matrix(quaternions):
    """Unit quaternions [... 4], real part first -> rotations [... 3 3]."""
    w, x, y, z = jnp.moveaxis(quaternions, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, -1) for row in rows], axis=-2)


# --- rays ----------------------------------------------------------------------------------------


def relative_poses(cameras, framewise: bool = True):
    """Cameras [... T 4 4] relative to the first one, or each to the one before it.

    Translations are divided by the largest of their lengths, unless that is 0.
    """
    cameras = jnp.asarray(cameras, jnp.float32)
    if framewise:
        reference = jnp.concatenate([cameras[..., :1, :, :], cameras[..., :-1, :, :]], axis=-3)
    else:
        reference = cameras[..., :1, :, :]
    relative = between(reference, cameras)
    moved = relative[..., :3, 3]
    longest = jnp.linalg.norm(moved, axis=-1, keepdims=True).max(axis=-2, keepdims=True)
    return rigid(relative[..., :3, :3], moved / jnp.where(longest > 0, longest, 1))


def memory_poses(references, cameras):
    """Cameras of memory frames [... 4 4], each relative to its reference camera [... 4 4].

    The translation has length 1, or 0 where both cameras stand at the same place.
    """
    pairs = jnp.stack([references, cameras], axis=-3)
    return relative_poses(pairs, framewise=False)[..., 1, :, :]


def plucker(cameras, height: int, width: int, patch: int = 16, cfg: Config = RELEASED):
    """Ray maps of cameras [... 4 4], stacked per latent pixel: [... h w 6*patch*patch].

    A ray is its origin and its direction; published networks do not take their cross product.

    Args:
      cameras: relative poses.
      height, width: pixels of a frame.
      patch: pixels of a latent pixel, in height and in width.
      cfg: field of view.
    """
    fx, fy, cx, cy = intrinsics(height, width, cfg)
    rows = (np.arange(height, dtype=np.float32) + np.float32(0.5) - cy) / fy
    columns = (np.arange(width, dtype=np.float32) + np.float32(0.5) - cx) / fx
    rays = np.stack([*np.meshgrid(columns, rows), np.ones((height, width), np.float32)], axis=-1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    directions = _einsum('...ij,hwj->...hwi', cameras[..., :3, :3], rays)
    origins = jnp.broadcast_to(cameras[..., None, None, :3, 3], directions.shape)
    return rearrange(
        jnp.concatenate([origins, directions], axis=-1),
        '... (h p) (w q) c -> ... h w (c p q)',
        p=patch,
        q=patch,
    )


# --- retrieval -----------------------------------------------------------------------------------


def view_overlap(references, candidates, cfg: Config = RELEASED):
    """Share of the points in a reference camera's view that a candidate sees: [... R S].

    The points are a grid of 10 x 10 x 10 between two depths.

    Args:
      references: cameras [... R 4 4].
      candidates: cameras [... S 4 4].
      cfg: field of view.
    """
    height, width = VIEW
    fx, fy, cx, cy = intrinsics(height, width, cfg)
    depth, across, down = np.meshgrid(
        np.linspace(NEAR, cfg.far, POINTS, dtype=np.float32),
        *[np.linspace(-1, 1, POINTS, dtype=np.float32)] * 2,
        indexing='ij',
    )
    points = np.stack([across * depth * cx / fx, down * depth * cy / fy, depth], -1).reshape(-1, 3)

    def of_one(reference):  # one reference at a time bounds the memory
        world = (
            _einsum('...ij,pj->...pi', reference[..., :3, :3], points) + reference[..., None, :3, 3]
        )
        moved = world[..., None, :, :] - candidates[..., None, :3, 3]
        x, y, z = jnp.moveaxis(
            _einsum('...sji,...spj->...spi', candidates[..., :3, :3], moved), -1, 0
        )
        safe = jnp.maximum(z, 1e-6)
        u, v = fx * x / safe + cx, fy * y / safe + cy
        seen = (z > NEAR) & (z < cfg.far) & (u >= 0) & (u <= width) & (v >= 0) & (v <= height)
        return seen.astype(jnp.float32).mean(axis=-1)

    candidates = jnp.asarray(candidates, jnp.float32)
    references = jnp.moveaxis(jnp.asarray(references, jnp.float32), -3, 0)
    return jnp.moveaxis(jax.lax.map(of_one, references), 0, -2)


def best_views(overlap, frames, known):
    """The frame with the largest overlap for each reference, the earliest one on ties.

    Args:
      overlap: [... R S].
      frames: frame number of each candidate, int32 [... S].
      known: whether a candidate may be chosen, bool [... S].

    Returns:
      (candidate int32 [... R], its overlap [... R]); candidate 0 and -1 where none may be chosen.
    """
    scores = jnp.where(known[..., None, :], overlap, -1.0)
    best = scores.max(axis=-1, keepdims=True)
    order = jnp.where(scores == best, frames[..., None, :], jnp.iinfo(jnp.int32).max)
    return jnp.argmin(order, axis=-1), best[..., 0]
