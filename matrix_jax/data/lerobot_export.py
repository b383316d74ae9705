"""Recorded clips as a LeRobot data set of version 3.0, the one that lerobot reads since 0.4.

Each clip becomes an episode, its caption the task. Features:

    observation.images.view   video [H W 3], one file per episode
    observation.state         float32: keys, mouse or driving keys while the frame was made
    action                    those of the next frame, as LeRobot pairs them; the last one repeats
    observation.pose          float32 [6], `records.POSE`, if all clips have it
    observation.telemetry     float32 [6], `records.TELEMETRY`, if all clips have it

`meta/actions_map.yaml` says what they mean, so `matrix-jax collect --lerobot` reads the data set
back without a file of the user's. Held-out clips are the split "heldout" of meta/info.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import driving
from matrix_jax.data import records
from matrix_jax.data.actions_map import DRIVING
from matrix_jax.data.lerobot import OWN_MAP, needs_pyarrow
from matrix_jax.data.lerobot_statistics import Statistics

VERSION = 'v3.0'
CAMERA = 'observation.images.view'
CHUNK = 1000  # files in a folder
KEY_FRAMES = 2  # as LeRobot encodes its own videos, for random access
PATHS = {
    'data_path': 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
    'video_path': 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
}
EPISODES_PATH = 'meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
COUNTED = ('timestamp', 'frame_index', 'episode_index', 'index', 'task_index')
PICTURES = 32  # of an episode, for statistics
STATE = ('keyboard', 'mouse', 'controls')  # parts of `observation.state`, in this order
# With this note pandas makes the column `task` the index of meta/tasks.parquet, as LeRobot expects.
PANDAS = {
    'index_columns': ['task'],
    'column_indexes': [],
    'columns': [
        {
            'name': name,
            'field_name': name,
            'pandas_type': kind,
            'numpy_type': dtype,
            'metadata': None,
        }
        for name, kind, dtype in (('task_index', 'int64', 'int64'), ('task', 'unicode', 'object'))
    ],
    'pandas_version': '2.0.0',
}
MAP = """\
# Values of observation.state were held while the frame of their row was made.
camera: observation.images.view
offset: 0
"""


class ExportError(UsageError):
    """The clips cannot be written as a LeRobot data set."""


def export(data: str, target: str | Path) -> str:
    """Writes all clips of a folder, or of several, and returns a line about the result.

    Args:
      data: folder or folders of recorded clips (`records.folders`).
      target: folder to create.

    Raises:
      ExportError: `target` exists, or the clips differ in size, rate or what is known of them.
      RecordError: a folder has no clips.
    """
    needs_pyarrow('--lerobot')
    target = Path(target)
    if target.exists():
        raise ExportError(f'DST: got {str(target)!r}, expected a folder that does not exist')
    splits, first, kinds = _survey(data)
    part = target.with_name(f'.{target.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        writer = _Writer(part, first, kinds)
        for clip in _clips(data):
            writer.add(clip)
        writer.finish(splits)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return (
        f'{target}: LeRobot {VERSION}, {len(writer.episodes)} episodes, {writer.rows} frames, '
        f'{len(writer.tasks)} tasks'
    )


def _clips(data: str) -> Iterator[records.Clip]:
    """Yields the clips for training, then the held-out ones."""
    for split in records.SPLITS:
        for path in _shards(data, split):
            shard = records.Shard(path)
            yield from (shard[index] for index in range(len(shard)))


def _shards(data: str, split: str) -> list[Path]:
    folders = records.folders(data)
    return [
        path for one in folders for path in sorted(Path(one).glob(f'{split}-*{records.SUFFIX}'))
    ]


def _survey(data: str) -> tuple[dict[str, int], records.Clip, tuple[str, ...]]:
    """(clips of each split, the first clip, what all clips know) of some folders."""
    splits = {split: 0 for split in records.SPLITS}
    first, kinds = None, set()
    for split in splits:
        for path in _shards(data, split):
            shard = records.Shard(path)
            for index in range(len(shard)):
                clip, where = shard[index], f'{path} record {index}'
                known = _known(clip)
                if first is None:
                    first, kinds = clip, known
                if (clip.frames.shape[1:], clip.fps) != (first.frames.shape[1:], first.fps):
                    raise ExportError(
                        f'{where}: got {_shape(clip)}, expected {_shape(first)} as in the clips '
                        'before'
                    )
                if (known ^ kinds) & set(STATE):
                    raise ExportError(
                        f'{where}: has {_list(known & set(STATE))}, the clips before '
                        f'{_list(kinds & set(STATE))}; expected the same actions in all clips'
                    )
                kinds = kinds & known
                splits[split] += 1
    if first is None:
        raise ExportError(f'{data}: no clips; record some with matrix-jax collect')
    return splits, first, tuple(sorted(kinds))


def _known(clip: records.Clip) -> set[str]:
    known = {name for name in records.ACTIONS if clip.knows(name)}
    known |= {'controls'} if clip.labelled else set()
    return known | ({'telemetry'} if np.isfinite(clip.telemetry).all() else set())


def _shape(clip: records.Clip) -> str:
    return f'{clip.frames.shape[2]}x{clip.frames.shape[1]} at {clip.fps} fps'


def _list(names: set[str]) -> str:
    return ', '.join(sorted(names)) or 'no actions'


def state_names(kinds: Sequence[str]) -> list[str]:
    """Names of the values of `observation.state` and `action`, for what is known."""
    names = {'keyboard': records.KEYS, 'mouse': ('mouse_pitch', 'mouse_yaw'), 'controls': DRIVING}
    return [name for kind in STATE if kind in kinds for name in names[kind]]


def state(clip: records.Clip, kinds: Sequence[str]) -> np.ndarray:
    """Values of `observation.state`, float32 [F D]."""
    letters = 'DBLR'  # of a symbol, in the order of DRIVING
    symbols = driving.decode(clip.controls) if 'controls' in kinds else []
    parts = {
        'keyboard': clip.keyboard,
        'mouse': clip.mouse,
        'controls': np.array([[letter in symbol for letter in letters] for symbol in symbols]),
    }
    return np.concatenate([parts[kind] for kind in STATE if kind in kinds], 1).astype(np.float32)


def map_text(kinds: Sequence[str]) -> str:
    """The file that `matrix-jax collect --lerobot` reads the data set with."""
    column, lines = 'observation.state', [MAP.rstrip()]
    if 'keyboard' in kinds:
        lines += ['keyboard:', *(f'  {key}: {column}[{key}] > 0.5' for key in records.KEYS)]
    if 'mouse' in kinds:
        lines += ['mouse:', *(f'  {one}: {column}[mouse_{one}]' for one in ('pitch', 'yaw'))]
        lines += ['  unit: mouse']
    if 'controls' in kinds:
        lines += ['driving:', *(f'  {key}: {column}[{key}] > 0.5' for key in DRIVING)]
    if 'pose' in kinds:
        lines += ['pose: observation.pose']
    return '\n'.join(lines) + '\n'


class _Writer:
    """Writes a data set episode by episode.

    Args:
      root: folder to create.
      first: a clip, for size and rate.
      kinds: what is known of all clips.
    """

    def __init__(self, root: Path, first: records.Clip, kinds: Sequence[str]):
        self.root, self.kinds, self.fps = root, kinds, first.fps
        self.names = state_names(kinds)
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.rows = 0
        self.stats = Statistics(CAMERA)
        height, width = (side + side % 2 for side in first.frames.shape[1:3])
        self.features = self._features(height, width)

    def _features(self, height: int, width: int) -> dict[str, Any]:
        info = {
            'video.fps': self.fps,
            'video.height': height,
            'video.width': width,
            'video.channels': 3,
            'video.codec': 'h264',
            'video.pix_fmt': 'yuv420p',
            'video.is_depth_map': False,
            'has_audio': False,
        }
        picture = {'dtype': 'video', 'shape': [height, width, 3]}
        features: dict[str, Any] = {
            CAMERA: {**picture, 'names': ['height', 'width', 'channels'], 'info': info}
        }
        vectors = {'observation.state': self.names, 'action': self.names} if self.names else {}
        if 'pose' in self.kinds:
            vectors['observation.pose'] = list(records.POSE)
        if 'telemetry' in self.kinds:
            vectors['observation.telemetry'] = list(records.TELEMETRY)
        for name, names in vectors.items():
            features[name] = {'dtype': 'float32', 'shape': [len(names)], 'names': names}
        for name in COUNTED:
            dtype = 'float32' if name == 'timestamp' else 'int64'
            features[name] = {'dtype': dtype, 'shape': [1], 'names': None}
        return features

    def add(self, clip: records.Clip):
        """Writes an episode."""
        number, count = len(self.episodes), len(clip.frames)
        task = self.tasks.setdefault(clip.caption, len(self.tasks))
        place = {'chunk_index': number // CHUNK, 'file_index': number % CHUNK}
        path = self.root / PATHS['video_path'].format(video_key=CAMERA, **place)
        video.write_video(path, clip.frames, clip.fps, min_width=1, key_frames=KEY_FRAMES)
        columns: dict[str, np.ndarray] = {}
        if self.names:
            held = state(clip, self.kinds)
            columns['observation.state'] = held
            columns['action'] = np.concatenate([held[1:], held[-1:]])
        if 'pose' in self.kinds:
            columns['observation.pose'] = clip.pose
        if 'telemetry' in self.kinds:
            columns['observation.telemetry'] = clip.telemetry
        frames = np.arange(count)
        columns['timestamp'] = (frames / clip.fps).astype(np.float32)
        columns['frame_index'] = frames
        columns['episode_index'] = np.full(count, number)
        columns['index'] = self.rows + frames
        columns['task_index'] = np.full(count, task)
        self._write(PATHS['data_path'].format(**place), columns)
        shown = clip.frames[np.linspace(0, count - 1, min(count, PICTURES)).astype(int)]
        self.episodes.append(
            {
                'episode_index': number,
                'tasks': [clip.caption],
                'length': count,
                **{f'data/{name}': value for name, value in place.items()},
                'dataset_from_index': self.rows,
                'dataset_to_index': self.rows + count,
                **{f'videos/{CAMERA}/{name}': value for name, value in place.items()},
                f'videos/{CAMERA}/from_timestamp': 0.0,
                f'videos/{CAMERA}/to_timestamp': count / clip.fps,
                'meta/episodes/chunk_index': 0,
                'meta/episodes/file_index': 0,
                **self.stats.add(columns, shown),
            }
        )
        self.rows += count

    def finish(self, splits: Mapping[str, int]):
        """Writes meta/.

        Args:
          splits: clips of each split, in order.
        """
        import pyarrow

        meta = self.root / 'meta'
        episodes = {name: [one[name] for one in self.episodes] for name in self.episodes[0]}
        self._save(EPISODES_PATH.format(chunk_index=0, file_index=0), pyarrow.table(episodes))
        tasks = pyarrow.table(
            {'task_index': list(self.tasks.values()), 'task': list(self.tasks)}
        ).replace_schema_metadata({'pandas': json.dumps(PANDAS)})
        self._save('meta/tasks.parquet', tasks)
        ends = np.cumsum(list(splits.values())).tolist()
        ranges = {
            split: f'{end - count}:{end}'
            for (split, count), end in zip(splits.items(), ends, strict=True)
            if count
        }
        info = {
            'codebase_version': VERSION,
            'robot_type': 'matrix_jax',
            'total_episodes': len(self.episodes),
            'total_frames': self.rows,
            'total_tasks': len(self.tasks),
            'chunks_size': CHUNK,
            'data_files_size_in_mb': 100,
            'video_files_size_in_mb': 500,
            'fps': self.fps,
            'splits': ranges,
            **PATHS,
            'features': self.features,
        }
        (meta / 'info.json').write_text(json.dumps(info, indent=4), encoding='utf-8')
        (meta / 'stats.json').write_text(json.dumps(self.stats.all(), indent=4), encoding='utf-8')
        (self.root / OWN_MAP).write_text(map_text(self.kinds), encoding='utf-8')

    def _write(self, name: str, columns: Mapping[str, np.ndarray]):
        """Writes columns [N] or [N D] as parquet; vectors have a fixed length."""
        import pyarrow

        made = {}
        for column, values in columns.items():
            flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
            vector = values.ndim > 1
            made[column] = (
                pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]) if vector else flat
            )
        self._save(name, pyarrow.table(made))

    def _save(self, name: str, table: Any):
        import pyarrow.parquet

        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path, compression='snappy')
