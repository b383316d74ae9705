"""Videos to records: groups of videos become shards, each with a report of kept and dropped clips.

A reader (`footage.FootageReader`, `index.IndexReader`) turns a video into clips. The shards depend
only on the reader and the list of videos. A group with a report is not read again, and a folder
made from other videos or settings is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.data import collect, records

SHARD_FILES, SHARD_BYTES = 64, 64 * 2**20  # of the videos that share a shard, at most


class IngestError(UsageError):
    """The videos that were given make no data set."""


@dataclass(frozen=True)
class VideoSource:
    """A video and what is known about it.

    Attributes:
      path: path of the video, relative to the root.
      caption: caption, may be empty.
      signal: one control symbol per frame of the file; empty if unknown.
      start: first frame of the clip.
      cameras: digest of its camera file (`data.cameras`); empty if it has none.
      labels: digest of the file with the actions of its frames; empty if it has none.
      episode: number of the episode, if a video can hold several; else None.
    """

    path: str
    caption: str = ''
    signal: tuple[str, ...] = ()
    start: int = 0
    cameras: str = ''
    labels: str = ''
    episode: int | None = None

    @property
    def name(self) -> str:
        """The path, and the episode if there is one; all clips of a name are in one split."""
        return self.path if self.episode is None else f'{self.path} episode {self.episode}'


@dataclass
class IngestReport:
    """Counts of videos read and clips kept.

    Attributes:
      files: number of files.
      seconds: seconds of video that were read.
      clips, frames: clips and frames that were kept.
      dropped: reason -> number of clips dropped.
      skipped: path -> why the file could not be read.
    """

    files: int = 0
    seconds: float = 0.0
    clips: int = 0
    frames: int = 0
    dropped: Counter = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, other: IngestReport):
        for name in ('files', 'seconds', 'clips', 'frames'):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.skipped.update(other.skipped)

    def text(self, fps: int) -> str:
        """Lines of skipped files, counts by reason, and what was kept."""
        dropped = ', '.join(f'{why} {count}' for why, count in sorted(self.dropped.items()))
        return '\n'.join(
            [
                *(f'skipped: {why}' for why in self.skipped.values()),
                f'files: {self.files - len(self.skipped)} read, {len(self.skipped)} skipped',
                f'clips: {self.clips} kept, {sum(self.dropped.values())} dropped'
                + (f' ({dropped})' if dropped else ''),
                f'{self.frames} frames, {self.frames / fps / 3600:.4f} hours of '
                f'{self.seconds / 3600:.4f} read',
            ]
        )


def check(settings):
    """Raises IngestError unless the fields that all readers share are valid."""
    for name in ('height', 'width', 'fps'):
        if getattr(settings, name) < 1:
            raise IngestError(f'{name}: got {getattr(settings, name)}, expected at least 1')
    if not 0 <= settings.held_out < 1:
        raise IngestError(f'--held-out: got {settings.held_out:g}, expected 0 <= fraction < 1')


def check_clip_length(shortest: int, longest: int):
    """Raises IngestError unless `shortest` frames make a clip of at most `longest`."""
    if not 5 <= shortest <= longest:
        raise IngestError(f'--shortest: got {shortest} frames, expected 5 to {longest}')


def run(
    settings, root: Path, sources: Sequence[VideoSource], out: Path, workers: int = 1
) -> IngestReport:
    """Makes the missing shards of a folder and returns the report of all shards.

    Args:
      settings: a reader, such as `footage.FootageReader`.
      root: folder that the paths of `sources` are relative to.
      sources: the videos.
      out: folder of the shards.
      workers: number of processes; it does not change the result.

    Raises:
      ValueError: the folder holds other data.
      IngestError: no clip was kept; nothing is left behind.
    """
    from tqdm import tqdm

    collect.check_workers(workers)
    sizes = [_size(root / source.path) for source in sources]
    episodes = Counter(source.path for source in sources if source.episode is not None)
    listing = json.dumps([(_listed(source), size) for source, size in zip(sources, sizes)])
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    made = [path for path in (out / collect.MANIFEST, out, *out.parents) if not path.exists()]
    collect.claim(settings, out, {'sources': len(sources), 'digest': digest})
    total, todo = IngestReport(), []
    with tqdm(total=len(sources), unit='file') as bar:
        weights = [size // max(1, episodes[one.path]) for one, size in zip(sources, sizes)]
        for split, number, group in _groups(sources, weights, settings.held_out):
            job = settings, root, group, out / f'{split}-{number:05d}{records.SUFFIX}'
            if _report_path(job[-1]).exists():
                total.add(_read_report(job[-1]))
                bar.update(len(group))
            else:
                todo.append(job)
        for report in collect.pooled(_shard, todo, workers):
            total.add(report)
            bar.update(report.files)
    if not total.clips:
        for path in (*(_report_path(job[-1]) for job in todo), *made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise IngestError('no clip was kept; ' + '; '.join(total.text(settings.fps).splitlines()))
    return total


def clip(
    frames: Sequence[np.ndarray], settings, source: VideoSource, caption: str | None = None, **known
) -> records.Clip:
    """Clip of a video; `known` are its controls and telemetry, `caption` None is the source's."""
    return records.Clip(
        np.stack(frames),
        caption=source.caption if caption is None else caption,
        theme=settings.kind,
        seed=_number(source.name),
        fps=settings.fps,
        **known,
    )


def _groups(sources, sizes, held_out) -> Iterator[tuple[str, int, list[VideoSource]]]:
    """Yields (split, number, sources) of every shard; the split of a video follows its name."""
    names = sorted({source.name for source in sources}, key=lambda name: (_number(name), name))
    held = set(names[: round(held_out * len(names))])
    for split in ('train', 'heldout'):
        group, weight, number = [], 0, 0
        for source, size in zip(sources, sizes):
            if (source.name in held) != (split == 'heldout'):
                continue
            if group and (len(group) == SHARD_FILES or weight + size > SHARD_BYTES):
                yield split, number, group
                group, weight, number = [], 0, number + 1
            group, weight = [*group, source], weight + size
        if group:
            yield split, number, group


def _shard(job) -> IngestReport:
    """Writes one shard and then its report, which marks the shard as complete."""
    settings, root, group, path = job
    report = IngestReport(files=len(group))

    def clips():
        for source in group:
            try:
                for made in settings.clips(root, source, report):
                    report.clips += 1
                    report.frames += len(made.frames)
                    yield made
            except (UsageError, records.RecordError, OSError) as error:
                report.skipped[source.name] = str(error).removeprefix(f'{root}/')

    found = clips()
    first = next(found, None)
    if first is not None:  # a shard without clips would count as damaged
        records.write_shard(path, itertools.chain([first], found))
    part = _report_path(path).with_suffix('.part')
    part.write_text(json.dumps(vars(report), indent=1, sort_keys=True) + '\n')
    os.replace(part, _report_path(path))
    return report


def _report_path(shard: Path) -> Path:
    return shard.with_suffix('.json')


def _read_report(shard: Path) -> IngestReport:
    """Report of a finished shard.

    Raises:
      IngestError: the report or the shard is damaged.
    """
    path = _report_path(shard)
    try:
        report = IngestReport(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise IngestError(f'{path}: not a report ({error}); delete it to make it anew') from error
    if report.clips and len(records.Shard(shard)) != report.clips:
        raise IngestError(
            f'{shard}: got {len(records.Shard(shard))} clips, expected '
            f'{report.clips}; delete {path.name} to make it anew'
        )
    return report


def _listed(source: VideoSource) -> dict:
    """Fields of a source; without later ones that are not set, so that older folders agree."""
    unset = {'cameras': '', 'labels': '', 'episode': None}
    return {
        name: value
        for name, value in asdict(source).items()
        if name not in unset or value != unset[name]
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(name: str) -> int:
    return zlib.crc32(name.encode('utf-8', 'surrogateescape'))
