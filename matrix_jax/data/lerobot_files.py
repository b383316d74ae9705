"""The files of LeRobot data sets (github.com/huggingface/lerobot) of versions 2.0, 2.1 and 3.0.

meta/info.json            version, frames per second, features, and the paths of all files
meta/episodes.jsonl       2.x: number, length and tasks of each episode; tasks.jsonl: all tasks
meta/episodes/**.parquet  3.0: also the files of each episode and its times; tasks.parquet
data/**.parquet           a row per frame: actions, states, task
videos/**.mp4             2.x: a file per episode; 3.0: several episodes in each file
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax import video
from matrix_jax.data import actions_map, files
from matrix_jax.data.ingest import IngestError

VERSIONS = 'v2.0, v2.1 or v3.0'
MOST_ROWS = 10**6  # of an episode
FIELD = re.compile(r'\{(\w+)(?::0?(\d{1,2})d)?\}')  # of a path


@dataclass(frozen=True)
class Episode:
    """An episode of a data set.

    Attributes:
      number: its number.
      length: rows.
      data: path of its rows.
      video: path of its video; empty if the pictures are in the rows.
      start: time of its first frame in the video, in seconds.
      tasks: its tasks.
    """

    number: int
    length: int
    data: str
    video: str
    start: float
    tasks: tuple[str, ...]


class Dataset:
    """The files of a data set.

    Args:
      root: its folder.
      camera: the feature with the pictures; None = the only one.

    Attributes:
      fps: rows per second.
      names: feature of numbers -> names of its values.
      episodes: number -> episode.

    Raises:
      IngestError: the folder is no data set of these versions; says what is wrong.
    """

    def __init__(self, root: Path, camera: str | None):
        self.root, self.where = root, root / 'meta' / 'info.json'
        info = files.read_json(self.where)
        features = info.get('features') if isinstance(info, dict) else None
        if not isinstance(features, dict) or not all(
            isinstance(f, dict) for f in features.values()
        ):
            raise IngestError(f'{self.where}: expected an object with features')
        self.info = info
        version = str(info.get('codebase_version'))
        if not re.fullmatch(r'v?(2\.[01]|3\.\d+)', version):
            raise IngestError(
                f'{self.where}: codebase_version: got {version[:40]!r}, expected {VERSIONS}'
            )
        self.fps = info.get('fps')
        if type(self.fps) not in (int, float) or not 0 < self.fps <= 1000:
            got = actions_map.shown(self.fps)
            raise IngestError(f'{self.where}: fps: got {got}, expected a positive number')
        pictures = {
            n: f.get('dtype') for n, f in features.items() if f.get('dtype') in ('video', 'image')
        }
        self.camera = self._camera(pictures, camera)
        self.embedded = pictures[self.camera] == 'image'
        self.names = {
            name: part_names(feature)
            for name, feature in features.items()
            if name not in pictures
            and str(feature.get('dtype')).startswith(('float', 'int', 'uint', 'bool'))
        }
        third = 'v3' in f'v{version.removeprefix("v")}'
        episodes = self._third() if third else self._second()
        self.episodes = {episode.number: episode for episode in episodes}
        if not self.episodes:
            raise IngestError(f'{root}: has no episodes')

    def _camera(self, pictures: Mapping[str, str], camera: str | None) -> str:
        there = ', '.join(pictures)[:200] or 'none'
        if camera is None and len(pictures) != 1:
            raise IngestError(
                f'{self.where}: got cameras {there}, expected one, or its name as camera: NAME in '
                '--actions-map'
            )
        if camera is not None and camera not in pictures:
            raise IngestError(f'camera: got {camera!r}, expected one of {there}')
        return camera or next(iter(pictures))

    def _path(self, name: str, fields: Mapping[str, Any]) -> str:
        """A path of info.json with its fields filled in, below the root."""
        template = self.info.get(name)

        def fill(match: re.Match) -> str:
            if match[1] not in fields:
                raise IngestError(f'{self.where}: {name}: unknown field {match[0]}')
            value = fields[match[1]]
            return f'{value:0{match[2]}d}' if match[2] else str(value)

        path = FIELD.sub(fill, template) if isinstance(template, str) else ''
        if not path or Path(path).is_absolute() or '..' in Path(path).parts or '{' in path:
            raise IngestError(
                f'{self.where}: {name}: got {str(template)[:80]!r}, expected a path in the data set'
            )
        return path

    def _second(self) -> Iterator[Episode]:
        """Episodes of version 2.x."""
        meta, chunk = self.root / 'meta', self.info.get('chunks_size', 1000)
        if type(chunk) is not int or chunk < 1:
            got = actions_map.shown(chunk)
            raise IngestError(f'{self.where}: chunks_size: got {got}, expected a whole number')
        self.tasks = {}
        for where, row in files.read_json_lines(meta / 'tasks.jsonl'):
            number, text = _fields(row, where, task_index=int, task=str)
            self.tasks[number] = text
        for where, row in files.read_json_lines(meta / 'episodes.jsonl'):
            number, length = _fields(row, where, episode_index=int, length=int)
            fields = {'episode_chunk': number // chunk, 'episode_index': number}
            picture = (
                ''
                if self.embedded
                else self._path('video_path', fields | {'video_key': self.camera})
            )
            yield Episode(
                number,
                length,
                self._path('data_path', fields),
                picture,
                0.0,
                _texts(row.get('tasks')),
            )

    def _third(self) -> Iterator[Episode]:
        """Episodes of version 3.x."""
        rows = _table(self.root / 'meta' / 'tasks.parquet')
        texts = next(
            (name for name, column in rows.items() if column and isinstance(column[0], str)), None
        )
        if texts is None or 'task_index' not in rows:
            raise IngestError(
                f'{self.root / "meta" / "tasks.parquet"}: expected task and task_index'
            )
        self.tasks = {
            number: text
            for number, text in zip(rows['task_index'], rows[texts], strict=True)
            if isinstance(text, str)
        }
        key = f'videos/{self.camera}'
        wanted = ['episode_index', 'length', 'tasks', 'data/chunk_index', 'data/file_index']
        times = (
            []
            if self.embedded
            else [f'{key}/{one}' for one in ('chunk_index', 'file_index', 'from_timestamp')]
        )
        paths = [
            path
            for path in files.walk(self.root / 'meta' / 'episodes')
            if path.suffix == '.parquet'
        ]
        for path in paths:
            found = _table(path, [*wanted, *times])
            for row in zip(*found.values(), strict=True):
                one = dict(zip(found, row, strict=True))
                where = f'{path} episode {one["episode_index"]}'
                number, length, chunk, file = _fields(
                    one,
                    where,
                    **dict.fromkeys(
                        ('episode_index', 'length', 'data/chunk_index', 'data/file_index'), int
                    ),
                )
                picture, start = '', 0.0
                if times:
                    part = _fields(one, where, **{times[0]: int, times[1]: int, times[2]: float})
                    fields = {
                        'video_key': self.camera,
                        'chunk_index': part[0],
                        'file_index': part[1],
                    }
                    picture, start = self._path('video_path', fields), part[2]
                data = self._path('data_path', {'chunk_index': chunk, 'file_index': file})
                yield Episode(number, length, data, picture, start, _texts(one['tasks']))

    def rows(self, episode: Episode, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns [N D] of the rows of an episode, and its `task_index` [N 1], in order.

        Raises:
          IngestError: the file cannot be read, or has other rows than meta/ says.
        """
        path = self.root / episode.data
        more = [name for name in ('task_index',) if 'task_index' in self.names]
        wanted = list(dict.fromkeys(['frame_index', *columns, *more]))
        table = _table(path, wanted, episode.number, arrays=True)
        order = np.argsort(table['frame_index'][:, 0], kind='stable')
        if len(order) != episode.length or not 0 < len(order) <= MOST_ROWS:
            raise IngestError(
                f'{path}: got {len(order)} rows of episode {episode.number}, '
                f'expected {episode.length}'
            )
        table.setdefault('task_index', np.full((len(order), 1), -1))
        for name in columns:
            if table[name].shape[1] != len(self.names[name]):
                raise IngestError(
                    f'{path}: {name}: got {table[name].shape[1]} values in a row, expected '
                    f'{len(self.names[name])}'
                )
        return {name: values[order] for name, values in table.items()}

    def captions(self, episode: Episode, tasks: np.ndarray) -> tuple[tuple[int, int, str], ...]:
        """(first frame, end, caption) of the runs of one task in an episode of task numbers [N]."""
        tasks = np.nan_to_num(tasks, nan=-1, posinf=-1, neginf=-1)
        edges = [0, *(np.flatnonzero(np.diff(tasks)) + 1).tolist(), len(tasks)]
        whole = '. '.join(episode.tasks)
        return tuple(
            (first, end, ' '.join(self.tasks.get(int(tasks[first]), whole).split()))
            for first, end in zip(edges, edges[1:], strict=False)
        )

    def frames(self, episode: Episode, chosen: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the chosen frames of an episode, uint8 [H W 3] each."""
        if not self.embedded:
            times = episode.start + chosen / self.fps
            yield from video.read_frames_at(self.root / episode.video, times)
            return
        rows = _table(self.root / episode.data, ['frame_index', self.camera], episode.number)
        order = np.argsort(rows['frame_index'], kind='stable')
        for index in chosen:
            yield self._picture(rows[self.camera][order[index]])

    def _picture(self, cell: Any) -> np.ndarray:
        from PIL import Image

        data = cell.get('bytes') if isinstance(cell, dict) else None
        if data is None:
            path = str(cell.get('path') if isinstance(cell, dict) else cell)
            if Path(path).is_absolute() or '..' in Path(path).parts:
                raise IngestError(
                    f'{self.camera}: got {path[:80]!r}, expected a path in the data set'
                )
            return video.read_image(self.root / path)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return video.to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise IngestError(f'{self.camera}: not readable as an image ({error})') from error


@functools.lru_cache(maxsize=4)
def open_dataset(root: Path, camera: str | None) -> Dataset:
    """Opens a data set, once per process."""
    return Dataset(root, camera)


def part_names(feature: Mapping[str, Any]) -> list[str]:
    """Names of the values of a feature; their numbers where it has none."""
    shape, names = feature.get('shape'), feature.get('names')
    whole = isinstance(shape, list) and all(type(one) is int and 0 < one < 10**6 for one in shape)
    count = int(np.prod(shape)) if whole and len(shape) == 1 else 1
    if isinstance(names, dict):  # a name for the axis
        names = next(iter(names.values()), None)
    if isinstance(names, list) and len(names) == count and len(set(map(str, names))) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def _texts(tasks: Any) -> tuple[str, ...]:
    return tuple(map(str, tasks)) if isinstance(tasks, list) else ()


def _fields(row: Any, where: str, **kinds: type) -> list[Any]:
    """Values of a row, of the given types; whole numbers are at least 0.

    Raises:
      IngestError: a value is missing or of another type.
    """
    found = []
    for name, kind in kinds.items():
        value = row.get(name) if isinstance(row, dict) else None
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or kind is not str and not 0 <= value < 10**12:
            raise IngestError(
                f'{where}: {name}: got {actions_map.shown(value)}, expected '
                + {int: 'a whole number', float: 'a number', str: 'text'}[kind]
            )
        found.append(value)
    return found


def _table(
    path: Path,
    columns: Sequence[str] | None = None,
    episode: int | None = None,
    arrays: bool = False,
) -> dict[str, Any]:
    """Columns of a parquet file: lists, or arrays [N D].

    Args:
      path: the file.
      columns: names; None = all.
      episode: only rows of this number.
      arrays: whether the columns are numbers.

    Raises:
      IngestError: the file cannot be read, or has no such columns.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise IngestError(f'{path}: {"is not a file" if path.exists() else "no such file"}')
    try:
        there = pyarrow.parquet.read_schema(path).names
        missing = sorted(set(columns or ()) - set(there))
        if missing:
            raise IngestError(f'{path}: has no column {", ".join(missing)}')
        only = None if episode is None else [('episode_index', '==', episode)]
        table = pyarrow.parquet.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=only,
            partitioning=None,
        )
        found = {name: table[name].to_pylist() for name in table.column_names}
        if not arrays:
            return found
        return {
            name: np.array(column, np.float64).reshape(len(column), -1 if column else 1)
            for name, column in found.items()
        }
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, IngestError):
            raise
        raise IngestError(
            f'{path}: not readable as parquet ({" ".join(str(error).split())[:200]})'
        ) from error
