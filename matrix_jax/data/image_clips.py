"""Short clips that begin with a picture, each encoded on its own as a stream begins, memory-mapped.

A window of `data.latents` has frames before it; the first latent frame of a clip here is that of a
picture alone. Beside the latents lie the picture, what a network is told of it, and the actions.
Every other clip is stored as its mirror image, where the world allows it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from matrix_jax.data import latents, records
from matrix_jax.data.loader import crop, mirror
from matrix_jax.parallel import compilation
from matrix_jax.weights import diffusers_layout

TOGETHER = 8  # clips encoded side by side
ARRAYS = 'latents', 'told', 'picture', 'actions'


class ClipStore:
    """Encoded clips: `len(store)`, and an array [M ...] for each name of ARRAYS.

    Attributes:
      names: where each clip lies, for messages.
      latents: float16 [M T H W C].
      told: float16 [M T H W Cc], conditions of the network by the picture.
      picture: uint8 [M H W 3].
      actions: float32 [M F A], what was pressed while each frame was made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = json.loads((folder / 'store.json').read_text())['names']
        for name in ARRAYS:
            setattr(self, name, np.load(folder / f'{name}.npy', mmap_mode='r'))

    def __len__(self):
        return len(self.names)


class ClipBatches(latents.ShuffledBatches):
    """Batches of a store: its arrays, and clip int32 [B], clips by number in `names`.

    Args:
      store: encoded clips.
      batch: B of all processes together.
      seed: order.
      more: further arrays by name, of the first clips at least.
      process: (index, count) of this process.
    """

    def __init__(
        self, store: ClipStore, batch: int, seed: int, more=None, process: tuple[int, int] = (0, 1)
    ):
        self.names = store.names
        self.arrays = {name: getattr(store, name) for name in ARRAYS} | (more or {})
        count = min(map(len, self.arrays.values()))
        super().__init__(
            batch, process, {'places': count, 'seed': seed}, self._drawn, [(np.arange(count), 1)]
        )

    def _drawn(self, clips):
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
      folder: where stores lie, each under a name made of what it follows from; written aside and
        renamed, so a killed run leaves none.
      frames: F = 1 + 4k of a clip.
      split: 'train' or 'heldout'.

    Raises:
      RecordError: no recording is that long, or one without keys or mouse, or of another size.
      ValueError: the world has keys that recordings do not.
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
        'encoder': latents.digest(params['vae']['encoder']),
    }
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    final = Path(folder) / f'scenes-{name[:16]}' / split
    if not (final / 'store.json').exists():
        places = [
            (shard, index, start)
            for shard in opened
            for index in range(len(shard))
            for start in range(0, len(shard[index].frames) - frames + 1, frames + 3)
        ]
        if not places:
            raise records.RecordError(f'{data}: no {split} recording of {frames} frames')
        _write(final, source, places, world, params)
    return ClipStore(final)


def columns(vocabulary) -> list[int]:
    """The recorded key of each entry of a keyboard vector.

    Raises:
      ValueError: nobody records such a key.
    """
    keys = vocabulary.mode.keys
    if not set(keys) <= set(records.KEYS):
        raise ValueError(
            f'world.mode: got keys {keys}, expected some of {records.KEYS}, which recordings have'
        )
    return [records.KEYS.index(key) for key in keys]


def _write(final, source, places, world, params):
    def fill(part):
        filled, names = {}, []
        for first, made in _encode(source, places, world, params):
            for name, values in made.items():
                if name not in filled:
                    filled[name] = np.lib.format.open_memmap(
                        part / f'{name}.npy', 'w+', values.dtype, (len(places), *values.shape[1:])
                    )
                filled[name][first : first + len(values)] = values
        for array in filled.values():
            array.flush()
        for number, (shard, index, start) in enumerate(places):
            turned = ' mirrored' * _turned(source, number)
            names.append(f'{shard.path} record {index} frame {start}{turned}')
        (part / 'store.json').write_text(json.dumps({'source': source, 'names': names}))

    diffusers_layout.replace_folder(final, fill)


def _encode(source, places, world, params):
    """Yields (number of the first clip, arrays of some clips)."""
    from tqdm import tqdm

    frames, keys = source['frames'], source['keys']
    count = 1 + (frames - 1) // records.FRAMES_PER_LATENT
    code = compilation.jit(
        lambda params, frames: (
            world.encode_frames(params, frames),
            world.image_condition(params, frames[:, :1], count),
        )
    )
    size = world.cfg.height, world.cfg.width
    for first in tqdm(range(0, len(places), TOGETHER), desc='encode', unit='batch'):
        clips = []
        for number, (shard, index, start) in enumerate(places[first : first + TOGETHER], first):
            clip = crop(shard[index], start, frames)
            if clip.frames.shape[1:3] != size or not (
                clip.knows('keyboard') and clip.knows('mouse')
            ):
                raise records.RecordError(
                    f'{shard.path} record {index}: got frames {list(clip.frames.shape[1:3])}'
                    f'{"" if clip.knows("keyboard") else " without keys"}'
                    f'{"" if clip.knows("mouse") else " without mouse"}, expected {list(size)}, '
                    "the world's size, with keys and mouse"
                )
            clips.append(mirror(clip) if _turned(source, number) else clip)
        shown = np.stack([clip.frames for clip in clips])
        actions = np.stack([clip.keyboard[:, keys] for clip in clips]).astype(np.float32)
        if world.vocabulary.mode.mouse:
            actions = np.concatenate(
                [actions, [clip.mouse for clip in clips]], axis=-1, dtype=np.float32
            )
        padded = np.concatenate([shown, shown[-1:].repeat(TOGETHER - len(clips), axis=0)])
        made, told = (
            np.asarray(part)[: len(clips)].astype(np.float16) for part in code(params, padded)
        )
        yield first, {'latents': made, 'told': told, 'picture': shown[:, 0], 'actions': actions}


def _turned(source, number: int) -> bool:
    return source['mirror'] and number % 2 == 1
