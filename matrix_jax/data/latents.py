"""Clips encoded once: latents, controls, actions and captions of whole episodes, memory-mapped.

Episodes go through the encoder whole, so that a window cut from the middle has the temporal context
that streamed latents have. One store per folder and split; where the world allows it, every episode
is stored a second time as its mirror image with mirrored keys, so that left and right weigh the
same. Episodes without label hold the null control.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange

from matrix_jax.data import records
from matrix_jax.data.loader import EPOCHS, mirror, rows
from matrix_jax.parallel import compilation
from matrix_jax.weights import diffusers_layout

CHUNK = 8  # frames of an encoder chunk
TOGETHER = 8  # clips encoded side by side


class LatentStore:
    """Encoded episodes of one split, of one folder or several; the latents are not copied.

    Attributes:
      controls: int8 [N], one control per latent frame of all episodes in a row.
      actions: name -> [N 4 ...], keys, mouse and pose of the four frames of each latent frame, the
        last one its own; empty where no part has them.
      starts: first latent of each episode, and the end of the last one.
      captions: caption index of each episode.
      texts: the distinct captions.
      recordings: number of the recording of each episode; a mirror image has that of its clip.
      names: where the clip of each episode lies, for messages.
    """

    def __init__(self, parts: Sequence[tuple[Path, Sequence[str]]]):
        """Args: the folder of each part, and the names of its clips."""
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
        """Latents float16 [T H W C] from number `start` on, within one episode."""
        part = int(np.searchsorted(self._ends, start, 'right'))
        first = start - (int(self._ends[part - 1]) if part else 0)
        return np.asarray(self._latents[part][first : first + frames])


def _load_actions(folder, name):
    """Actions [N 4 ...] of one part; unknown ones where it has none."""
    path = folder / f'{name}.npy'
    if path.exists():
        return np.load(path)
    frames = records.FRAMES_PER_LATENT * len(np.load(folder / 'controls.npy'))
    return rearrange(records.unknown(frames)[name], '(t f) a -> t f a', f=records.FRAMES_PER_LATENT)


def encode(data, world, params, folder: str | os.PathLike, split: str = 'train') -> LatentStore:
    """Encodes all clips of `data` with the world's VAE, each folder unless that was done.

    Args:
      data: folder of recorded clips, or several (`records.folders`).
      world: gives `encode_step(params, cache, frames [B F H W 3]) -> (cache, latents [B T H W C])`.
      params: the world's parameters.
      folder: where stores lie, each under a name made of what it follows from; written aside and
        renamed, so a killed run leaves none.
      split: 'train' or 'heldout'.
    """
    encoder, parts = digest(params['vae']['encoder']), []
    for one in records.folders(data):
        opened = [records.Shard(shard) for shard in records.shards(Path(one), split)]
        source = {
            'shards': [shard.digest() for shard in opened],
            'mirror': world.cfg.mirror,
            **world.cfg.vae.normalisation,
            'encoder': encoder,
        }
        name = hashlib.sha256(json.dumps(source).encode()).hexdigest()
        final = Path(folder) / name[:16] / split
        clips = [(shard, index) for shard in opened for index in range(len(shard))]
        if not (final / 'store.json').exists():
            _write(final, source, clips, world, params)
        parts.append((final, [f'{shard.path} record {index}' for shard, index in clips]))
    return LatentStore(parts)


def digest(params) -> str:
    """Names weights, so that latents of other ones are not taken for theirs."""
    import jax

    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return hashlib.sha256(b''.join(leaves)).hexdigest()


def _write(final, source, clips, world, params):
    """Makes one store. Clips are read when they are needed: a folder may be larger than memory."""
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
                f'{shard.path} record {index}: got frames '
                f'{list(clip.frames.shape[1:3])}, expected {list(size)}, the '
                "world's size"
            )
        captions.append(clip.caption)
        # The encoder is causal, but its norms see a chunk: one that padding enters is cut.
        kept = 1 + (len(clip.frames) - 1) // CHUNK * (CHUNK // per)
        controls.append(clip.controls[::per][:kept])
        known |= any(map(clip.knows, records.ACTIONS))
        for name, made in actions.items():
            value = getattr(clip, name)[: 1 + per * (kept - 1)]
            value = np.concatenate([value[:1].repeat(per - 1, axis=0), value])
            made.append(rearrange(value, '(t f) a -> t f a', f=per))
    texts = sorted(set(captions))
    starts = np.cumsum([0] + [len(one) for one in controls]).tolist()

    def fill(part):
        filled = None
        for start, end, one in zip(starts, starts[1:], _encode(places, world, params)):
            if filled is None:
                shape = starts[-1], *one.shape[1:]
                filled = np.lib.format.open_memmap(part / 'latents.npy', 'w+', np.float16, shape)
            filled[start:end] = one[: end - start]
        filled.flush()
        np.save(part / 'controls.npy', np.concatenate(controls).astype(np.int8))
        for name, made in actions.items() if known else ():
            np.save(part / f'{name}.npy', np.concatenate(made))
        (part / 'store.json').write_text(
            json.dumps(
                {
                    'source': source,
                    'starts': starts,
                    'texts': texts,
                    'captions': [texts.index(caption) for caption in captions],
                }
            )
        )

    diffusers_layout.replace_folder(final, fill)


def _read(shard, index, flip):
    return mirror(shard[index]) if flip else shard[index]


def _encode(places, world, params):
    """Yields float16 latents [T H W C] of each clip, several side by side, 8 frames a chunk."""
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
        cache, head = step(params, None, frames[:, : 1 + CHUNK])
        made = [np.asarray(head)]
        for start in range(1 + CHUNK, longest, CHUNK):
            cache, more = step(params, cache, frames[:, start : start + CHUNK])
            made.append(np.asarray(more))
        yield from np.concatenate(made, axis=1).astype(np.float16)[:count]


class ShuffledBatches:
    """Base of endless shuffled batches; `state()` and `restore(state)` as in `loader.Loader`.

    Whatever the number of processes, all of them draw the same batches, and each reads its own
    `rows`. `about` names what the batches follow from, `missing` what older states leave out of it.
    """

    missing = {}

    def __init__(self, batch: int, process: tuple[int, int], about: dict, draw, pools):
        """Args: `pools`, [(numbers to draw, weight)]; `draw`, drawn numbers -> batch."""
        import grain

        self.batch, self.about = batch, about
        self.share(*process)
        mixed = [
            (grain.MapDataset.source(pool).seed(about['seed']).shuffle().repeat(EPOCHS), weight)
            for pool, weight in pools
        ]
        data = grain.MapDataset.mix(*zip(*mixed)) if len(mixed) > 1 else mixed[0][0]
        data = data.batch(batch).map(draw)
        self.iterator = iter(
            data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        )

    def share(self, index: int, count: int):
        """From the first batch on, reads part `index` of `count` equal parts of each batch."""
        self.rows = rows(self.batch, index, count)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)

    def state(self) -> bytes:
        """The place in the data, as JSON bytes."""
        return json.dumps({**self.about, 'grain': self.iterator.get_state()}).encode()

    def restore(self, state: bytes):
        """Goes on where `state` was taken.

        Raises:
          ValueError: the state is of other data.
        """
        saved = {**self.missing, **json.loads(state)}
        for name, ours in self.about.items():
            if saved[name] != ours:
                raise ValueError(
                    f'latents.restore: the state has {name} {saved[name]}, '
                    f'here it is {ours}: the batches would differ'
                )
        self.iterator.set_state(saved['grain'])


class LatentWindows(ShuffledBatches):
    """Batches of windows.

    A batch: latents float16 [B T H W C], controls int32 [B T], ids int32 [B L], clip int32 [B], the
    episodes by number in `names`; where the store has actions, also keyboard, mouse and pose
    [B F ...] of the F = 1 + 4 (T-1) frames, as `loader.Loader` gives them.

    Args:
      store: encoded episodes.
      frames: T, latent frames of a window.
      batch: B of all processes together.
      seed: order.
      ids: int32 [K L], token ids of `store.texts`.
      labelled: share of windows with label; None takes all windows alike.
      label_share: share of the recordings with label that keep it. The others count as unlabelled;
        a smaller share is part of a larger one.
      process: (index, count) of this process.

    Raises:
      RecordError: no episode is as long as a window, or one kind of windows is missing.
    """

    missing = {'labelled': None, 'label_share': 1.0}

    def __init__(
        self,
        store: LatentStore,
        frames: int,
        batch: int,
        seed: int,
        ids,
        labelled: float | None = None,
        label_share: float = 1.0,
        process: tuple[int, int] = (0, 1),
    ):
        self.store, self.frames, self.names = store, frames, store.names
        self.ids = np.asarray(ids, np.int32)
        self.controls = _labels(store, label_share)
        places = np.array(
            [
                (start + offset, episode)
                for episode, (start, end) in enumerate(zip(store.starts, store.starts[1:]))
                for offset in range(end - start - frames + 1)
            ]
        )
        if not len(places):
            raise records.RecordError(f'latents: no episode has {frames} latent frames')
        super().__init__(
            batch,
            process,
            {'places': len(places), 'seed': seed, 'labelled': labelled, 'label_share': label_share},
            self._windows,
            self._pools(places, labelled),
        )

    def _pools(self, places, labelled):
        """[(places, weight)] of the kinds of windows to draw from."""
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
        """Actions [F ...] of the frames of a window: one of its first latent frame, four of each
        other."""
        window = rearrange(value[start : start + self.frames], 't f a -> (t f) a')
        return window[records.FRAMES_PER_LATENT - 1 :]


def _labels(store: LatentStore, share: float) -> np.ndarray:
    """Controls int8 [N] of a store, with the labels of a share of its recordings alone."""
    known = {
        recording
        for recording, start in zip(store.recordings, store.starts)
        if store.controls[start] != records.NULL
    }
    # A hash, and no generator: the choice outlives versions of numpy.
    order = sorted(known, key=lambda one: hashlib.sha256(str(one).encode()).digest())
    kept = set(order[: max(round(share * len(order)), int(share > 0))])
    controls = store.controls.copy()
    for recording, start, end in zip(store.recordings, store.starts, store.starts[1:]):
        if recording not in kept:
            controls[start:end] = records.NULL
    return controls
