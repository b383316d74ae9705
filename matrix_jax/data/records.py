"""Clips and their files: ArrayRecord shards of safetensors bytes.

A clip is an episode of F = 1 + 4k frames with one control per frame. Frame 0 belongs to latent
frame 0 and frames 4j+1 .. 4j+4 to latent frame j+1. One control is held while those four frames are
made; that of frame 0 was held before it. So `controls[::4]` is one control per latent frame, and
any crop that starts at a multiple of four is again a clip. A clip without a label holds `NULL`
throughout.

A first-person clip also has the keys, mouse and pose of every frame, held while the frame was made.
Unknown values are UNPRESSED or NaN throughout and are not stored. Records of version 1 have none of
the three.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matrix_jax.controls.driving import FRAMES_PER_CONTROL as FRAMES_PER_LATENT
from matrix_jax.controls.driving import NULL
from matrix_jax.controls.driving import SYMBOLS as CONTROLS

# Control -> mirrored control: left and right are swapped.
MIRRORED = tuple(CONTROLS.index(c.translate(str.maketrans('LR', 'RL'))) for c in CONTROLS)
TELEMETRY = ('on_road', 'yaw_rate', 'speed', 'x', 'y', 'heading')
KEYS = ('W', 'S', 'A', 'D')
UNPRESSED = -1  # unknown, in `keyboard`
# Camera in units of its game: z up, yaw in radians to the left of +x, pitch upwards.
POSE = ('x', 'y', 'z', 'yaw', 'pitch', 'roll')
# Degrees per second that a mouse component of 1 turns the view; a turning key is 0.1. Matrix-Game 3
# publishes 15 degrees per frame at 40 fps.
MOUSE_RATE = 600.0
VERSION = 2  # version of records with `ACTIONS`; others are of version 1
ACTIONS = ('keyboard', 'mouse', 'pose')
SUFFIX = '.array_record'
SPLITS = ('train', 'heldout')
ENDS = 2**18  # bytes at each end of a shard that its digest covers


class RecordError(ValueError):
    """A shard or a record that cannot be read as clips."""


@dataclass(frozen=True)
class Clip:
    """A recorded clip; see the module.

    Raises:
      RecordError: a field has another shape, type or value.
    """

    frames: np.ndarray  # uint8 [F H W 3]
    controls: np.ndarray  # int8 [F], index into CONTROLS, or NULL throughout
    caption: str
    theme: str
    seed: int  # seed of the track; no track is in both splits
    fps: int
    # float32 [F 6]: TELEMETRY, on_road = share of wheels, left is positive; NaN where unknown
    telemetry: np.ndarray
    keyboard: np.ndarray | None = None  # int8 [F 4], KEYS 0 or 1, or UNPRESSED throughout
    mouse: np.ndarray | None = None  # float32 [F 2], pitch (up) and yaw (right), or NaN throughout
    pose: np.ndarray | None = None  # float32 [F 6], POSE, or NaN throughout

    def __post_init__(self):
        count = len(self.frames)
        for name in ACTIONS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, unknown(count)[name])
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise RecordError(
                f'clip.frames: got {self.frames.dtype} {self.frames.shape}, '
                'expected uint8 [F H W 3]'
            )
        if count % FRAMES_PER_LATENT != 1:
            raise RecordError(f'clip.frames: got {count} frames, expected 1 + 4k')
        known = np.isin(self.controls, range(len(CONTROLS))).all()
        if self.controls.shape != (count,) or not (known or (self.controls == NULL).all()):
            raise RecordError(
                f'clip.controls: got {self.controls.shape}, '
                f'expected [{count}] of 0..{len(CONTROLS) - 1}, or of {NULL} alone (no label)'
            )
        if self.telemetry.shape != (count, len(TELEMETRY)):
            raise RecordError(
                f'clip.telemetry: got {self.telemetry.shape}, expected [{count} {len(TELEMETRY)}]'
            )
        for name, width in zip(ACTIONS, (len(KEYS), 2, len(POSE)), strict=True):
            value = getattr(self, name)
            dtype = np.int8 if name == 'keyboard' else np.float32
            if value.shape != (count, width) or value.dtype != dtype:
                raise RecordError(
                    f'clip.{name}: got {value.dtype} {value.shape}, '
                    f'expected {np.dtype(dtype)} [{count} {width}]'
                )
            if not (_missing(value).all() or np.isfinite(value).all() and self.knows(name)):
                raise RecordError(f'clip.{name}: expected values for all frames or for none')
        if self.knows('keyboard') and not np.isin(self.keyboard, (0, 1)).all():
            raise RecordError('clip.keyboard: expected 0 or 1 of every key')

    @property
    def labelled(self) -> bool:
        """Whether the clip has known controls."""
        return self.controls[0] != NULL

    def knows(self, name: str) -> bool:
        """Whether `name`, one of ACTIONS, is known."""
        return not _missing(getattr(self, name)).any()


def unknown(frames: int) -> dict[str, np.ndarray]:
    """Controls, telemetry and actions of a clip of which only the frames are known."""
    return {
        'controls': np.full(frames, NULL, np.int8),
        'telemetry': np.full((frames, len(TELEMETRY)), np.nan, np.float32),
        'keyboard': np.full((frames, len(KEYS)), UNPRESSED, np.int8),
        'mouse': np.full((frames, 2), np.nan, np.float32),
        'pose': np.full((frames, len(POSE)), np.nan, np.float32),
    }


def _missing(value) -> np.ndarray:
    return np.isnan(value) | (value == UNPRESSED if value.dtype == np.int8 else False)


def wrap(angle):
    """Wraps radians into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def pack(clip: Clip) -> bytes:
    """Clip -> safetensors bytes; the shard compresses them."""
    from safetensors.numpy import save

    tensors = {
        'frames': clip.frames,
        'controls': clip.controls.astype(np.int8),
        'telemetry': clip.telemetry.astype(np.float32),
    }
    about = {'caption': clip.caption, 'theme': clip.theme, 'seed': clip.seed, 'fps': clip.fps}
    known = [name for name in ACTIONS if clip.knows(name)]
    if known:
        tensors |= {name: getattr(clip, name) for name in known}
        about['version'] = VERSION
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return save(tensors, {'clip': json.dumps(about)})  # one key: safetensors does not order several


def unpack(data: bytes, where: str = 'record') -> Clip:
    """Inverse of `pack`.

    Args:
      data: safetensors bytes.
      where: origin of the data, for errors.

    Raises:
      RecordError: the data is not a clip.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], 'little')
        meta = json.loads(json.loads(data[8 : 8 + size])['__metadata__']['clip'])
        if meta.get('version', 1) > VERSION:
            raise ValueError(f'version {meta["version"]}, this program reads up to {VERSION}')
        return Clip(
            **tensors,
            caption=meta['caption'],
            theme=meta['theme'],
            seed=int(meta['seed']),
            fps=int(meta['fps']),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f'{where}: not a clip ({error})') from error


def write_shard(path: Path, clips) -> int:
    """Writes clips to one shard, atomically -> number of clips."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    part = path.with_name(f'.{path.name}.part')
    writer = ArrayRecordWriter(str(part), 'group_size:1,zstd:3')  # one clip a group: random access
    count = 0
    for clip in clips:
        writer.write(pack(clip))
        count += 1
    writer.close()
    os.replace(part, path)
    return count


class Shard:
    """Random access to the clips of one shard: `len(shard)`, `shard[i]`.

    Raises:
      RecordError: the file is missing or damaged.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = Path(path)
        if not self.path.is_file():
            raise RecordError(f'{path}: no such file')
        # A truncated file opens without an error, empty and not ok.
        self.reader = ArrayRecordReader(str(path), 'readahead_buffer_size:0')
        self.count = self.reader.num_records() if self.reader.ok() else 0
        if not self.count:
            raise RecordError(f'{path}: not an ArrayRecord file with clips: truncated or foreign')

    def __len__(self):
        return self.count

    def digest(self) -> str:
        """Digest of the size and both ends of the file, without reading all of it."""
        size = self.path.stat().st_size
        with self.path.open('rb') as file:
            first = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            return hashlib.sha256(b'%d:%b%b' % (size, first, file.read())).hexdigest()

    def __getitem__(self, index: int) -> Clip:
        where = f'{self.path} record {index}'
        try:
            data = self.reader.read([index])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise RecordError(f'{where}: unreadable, the file is damaged') from error
        return unpack(data, where)


def folders(data) -> list[str]:
    """Folders in `data`: a path, several separated by commas, or a list of paths.

    Raises:
      RecordError: there is no folder.
    """
    if isinstance(data, (str, Path)):
        data = [one.strip() for one in str(data).split(',')]
    found = [str(one) for one in data if one]
    if not found:
        raise RecordError(f'data: got {data!r}, expected folders separated by commas')
    return found


def shards(folder: Path, split: str) -> tuple[Path, ...]:
    """Finished shards of a split ('train' or 'heldout') in order.

    Raises:
      RecordError: there is none.
    """
    found = tuple(sorted(Path(folder).glob(f'{split}-*{SUFFIX}')))
    if not found:
        raise RecordError(
            f'{folder}: no {split}-*{SUFFIX} file; record some with matrix-jax collect'
        )
    return found
