"""Clips encoded once: latents, controls and captions of whole episodes, memory-mapped.

Episodes go through the encoder whole, so that a window cut from the middle has the temporal context
that streamed latents have. One file per split; a mirrored copy of every episode is stored beside it
where the world allows it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from matrix_jax.data import records


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
        self.starts, self.captions, self.texts = (meta[key] for key in ('starts', 'captions', 'texts'))


def encode(data: str, world, params, folder: str, split: str = 'train') -> Store:
    """Encodes all clips of `data` with the world's VAE into `folder`, unless that was done.

    Args:
      data: folder of recorded clips.
      world: gives `encode_frames(params, frames [B F H W 3]) -> scaled latents [B T H W C]`.
      params: the world's parameters.
      folder: where the store lies; written aside and renamed, so a killed run leaves none.
    """
    import jax
    from tqdm import tqdm
    final = Path(folder) / split
    shards = records.shards(Path(data), split)
    wanted = {'shards': [shard.name for shard in shards], 'scale': world.cfg.vae.scaling_factor}
    if (final / 'store.json').exists():
        if json.loads((final / 'store.json').read_text())['source'] == wanted:
            return Store(final)
    clips = [clip for shard in shards for clip in _all(shard)]
    longest = max(len(clip.frames) for clip in clips)
    run = jax.jit(world.encode_frames)
    latents, controls, starts, captions, texts = [], [], [0], [], []
    for clip in tqdm(clips, desc='encode', unit='clip', dynamic_ncols=True):
        pad = longest - len(clip.frames)
        views = [(clip.frames, clip.controls)]
        if world.cfg.mirror:
            views.append((clip.frames[:, :, ::-1], np.asarray(records.MIRRORED)[clip.controls]))
        batch = np.stack([np.pad(frames, ((0, pad), (0, 0), (0, 0), (0, 0)), 'edge')
                          for frames, _ in views])
        made = np.asarray(run(params, batch), np.float16)
        # The encoder is causal but its norms see 8-frame chunks: a chunk that padding entered is cut.
        count = (len(clip.frames) - 1) // 4 + 1
        count -= 1 if pad and count % 2 == 0 else 0
        if clip.caption not in texts:
            texts.append(clip.caption)
        for one, (_, symbols) in zip(made, views, strict=True):
            latents.append(one[:count])
            controls.append(symbols[::4][:count])
            captions.append(texts.index(clip.caption))
            starts.append(starts[-1] + count)
    part = final.with_name(f'.{split}.part')
    part.mkdir(parents=True, exist_ok=True)
    np.save(part / 'latents.npy', np.concatenate(latents))
    np.save(part / 'controls.npy', np.concatenate(controls).astype(np.int8))
    (part / 'store.json').write_text(json.dumps(
        {'source': wanted, 'starts': starts, 'captions': captions, 'texts': texts}))
    if final.exists():
        import shutil
        shutil.rmtree(final)
    os.replace(part, final)
    return Store(final)


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
        self.store, self.frames, self.seed, self.ids = store, frames, seed, np.asarray(ids, np.int32)
        self.places = [(start + offset, caption) for start, end, caption
                       in zip(store.starts, store.starts[1:], store.captions, strict=False)
                       for offset in range(end - start - frames + 1)]
        if not self.places:
            raise records.RecordError(f'latents: no episode has {frames} latent frames')
        data = grain.MapDataset.source(self.places).seed(seed).shuffle().repeat(None)
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


def _all(shard):
    opened = records.Shard(shard)
    return (opened[i] for i in range(len(opened)))
