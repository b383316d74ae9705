"""Recorded clips as training batches.

A batch depends only on the data, the seed and the step: grain draws the crop and the mirroring of
element i from (seed, i). A restored position continues with exactly the same batches.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from matrix_jax.data.batches import EPOCHS, ResumableBatches
from matrix_jax.data.records import (
    ACTIONS,
    FRAMES_PER_LATENT,
    KEYS,
    MIRRORED,
    NULL,
    POSE,
    TELEMETRY,
    Clip,
    RecordError,
    Shard,
    folders,
    shards,
)

# Signs under a mirror across the car's axis; left is positive.
MIRROR_SIGN = np.array(
    [-1 if name in ('yaw_rate', 'x', 'heading') else 1 for name in TELEMETRY], np.float32
)
MIRROR_KEYS = [KEYS.index({'A': 'D', 'D': 'A'}.get(key, key)) for key in KEYS]
MIRROR_MOUSE = np.array([1, -1], np.float32)
MIRROR_POSE = np.array([-1 if name in ('y', 'yaw', 'roll') else 1 for name in POSE], np.float32)


class Clips:
    """Clips of a split of one or more folders (`records.folders`), a grain random-access source.

    Args:
      data: folder or folders.
      split: 'train' or 'heldout'.
      least_frames: leaves out shorter clips.
      themes: leaves out clips of other themes; None = all.
      cache: whether decoded clips stay in memory (about 1.1 GB per hour at 64 x 96); otherwise each
        access decodes a clip (5 ms).

    Attributes:
      captions: all captions, sorted.
      actions: whether any clip has keys, mouse or pose.

    Raises:
      RecordError: no such clip, or clips of different sizes.
    """

    def __init__(
        self, data, split: str = 'train', least_frames: int = 1, themes=None, cache: bool = True
    ):
        names = folders(data)
        self.where, self.clips, captions = [], [], set()
        size, self.actions = None, False
        for path in (path for folder in names for path in shards(folder, split)):
            shard = Shard(path)
            for index in range(len(shard)):
                clip = shard[index]
                if len(clip.frames) < least_frames or (themes and clip.theme not in themes):
                    continue
                size = size or clip.frames.shape[1:]
                if clip.frames.shape[1:] != size:
                    raise RecordError(
                        f'{path} record {index}: got frames {clip.frames.shape[1:]}, '
                        f'expected {size} as in the clips before'
                    )
                self.where.append((shard, index))
                self.clips.append(clip if cache else None)
                captions.add(clip.caption)
                self.actions |= any(map(clip.knows, ACTIONS))
        if not self.where:
            raise RecordError(
                f'{", ".join(names)}: no {split} clip of {least_frames} frames'
                + (f' and theme {", ".join(themes)}' if themes else '')
            )
        self.captions = tuple(sorted(captions))

    def __len__(self):
        return len(self.where)

    def __getitem__(self, index) -> Clip:
        if self.clips[index] is not None:
            return self.clips[index]
        shard, record = self.where[index]
        return shard[record]

    def __repr__(self):  # grain names sources in its state and logs
        return f'Clips({len(self)})'

    @property
    def names(self) -> tuple[str, ...]:
        """Origin of each clip, for messages."""
        return tuple(f'{shard.path} record {index}' for shard, index in self.where)


class _Numbered:
    """`(i, clips[i])`, so that a batch can name its clips."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return index, self.clips[index]

    def __repr__(self):
        return repr(self.clips)


def crop(clip: Clip, start: int, frames: int) -> Clip:
    """Clip of `frames` = 1 + 4k frames from `start`, a multiple of four.

    Raises:
      ValueError: the crop does not lie within the clip.
    """
    if start % FRAMES_PER_LATENT or not 0 <= start <= len(clip.frames) - frames:
        raise ValueError(
            f'crop.start: got {start}, expected a multiple of {FRAMES_PER_LATENT} in '
            f'0..{len(clip.frames) - frames}'
        )
    window = slice(start, start + frames)
    return replace(
        clip,
        frames=clip.frames[window],
        controls=clip.controls[window],
        telemetry=clip.telemetry[window],
        **{name: getattr(clip, name)[window] for name in ACTIONS},
    )


def mirror(clip: Clip) -> Clip:
    """Mirror image of a clip: left and right are swapped in frames, controls and telemetry."""
    return replace(
        clip,
        frames=clip.frames[:, :, ::-1],
        controls=np.array((*MIRRORED, NULL), np.int8)[clip.controls],
        telemetry=clip.telemetry * MIRROR_SIGN,
        keyboard=clip.keyboard[:, MIRROR_KEYS],
        mouse=clip.mouse * MIRROR_MOUSE,
        pose=clip.pose * MIRROR_POSE,
    )


class Loader(ResumableBatches):
    """Endless batches of random crops.

    A batch holds `frames` uint8 [B F H W 3], `controls` int32 [B T] (the control held while the
    frames of a latent frame were made; for latent frame 0 the one before), `caption` int32 [B] into
    `captions`, `telemetry` float32 [B F 6] and `clip` int32 [B] into `names`. If any clip has keys,
    mouse or pose, also `keyboard` int8 [B F 4], `mouse` float32 [B F 2] and `pose` float32 [B F 6],
    held while each frame was made; unknown values are as in `records.Clip`.

    Args:
      data: folder or folders of recorded clips.
      frames: frames F = 1 + 4k of each crop; crops start at random multiples of four.
      batch: B over all processes.
      seed: seed of order, crops and mirroring.
      split: 'train' or 'heldout'.
      mirror: share of crops that are mirrored.
      themes, cache: see `Clips`.
      process: (index, count) of this process.

    Raises:
      ValueError: `frames` or `batch` is impossible.
      RecordError: see `Clips`.
    """

    def __init__(
        self,
        data,
        frames: int,
        batch: int,
        seed: int = 0,
        split: str = 'train',
        mirror: float = 0.5,
        themes=None,
        cache: bool = True,
        process: tuple[int, int] = (0, 1),
    ):
        import grain

        if frames < 1 or frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f'loader.frames: got {frames}, expected 1 + {FRAMES_PER_LATENT}k')
        if batch < 1:
            raise ValueError(f'loader.batch: got {batch}, expected 1 or more')
        self.clips = Clips(data, split, frames, themes, cache)
        self.captions, self.names = self.clips.captions, self.clips.names
        self.frames, self.mirror = frames, mirror
        super().__init__(batch, process, {'clips': len(self.clips), 'seed': seed})
        self.elements = (
            grain.MapDataset.source(_Numbered(self.clips))
            .seed(seed)
            .shuffle()
            .repeat(EPOCHS)
            .random_map(self._example)
        )
        batches = grain.MapDataset.range(len(self.elements) // batch).map(self._batch)
        self.start(batches, prefetch=2)

    def _batch(self, index):
        start = index * self.batch
        examples = [self.elements[start + row] for row in range(self.batch)[self.rows]]
        return {name: np.stack([one[name] for one in examples]) for name in examples[0]}

    def _example(self, numbered, rng):
        number, clip = numbered
        last = (len(clip.frames) - self.frames) // FRAMES_PER_LATENT
        cut = crop(clip, FRAMES_PER_LATENT * int(rng.integers(last + 1)), self.frames)
        if rng.random() < self.mirror:
            cut = mirror(cut)
        return {
            'frames': np.ascontiguousarray(cut.frames),
            'controls': cut.controls[::FRAMES_PER_LATENT].astype(np.int32),
            'caption': np.int32(self.captions.index(clip.caption)),
            'clip': np.int32(number),
            'telemetry': cut.telemetry,
            **({name: getattr(cut, name) for name in ACTIONS} if self.clips.actions else {}),
        }
