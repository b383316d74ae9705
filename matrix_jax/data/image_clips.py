"""Encoded short clips that begin with a picture, memory-mapped.

A window of `data.latents` has frames before it; here the first latent frame of a clip encodes a
single picture, as at the start of a stream. A store also holds the picture, its image condition and
the actions. If the world allows it, every other clip is stored as its mirror image.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from matrix_jax.data import cache, records
from matrix_jax.data.batches import ResumableBatches, shuffled
from matrix_jax.data.loader import crop, mirror
from matrix_jax.parallel import compilation

TOGETHER = 8  # clips encoded in one batch
# Array -> name of its file.
ARRAYS = {'latents': 'latents', 'condition': 'told', 'picture': 'picture', 'actions': 'actions'}


class ClipStore:
    """Encoded clips: `len(store)`, and an array [M ...] for each name of ARRAYS.

    Attributes:
      names: origin of each clip, for messages.
      latents: float16 [M T H W C].
      condition: float16 [M T H W Cc], image condition of the network.
      picture: uint8 [M H W 3], the first frame.
      actions: float32 [M F A], actions held while each frame was made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = json.loads((folder / 'store.json').read_text())['names']
        for name, file in ARRAYS.items():
            setattr(self, name, np.load(folder / f'{file}.npy', mmap_mode='r'))

    def __len__(self):
        return len(self.names)


class ClipBatches(ResumableBatches):
    """Batches of a store: its arrays, and `clip` int32 [B], indices into `names`.

    Args:
      store: encoded clips.
      batch: B over all processes.
      seed: seed of the order.
      more: further arrays by name; a shorter one restricts the batches to the first clips.
      process: (index, count) of this process.
    """

    def __init__(
        self, store: ClipStore, batch: int, seed: int, more=None, process: tuple[int, int] = (0, 1)
    ):
        self.names = store.names
        self.arrays = {name: getattr(store, name) for name in ARRAYS} | (more or {})
        count = min(map(len, self.arrays.values()))
        super().__init__(batch, process, {'places': count, 'seed': seed})
        self.start(shuffled([(np.arange(count), 1)], seed, batch, self._clips), prefetch=4)

    def _clips(self, clips):
        clips = clips[self.rows]
        return {
            'clip': clips.astype(np.int32),
            **{
                name: np.stack([array[clip] for clip in clips])
                for name, array in self.arrays.items()
            },
        }


def encode(
    data, world, params, folder: str | os.PathLike, frames: int, split: str = 'train'
) -> ClipStore:
    """Cuts the recordings of `data` into clips and encodes each, unless that was done.

    Args:
      data: folder of recorded clips, or several (`records.folders`).
      world: gives `encode_frames`, `tell` and `vocabulary`.
      params: the world's parameters.
      folder: folder of all stores.
      frames: frames F = 1 + 4k of a clip.
      split: 'train' or 'heldout'.

    Raises:
      RecordError: no recording is long enough, or one has another size, no keys or no mouse.
      ValueError: the world has keys that recordings lack.
    """
    keys = columns(world.vocabulary)
    opened = [
        records.Shard(shard)
        for one in records.folders(data)
        for shard in records.shards(Path(one), split)
    ]
    source = {
        'shards': [shard.digest() for shard in opened],
        'mirror': world.cfg.mirror,
        'frames': frames,
        'keys': keys,
        **world.cfg.vae.normalisation,
        'encoder': cache.params_digest(params['vae']['encoder']),
    }

    def fill(part):
        places = [
            (shard, index, start)
            for shard in opened
            for index in range(len(shard))
            for start in range(0, len(shard[index].frames) - frames + 1, frames + 3)
        ]
        if not places:
            raise records.RecordError(f'{data}: no {split} recording of {frames} frames')
        _write(part, source, places, world, params)

    final = Path(folder) / f'scenes-{cache.name(source)}' / split
    return ClipStore(cache.build(final, 'store.json', fill))


def columns(vocabulary) -> list[int]:
    """Index in `records.KEYS` of each key of a vocabulary.

    Raises:
      ValueError: recordings lack a key.
    """
    keys = vocabulary.mode.keys
    if not set(keys) <= set(records.KEYS):
        raise ValueError(
            f'world.mode: got keys {keys}, expected some of {records.KEYS}, which recordings have'
        )
    return [records.KEYS.index(key) for key in keys]


def _write(folder, source, places, world, params):
    arrays = {}
    for first, batch in _encode(source, places, world, params):
        for name, values in batch.items():
            if name not in arrays:
                shape = len(places), *values.shape[1:]
                path = folder / f'{ARRAYS[name]}.npy'
                arrays[name] = np.lib.format.open_memmap(path, 'w+', values.dtype, shape)
            arrays[name][first : first + len(values)] = values
    for array in arrays.values():
        array.flush()
    names = [
        f'{shard.path} record {index} frame {start}{" mirrored" * _mirrored(source, number)}'
        for number, (shard, index, start) in enumerate(places)
    ]
    (folder / 'store.json').write_text(json.dumps({'source': source, 'names': names}))


def _encode(source, places, world, params):
    """Yields (index of the first clip, arrays of a batch of clips)."""
    from tqdm import tqdm

    frames, keys = source['frames'], source['keys']
    count = 1 + (frames - 1) // records.FRAMES_PER_LATENT
    code = compilation.jit(
        lambda params, frames: (
            world.encode_frames(params, frames),
            world.image_condition(params, frames[:, :1], count),
        )
    )
    for first in tqdm(range(0, len(places), TOGETHER), desc='encode', unit='batch'):
        clips = []
        for number, (shard, index, start) in enumerate(places[first : first + TOGETHER], first):
            clip = crop(shard[index], start, frames)
            _check(clip, world, f'{shard.path} record {index}')
            clips.append(mirror(clip) if _mirrored(source, number) else clip)
        pixels = np.stack([clip.frames for clip in clips])
        actions = np.stack([clip.keyboard[:, keys] for clip in clips]).astype(np.float32)
        if world.vocabulary.mode.mouse:
            mouse = [clip.mouse for clip in clips]
            actions = np.concatenate([actions, mouse], axis=-1, dtype=np.float32)
        padded = np.concatenate([pixels, pixels[-1:].repeat(TOGETHER - len(clips), axis=0)])
        made, condition = (
            np.asarray(part)[: len(clips)].astype(np.float16) for part in code(params, padded)
        )
        yield (
            first,
            {'latents': made, 'condition': condition, 'picture': pixels[:, 0], 'actions': actions},
        )


def _check(clip: records.Clip, world, where: str):
    """Raises RecordError unless a clip has the world's size, keys and mouse."""
    lacks = [name for name in ('keyboard', 'mouse') if not clip.knows(name)]
    size, wanted = clip.frames.shape[1:3], (world.cfg.height, world.cfg.width)
    if size != wanted or lacks:
        raise records.RecordError(
            f'{where}: got frames {list(size)}'
            f'{" without " + " and ".join(lacks) if lacks else ""}, expected {list(wanted)}, '
            "the world's size, with keyboard and mouse"
        )


def _mirrored(source, number: int) -> bool:
    return source['mirror'] and number % 2 == 1
