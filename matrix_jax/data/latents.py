"""Encoded clips: latents, controls, actions and captions of whole episodes, memory-mapped.

Whole episodes pass the encoder, so a window from the middle has the same temporal context as in a
stream. Each folder and split has one store. If the world allows it, every episode is stored twice,
the second time as its mirror image with mirrored keys, so that left and right count alike. Episodes
without a label hold the null control.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from einops import rearrange

from matrix_jax.data import cache, records
from matrix_jax.data.batches import ResumableBatches, shuffled
from matrix_jax.data.loader import mirror
from matrix_jax.parallel import compilation

CHUNK = 8  # frames per encoder chunk
TOGETHER = 8  # clips encoded in one batch


class LatentStore:
    """Encoded episodes of one split of one or more folders; latents stay on disk.

    The N latent frames of all episodes follow one another.

    Attributes:
      controls: int8 [N], one control per latent frame.
      actions: name -> [N 4 ...], keys, mouse and pose of the four pixel frames of each latent
        frame; empty if no folder has them.
      starts: index of the first latent frame of each episode, and of the end.
      captions: index of each episode's caption in `texts`.
      texts: the distinct captions.
      recordings: index of each episode's recording; a mirror image has that of its clip.
      names: origin of each episode, for messages.
    """

    def __init__(self, parts: Sequence[tuple[Path, Sequence[str]]]):
        """Args: parts, the folder of each part and the names of its clips."""
        metas = [json.loads((folder / 'store.json').read_text()) for folder, _ in parts]
        self._latents = [np.load(folder / 'latents.npy', mmap_mode='r') for folder, _ in parts]
        self._ends = np.cumsum([len(part) for part in self._latents])
        self.controls = np.concatenate([np.load(folder / 'controls.npy') for folder, _ in parts])
        self.actions = {}
        if any((folder / 'pose.npy').exists() for folder, _ in parts):
            self.actions = {
                name: np.concatenate([_load_actions(folder, name) for folder, _ in parts])
                for name in records.ACTIONS
            }
        self.texts = sorted({text for meta in metas for text in meta['texts']})
        self.starts, self.captions, self.recordings, self.names = [0], [], [], []
        for meta, (_, names) in zip(metas, parts):
            start, number = self.starts[-1], self.recordings[-1] + 1 if self.recordings else 0
            self.starts += [start + one for one in meta['starts'][1:]]
            for episode, caption in enumerate(meta['captions']):
                turned, clip = divmod(episode, len(names))
                self.captions.append(self.texts.index(meta['texts'][caption]))
                self.recordings.append(number + clip)
                self.names.append(names[clip] + ' mirrored' * turned)

    def cut(self, start: int, frames: int) -> np.ndarray:
        """Latents float16 [T H W C] from index `start` on, within one episode."""
        part = int(np.searchsorted(self._ends, start, 'right'))
        first = start - (int(self._ends[part - 1]) if part else 0)
        return np.asarray(self._latents[part][first : first + frames])


def _load_actions(folder, name):
    """Actions [N 4 ...] of one part; unknown if it has none."""
    path = folder / f'{name}.npy'
    if path.exists():
        return np.load(path)
    frames = records.FRAMES_PER_LATENT * len(np.load(folder / 'controls.npy'))
    return rearrange(records.unknown(frames)[name], '(t f) a -> t f a', f=records.FRAMES_PER_LATENT)


def encode(data, world, params, folder: str | os.PathLike, split: str = 'train') -> LatentStore:
    """Encodes all clips of `data` with the world's VAE, unless a store exists.

    Args:
      data: folder of recorded clips, or several (`records.folders`).
      world: gives `encode_step(params, cache, frames [B F H W 3]) -> (cache, latents [B T H W C])`.
      params: the world's parameters.
      folder: folder of all stores.
      split: 'train' or 'heldout'.
    """
    encoder, parts = cache.params_digest(params['vae']['encoder']), []
    for one in records.folders(data):
        opened = [records.Shard(shard) for shard in records.shards(Path(one), split)]
        source = {
            'shards': [shard.digest() for shard in opened],
            'mirror': world.cfg.mirror,
            **world.cfg.vae.normalisation,
            'encoder': encoder,
        }
        clips = [(shard, index) for shard in opened for index in range(len(shard))]
        fill = partial(_write, source=source, clips=clips, world=world, params=params)
        store = cache.build(Path(folder) / cache.name(source) / split, 'store.json', fill)
        parts.append((store, [f'{shard.path} record {index}' for shard, index in clips]))
    return LatentStore(parts)


def _write(folder, source, clips, world, params):
    """Fills the folder of a store; reads clips one by one, as they may exceed the memory."""
    places = [
        (*clip, flip)
        for flip in ((False, True) if source['mirror'] else (False,))
        for clip in clips
    ]
    captions, controls, actions = [], [], {name: [] for name in records.ACTIONS}
    known, per = False, records.FRAMES_PER_LATENT
    for shard, index, flip in places:
        clip = _read(shard, index, flip)
        size = world.cfg.height, world.cfg.width
        if clip.frames.shape[1:3] != size:
            raise records.RecordError(
                f'{shard.path} record {index}: got frames {list(clip.frames.shape[1:3])}, '
                f"expected {list(size)}, the world's size"
            )
        captions.append(clip.caption)
        # The encoder is causal, but its norms see whole chunks: drop a chunk with padding.
        kept = 1 + (len(clip.frames) - 1) // CHUNK * (CHUNK // per)
        controls.append(clip.controls[::per][:kept])
        known |= any(map(clip.knows, records.ACTIONS))
        for name, values in actions.items():
            value = getattr(clip, name)[: 1 + per * (kept - 1)]
            value = np.concatenate([value[:1].repeat(per - 1, axis=0), value])
            values.append(rearrange(value, '(t f) a -> t f a', f=per))
    texts = sorted(set(captions))
    starts = np.cumsum([0] + [len(one) for one in controls]).tolist()

    latents = None
    for start, end, one in zip(starts, starts[1:], _encode(places, world, params)):
        if latents is None:
            shape = starts[-1], *one.shape[1:]
            latents = np.lib.format.open_memmap(folder / 'latents.npy', 'w+', np.float16, shape)
        latents[start:end] = one[: end - start]
    latents.flush()
    np.save(folder / 'controls.npy', np.concatenate(controls).astype(np.int8))
    for name, values in actions.items() if known else ():
        np.save(folder / f'{name}.npy', np.concatenate(values))
    about = {
        'source': source,
        'starts': starts,
        'texts': texts,
        'captions': [texts.index(caption) for caption in captions],
    }
    (folder / 'store.json').write_text(json.dumps(about))


def _read(shard, index, flip):
    return mirror(shard[index]) if flip else shard[index]


def _encode(places, world, params):
    """Yields latents float16 [T H W C] of each clip."""
    from tqdm import tqdm

    step = compilation.jit(world.encode_step)
    for first in tqdm(range(0, len(places), TOGETHER), desc='encode', unit='batch'):
        group = [_read(*place) for place in places[first : first + TOGETHER]]
        count = len(group)
        group += group[-1:] * (TOGETHER - count)
        longest = max(1 + CHUNK, *(len(clip.frames) for clip in group))
        longest += -(longest - 1) % CHUNK
        frames = np.stack(
            [
                np.pad(clip.frames, ((0, longest - len(clip.frames)),) + ((0, 0),) * 3, 'edge')
                for clip in group
            ]
        )
        carry, head = step(params, None, frames[:, : 1 + CHUNK])
        made = [np.asarray(head)]
        for start in range(1 + CHUNK, longest, CHUNK):
            carry, more = step(params, carry, frames[:, start : start + CHUNK])
            made.append(np.asarray(more))
        yield from np.concatenate(made, axis=1).astype(np.float16)[:count]


class LatentWindows(ResumableBatches):
    """Batches of windows cut from episodes.

    A batch holds latents float16 [B T H W C], controls int32 [B T], ids int32 [B L] and clip int32
    [B], indices into `names`. If the store has actions, also keyboard, mouse and pose [B F ...] of
    the F = 1 + 4 (T-1) pixel frames, as in `loader.Loader`.

    Args:
      store: encoded episodes.
      frames: latent frames T of a window.
      batch: B over all processes.
      seed: seed of the order.
      ids: token ids of `store.texts`, int32 [K L].
      labelled: share of windows with a label; None = as in the data.
      label_share: share of the labelled recordings that keep their label; a smaller share is a
        subset of a larger one.
      from_start: whether windows only begin where episodes begin.
      process: (index, count) of this process.

    Raises:
      RecordError: no episode is as long as a window, or the data lacks labelled or unlabelled
        windows.
    """

    missing = {'labelled': None, 'label_share': 1.0, 'from_start': False}

    def __init__(
        self,
        store: LatentStore,
        frames: int,
        batch: int,
        seed: int,
        ids,
        labelled: float | None = None,
        label_share: float = 1.0,
        from_start: bool = False,
        process: tuple[int, int] = (0, 1),
    ):
        self.store, self.frames, self.names = store, frames, store.names
        self.ids = np.asarray(ids, np.int32)
        self.controls = _labels(store, label_share)
        places = np.array(
            [
                (start + offset, episode)
                for episode, (start, end) in enumerate(zip(store.starts, store.starts[1:]))
                for offset in range(end - start - frames + 1)[: 1 if from_start else None]
            ]
        )
        if not len(places):
            raise records.RecordError(f'latents: no episode has {frames} latent frames')
        source = {
            'places': len(places),
            'seed': seed,
            'labelled': labelled,
            'label_share': label_share,
            'from_start': from_start,
        }
        super().__init__(batch, process, source)
        self.start(shuffled(self._pools(places, labelled), seed, batch, self._windows), prefetch=4)

    def _pools(self, places, labelled):
        """[(places, weight)] of labelled and unlabelled windows, or of all."""
        if labelled is None:
            return [(places, 1)]
        known = self.controls[places[:, 0]] != records.NULL
        weight = round(1000 * labelled)
        pools = {'labelled': (places[known], weight), 'unlabelled': (places[~known], 1000 - weight)}
        for kind, (pool, weight) in pools.items():
            if weight and not len(pool):
                raise records.RecordError(
                    f'stage.labelled: got {labelled:g}, but the data has no '
                    f'{kind} windows of {self.frames} latent frames'
                )
        return [(pool, weight) for pool, weight in pools.values() if weight]

    def _windows(self, places):
        starts, episodes = places[self.rows].T
        return {
            'latents': np.stack([self.store.cut(start, self.frames) for start in starts]),
            'controls': np.stack(
                [self.controls[start : start + self.frames] for start in starts]
            ).astype(np.int32),
            'ids': self.ids[[self.store.captions[episode] for episode in episodes]],
            'clip': episodes.astype(np.int32),
            **{
                name: np.stack([self._frames(value, start) for start in starts])
                for name, value in self.store.actions.items()
            },
        }

    def _frames(self, value, start):
        """Actions [F ...] of the pixel frames of a window: the first latent frame has one."""
        window = rearrange(value[start : start + self.frames], 't f a -> (t f) a')
        return window[records.FRAMES_PER_LATENT - 1 :]


def _labels(store: LatentStore, share: float) -> np.ndarray:
    """Controls int8 [N] of a store, labelled only in a share of its recordings."""
    known = {
        recording
        for recording, start in zip(store.recordings, store.starts)
        if store.controls[start] != records.NULL
    }
    # Hashed instead of drawn, so that the choice does not depend on the numpy version.
    order = sorted(known, key=lambda one: hashlib.sha256(str(one).encode()).digest())
    kept = set(order[: max(round(share * len(order)), int(share > 0))])
    controls = store.controls.copy()
    for recording, start, end in zip(store.recordings, store.starts, store.starts[1:]):
        if recording not in kept:
            controls[start:end] = records.NULL
    return controls
