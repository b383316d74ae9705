"""Recorded clips to training batches through grain, with a state that resumes exactly.

Every batch follows from (data set, seed, step) alone: grain draws the crop and the mirror of
element i from the seed and i, so a restored state goes on with the very batches that would have
come.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

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

EPOCHS = 2**32  # as good as endless; what grain calls endless overflows in batches of one
# A mirror across the car's axis turns these round: left is positive.
MIRROR_SIGN = np.array(
    [-1 if name in ('yaw_rate', 'x', 'heading') else 1 for name in TELEMETRY], np.float32
)
MIRROR_KEYS = [KEYS.index({'A': 'D', 'D': 'A'}.get(key, key)) for key in KEYS]
MIRROR_MOUSE = np.array([1, -1], np.float32)
MIRROR_POSE = np.array([-1 if name in ('y', 'yaw', 'roll') else 1 for name in POSE], np.float32)


class Clips:
    """The clips of a split, of one folder or several (`records.folders`): `len(clips)`, `clips[i]`;
    a grain random-access source.

    `captions` is the sorted tuple of all captions; `actions` says whether some clip has keys, mouse
    or pose. With `cache` the decoded frames stay in memory
    (about 1.1 GB an hour at 64 x 96), which makes a crop cost a copy; without, a clip is decoded at
    each access (5 ms).
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
        """Where each clip lies, for messages."""
        return tuple(f'{shard.path} record {index}' for shard, index in self.where)


class _Numbered:
    """`(i, clips[i])`, so that a batch can say what it was cut from."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return index, self.clips[index]

    def __repr__(self):
        return repr(self.clips)


def crop(clip: Clip, start: int, frames: int) -> Clip:
    """`frames` = 1 + 4k frames from `start`, a multiple of four: again a clip."""
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
    """The clip seen in a mirror: left and right change places in all that it holds."""
    return replace(
        clip,
        frames=clip.frames[:, :, ::-1],
        controls=np.array((*MIRRORED, NULL), np.int8)[clip.controls],
        telemetry=clip.telemetry * MIRROR_SIGN,
        keyboard=clip.keyboard[:, MIRROR_KEYS],
        mouse=clip.mouse * MIRROR_MOUSE,
        pose=clip.pose * MIRROR_POSE,
    )


def rows(batch: int, index: int, count: int) -> slice:
    """The rows of a batch that process `index` of `count` reads.

    Raises:
      ValueError: the batch does not divide.
    """
    if batch % count:
        raise ValueError(f'train.batch: got {batch}, expected a multiple of {count} processes')
    return slice(index * batch // count, (index + 1) * batch // count)


class Loader:
    """An endless iterator of batches whose place `state()` saves and `restore(state)` finds again.

    A batch: `frames` uint8 [B F H W 3], `controls` int32 [B T] (the control held while a latent
    frame's frames were made; latent 0: the one before), `caption` int32 [B] into `loader.captions`,
    `telemetry` float32 [B F 6], `clip` int32 [B] into `loader.names`. Where some clip has keys,
    mouse or pose, also `keyboard` int8 [B F 4], `mouse` float32 [B F 2] and `pose` float32
    [B F 6], what was held while each frame was made; as in `records.Clip` where unknown.

    Args:
        frames: F = 1 + 4k of each crop; crops start at random multiples of four.
        split: 'train' or 'heldout'.
        mirror: share of crops that are mirrored.
        process: (index, count) of this process. All of them draw the same batches, of `batch`
          examples in all, and each reads its own rows.
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
        self.frames, self.mirror, self.seed = frames, mirror, seed
        self.batch = batch
        self.share(*process)
        self.elements = (
            grain.MapDataset.source(_Numbered(self.clips))
            .seed(seed)
            .shuffle()
            .repeat(EPOCHS)
            .random_map(self._example)
        )
        batches = grain.MapDataset.range(len(self.elements) // batch).map(self._batch)
        # One thread prepares the next batches beside the training step; the order stays the same.
        self.iterator = iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        )

    def share(self, index: int, count: int):
        """From the first batch on, reads part `index` of `count` equal parts of each batch."""
        self.rows = rows(self.batch, index, count)

    def _batch(self, index):
        start = index * self.batch
        examples = [self.elements[start + row] for row in range(self.batch)[self.rows]]
        return {name: np.stack([one[name] for one in examples]) for name in examples[0]}

    def _example(self, numbered, rng):
        number, clip = numbered
        last = (len(clip.frames) - self.frames) // FRAMES_PER_LATENT
        clip_ = crop(clip, FRAMES_PER_LATENT * int(rng.integers(last + 1)), self.frames)
        if rng.random() < self.mirror:
            clip_ = mirror(clip_)
        return {
            'frames': np.ascontiguousarray(clip_.frames),
            'controls': clip_.controls[::FRAMES_PER_LATENT].astype(np.int32),
            'caption': np.int32(self.captions.index(clip.caption)),
            'clip': np.int32(number),
            'telemetry': clip_.telemetry,
            **({name: getattr(clip_, name) for name in ACTIONS} if self.clips.actions else {}),
        }

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)

    def state(self) -> bytes:
        """The place in the data, as JSON bytes."""
        return json.dumps(
            {'clips': len(self.clips), 'seed': self.seed, 'grain': self.iterator.get_state()}
        ).encode()

    def restore(self, state: bytes):
        """Goes on where `state` was taken; refuses the state of other data."""
        saved = json.loads(state)
        if (saved['clips'], saved['seed']) != (len(self.clips), self.seed):
            raise ValueError(
                f'loader.restore: the state is of {saved["clips"]} clips and seed {saved["seed"]}, '
                f'this loader has {len(self.clips)} clips and seed {self.seed}: '
                'the batches would differ'
            )
        self.iterator.set_state(saved['grain'])
