"""Clips from LeRobot data sets, whose files `lerobot_files` opens.

`actions_map` says what the columns mean. An episode becomes one clip, or several if it is long or
its task changes. Captions are the tasks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matrix_jax.data import actions_map, files, footage, frame_actions, records
from matrix_jax.data.actions_map import ActionsMap
from matrix_jax.data.frame_actions import FrameActions
from matrix_jax.data.ingest import IngestError, IngestReport, VideoSource, check, check_clip_length
from matrix_jax.data.lerobot_files import open_dataset, part_names

OWN_MAP = 'meta/actions_map.yaml'  # of data sets that `lerobot_export` writes


def needs_pyarrow(option: str):
    """Raises IngestError unless pyarrow is installed."""
    if importlib.util.find_spec('pyarrow') is None:
        raise IngestError(f"{option} needs pyarrow: pip install 'matrix_jax[lerobot]'")


@dataclass(frozen=True)
class LeRobotReader:
    """Reads the clips of episodes.

    Attributes:
      height, width, fps: size and rate of the clips.
      actions: what the columns of the data set mean.
      shortest: frames of the shortest clip.
      held_out: share of the episodes in heldout-* shards.
    """

    height: int
    width: int
    fps: int = 16
    actions: ActionsMap = ActionsMap()
    shortest: int = 33
    held_out: float = 0.1
    kind: str = 'lerobot'

    def __post_init__(self):
        check(self)
        check_clip_length(self.shortest, footage.LONGEST)

    def clips(
        self, root: Path, source: VideoSource, report: IngestReport
    ) -> Iterator[records.Clip]:
        """Yields the clips of an episode; `report` counts those that are too short.

        Raises:
          VideoError: the video is damaged, or ends before the episode.
          IngestError: the rows cannot be read.
        """
        dataset = open_dataset(root, self.actions.camera)
        episode = dataset.episodes[source.episode]
        rows = dataset.rows(episode, self.actions.columns)
        count = len(rows['task_index'])
        report.seconds += count / dataset.fps
        found = self.actions.read(rows, dataset.names, dataset.fps)
        times = np.arange(count) / dataset.fps
        found['captions'] = dataset.captions(episode, rows['task_index'][:, 0])
        actions = FrameActions(times=times, **found)
        chosen = frame_actions.sample(times, self.fps)
        frames = dataset.frames(episode, chosen)
        yield from frame_actions.clips(frames, chosen, actions, self, source, report)


def find(root: Path, actions: ActionsMap, fps: float) -> list[VideoSource]:
    """Returns the episodes of a data set.

    Args:
      root: its folder.
      actions: what its columns mean.
      fps: frames per second of the clips.

    Raises:
      IngestError: the folder is no data set, or has none of the columns.
    """
    dataset = open_dataset(root, actions.camera)
    actions.check(dataset.names)
    frame_actions.check_rate(dataset.fps, fps, root)
    return [
        VideoSource(
            episode.video or episode.data,
            caption=' '.join('. '.join(episode.tasks).split()),
            labels=f'{episode.data} {_size(root / episode.data)}',
            episode=episode.number,
        )
        for episode in sorted(dataset.episodes.values(), key=lambda one: one.number)
    ]


def load_map(root: Path, path: str | None) -> ActionsMap:
    """Returns the map of a file, or that of the data set itself; 'none' = an empty one.

    Raises:
      IngestError: there is no map; names the columns of the data set.
    """
    if not (root / 'meta' / 'info.json').is_file():
        raise IngestError(f'--lerobot {root}: expected a folder with meta/info.json')
    if path == 'none':
        return ActionsMap()
    if path is not None or (root / OWN_MAP).is_file():
        try:
            return actions_map.read(Path(path) if path is not None else root / OWN_MAP)
        except IngestError as error:
            raise IngestError(
                f'--actions-map {error}' if path is not None else str(error)
            ) from error
    info = files.read_json(root / 'meta' / 'info.json')
    features = info.get('features') if isinstance(info, dict) else None
    there = [
        f'{name} ({", ".join(part_names(feature)[:8])})'
        for name, feature in (features.items() if isinstance(features, dict) else ())
        if isinstance(feature, dict) and name.startswith('action')
    ]
    raise IngestError(
        '--actions-map: got nothing, expected a YAML file that says which columns press which '
        'keys, or none for frames and captions alone; the data set has '
        + ('; '.join(there) or 'no actions')
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
