"""Clips encoded once: latents, controls and captions of whole episodes, memory-mapped.

Episodes go through the encoder whole, so that a window cut from the middle has the temporal context
that streamed latents have. One file per split; where the world allows it, every episode is stored
a second time as its mirror image with mirrored keys, so that left and right weigh the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from matrix_jax import checkpoint
from matrix_jax.data import records
from matrix_jax.data.loader import EPOCHS, mirror

CHUNK = 8       # frames of an encoder chunk
TOGETHER = 8    # clips encoded side by side


class Store:
    """Encoded episodes of one split.

    Attributes:
      latents: float16 [N H W C], all latent frames in a row.
      controls: int8 [N], one control per latent frame.
      starts: first latent of each episode, and the end of the last one.
      captions: caption index of each episode.
      texts: the distinct captions.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        meta = json.loads((folder / 'store.json').read_text())
        self.latents = np.load(folder / 'latents.npy', mmap_mode='r')
        self.controls = np.load(folder / 'controls.npy')
        self.starts, self.captions = meta['starts'], meta['captions']
        self.texts = meta['texts']


def encode(data: str, world, params, folder: str, split: str = 'train') -> Store:
    """Encodes all clips of `data` with the world's VAE into `folder`, unless that was done.

    Args:
      data: folder of recorded clips.
      world: gives `encode_step(params, cache, frames [B F H W 3]) -> (cache, latents [B T H W C])`.
      params: the world's parameters.
      folder: where the store lies; written aside and renamed, so a killed run leaves none.
      split: 'train' or 'heldout'.
    """
    final = Path(folder) / split
    shards = records.shards(Path(data), split)
    source = {'shards': [shard.name for shard in shards], 'mirror': world.cfg.mirror,
              'scale': world.cfg.vae.scaling_factor, 'encoder': _digest(params['vae']['encoder'])}
    if (final / 'store.json').exists():
        if json.loads((final / 'store.json').read_text())['source'] == source:
            return Store(final)
    opened = [records.Shard(shard) for shard in shards]
    clips = [shard[index] for shard in opened for index in range(len(shard))]
    if world.cfg.mirror:
        clips += [mirror(clip) for clip in clips]
    texts = sorted({clip.caption for clip in clips})
    latents = list(_encode(clips, world, params))
    starts = np.cumsum([0] + [len(one) for one in latents]).tolist()
    keys = [clip.controls[::records.FRAMES_PER_LATENT][:len(one)]
            for clip, one in zip(clips, latents, strict=True)]

    def fill(part):
        np.save(part / 'latents.npy', np.concatenate(latents))
        np.save(part / 'controls.npy', np.concatenate(keys).astype(np.int8))
        (part / 'store.json').write_text(json.dumps(
            {'source': source, 'starts': starts, 'texts': texts,
             'captions': [texts.index(clip.caption) for clip in clips]}))

    checkpoint.replace_folder(final, fill)
    return Store(final)


def _digest(params) -> str:
    """Names weights, so that latents of other ones are not taken for theirs."""
    import hashlib

    import jax
    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return hashlib.sha256(b''.join(leaves)).hexdigest()


def _encode(clips, world, params):
    """Yields float16 latents [T H W C] of each clip, several side by side, 8 frames a chunk."""
    import jax
    from tqdm import tqdm
    longest = max(len(clip.frames) for clip in clips)
    longest += -(longest - 1) % CHUNK
    step = jax.jit(world.encode_step)
    for first in tqdm(range(0, len(clips), TOGETHER), desc='encode', unit='batch'):
        group = clips[first:first + TOGETHER]
        group += group[-1:] * (TOGETHER - len(group))
        frames = np.stack([np.pad(clip.frames, ((0, longest - len(clip.frames)),) + ((0, 0),) * 3,
                                  'edge') for clip in group])
        cache, head = step(params, None, frames[:, :1 + CHUNK])
        made = [np.asarray(head)]
        for start in range(1 + CHUNK, longest, CHUNK):
            cache, more = step(params, cache, frames[:, start:start + CHUNK])
            made.append(np.asarray(more))
        made = np.concatenate(made, axis=1).astype(np.float16)
        for clip, one in zip(clips[first:first + TOGETHER], made, strict=False):
            # The encoder is causal, but its norms see a chunk: one that padding entered is cut.
            yield one[:1 + (len(clip.frames) - 1) // CHUNK * (CHUNK // records.FRAMES_PER_LATENT)]


class Windows:
    """Endless shuffled batches of windows; `state()` and `restore(state)` as in `loader.Loader`.

    A batch: latents float16 [B T H W C], controls int32 [B T], ids int32 [B L].

    Args:
      store: encoded episodes.
      frames: T, latent frames of a window.
      batch: B.
      seed: order.
      ids: int32 [K L], token ids of `store.texts`.

    Raises:
      RecordError: no episode is as long as a window.
    """

    def __init__(self, store: Store, frames: int, batch: int, seed: int, ids):
        import grain
        self.store, self.frames, self.seed = store, frames, seed
        self.ids = np.asarray(ids, np.int32)
        self.places = [(start + offset, caption) for start, end, caption
                       in zip(store.starts, store.starts[1:], store.captions, strict=False)
                       for offset in range(end - start - frames + 1)]
        if not self.places:
            raise records.RecordError(f'latents: no episode has {frames} latent frames')
        data = grain.MapDataset.source(self.places).seed(seed).shuffle().repeat(EPOCHS)
        data = data.map(self._window).batch(batch)
        self.iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1,
                                                                    prefetch_buffer_size=4)))

    def _window(self, place):
        start, caption = place
        cut = slice(start, start + self.frames)
        return {'latents': np.asarray(self.store.latents[cut]), 'ids': self.ids[caption],
                'controls': self.store.controls[cut].astype(np.int32)}

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)

    def state(self) -> bytes:
        """The place in the data, as JSON bytes."""
        return json.dumps({'places': len(self.places), 'seed': self.seed,
                           'grain': self.iterator.get_state()}).encode()

    def restore(self, state: bytes):
        """Goes on where `state` was taken.

        Raises:
          ValueError: the state is of other data.
        """
        saved = json.loads(state)
        if (saved['places'], saved['seed']) != (len(self.places), self.seed):
            raise ValueError(f'latents.restore: the state is of {saved["places"]} windows and seed '
                             f'{saved["seed"]}, here are {len(self.places)} and seed {self.seed}')
        self.iterator.set_state(saved['grain'])

