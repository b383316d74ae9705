"""Start clips of a weights folder: a few held-out frames per theme.

`starts/starts.json` lists them; each clip is a PNG with its frames stacked vertically.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.data import records
from matrix_jax.weights import diffusers_layout


def write(
    data: str,
    folder: str,
    frames: int = 29,
    picture: bool = False,
    unread: Callable[[str], str] = lambda caption: '',
):
    """Picks one clip per theme and writes it to `folder`.

    For drives, the best crop of the held-out tracks: the car is on the road, at speed, and turns
    least. For walks, the crop that gets farthest ahead. With `picture`, walks may also start where
    the world was trained: THEME is such a picture, THEME-unseen one of a held-out place.

    Args:
      data: folder of recorded clips.
      folder: weights folder; gets `starts/`.
      frames: frames F = 1 + 4k of a clip.
      picture: whether to keep only the first frame of each.
      unread: caption -> its end that the world does not read. A clip gets a caption of its theme
        that is read whole, or else its own without the words at the end.
    """
    best, captions = {}, {}
    for split in ('heldout', 'train'):
        for path in records.shards(Path(data), split):
            shard = records.Shard(path)
            for index in range(len(shard)):
                clip = shard[index]
                name = clip.theme + ('-unseen' if picture and split == 'heldout' else '')
                captions.setdefault(name, set()).add(clip.caption)
                if split == 'train' and not picture:
                    continue
                for start in range(0, len(clip.frames) - frames + 1, records.FRAMES_PER_LATENT):
                    score = _score(clip, slice(start, start + frames))
                    if score > best.get(name, (-np.inf,))[0]:
                        best[name] = score, clip, start

    def fill(part):
        listing = []
        for theme, (_, clip, start) in sorted(best.items()):
            strip = clip.frames[start : start + (1 if picture else frames)]
            strip = strip.reshape(-1, *clip.frames.shape[2:])
            video.write_image(part / f'{theme}.png', strip)
            words = sorted(_words(' '.join(captions[theme])) | _words(theme))
            caption = _short_caption(clip.caption, captions[theme], unread)
            listing.append(
                {'file': f'{theme}.png', 'theme': theme, 'caption': caption, 'words': words}
            )
        (part / 'starts.json').write_text(json.dumps(listing, indent=1) + '\n')

    diffusers_layout.replace_folder(Path(folder) / 'starts', fill)


def choose(folder: str, prompt: str, height: int, width: int) -> np.ndarray | None:
    """Start clip uint8 [F H W 3] whose captions match a prompt best; None if there are no clips.

    Words that fewer themes use count more; the first theme wins a tie.
    """
    theme = match(folder, prompt)
    return None if theme is None else read(folder, theme, height, width)


def match(folder: str, prompt: str) -> str | None:
    """Theme of the clip that `choose` returns."""
    starts = listing(folder)
    said = _words(prompt)
    uses = {word: sum(word in start['words'] for start in starts.values()) for word in said}
    return max(
        starts,
        default=None,
        key=lambda theme: sum(1 / uses[word] for word in said & set(starts[theme]['words'])),
    )


def listing(folder: str) -> dict[str, dict]:
    """Theme -> {'file': name of its PNG, 'theme', 'caption', 'words'} of a weights folder."""
    file = Path(folder) / 'starts' / 'starts.json'
    if not file.is_file():
        return {}
    try:
        found = diffusers_layout.parse_json(file.read_text(encoding='utf-8-sig'))
        if not isinstance(found, list) or not all(map(_is_start, found)):
            raise ValueError('expected a list of objects with file, theme, caption and words')
    except ValueError as error:
        raise diffusers_layout.CheckpointError(
            f'{file}: no list of start clips ({error})'
        ) from error
    return {start['theme']: start for start in found}


def _is_start(start) -> bool:
    """Whether an entry of a listing has texts, and names a file beside it."""
    if not isinstance(start, dict) or not isinstance(start.get('words'), list):
        return False
    texts = [start.get('file'), start.get('theme'), start.get('caption'), *start['words']]
    return all(isinstance(text, str) for text in texts) and Path(texts[0]).name == texts[0]


def read(folder: str, theme: str, height: int, width: int) -> np.ndarray:
    """Start clip uint8 [F H W 3] of a theme in `listing`."""
    file = Path(folder) / 'starts' / listing(folder)[theme]['file']
    strip = video.read_image(file)
    if strip.shape[1] != width or strip.shape[0] % height:
        raise video.VideoError(
            f'{file}: got {strip.shape[1]}x{strip.shape[0]} pixels, expected frames of '
            f'{width}x{height} below each other'
        )
    return strip.reshape(-1, height, width, 3)


def _short_caption(own: str, others: Iterable[str], unread: Callable[[str], str]) -> str:
    """Returns a caption that is read whole."""
    for caption in (own, *sorted(others)):
        if not unread(caption):
            return caption
    while unread(own):
        own = own[: -len(unread(own))].rpartition(' ')[0]
    return own


def _words(text: str) -> set[str]:
    return set(re.findall(r'\w+', text.lower()))


def _score(clip, cut: slice) -> float:
    if clip.knows('pose'):
        first, last = clip.pose[cut][[0, -1]]
        yaw = first[records.POSE.index('yaw')]
        return float((last - first)[:2] @ (np.cos(yaw), np.sin(yaw)))
    columns = {name: clip.telemetry[cut, index] for index, name in enumerate(records.TELEMETRY)}
    return (
        10 * columns['on_road'].min()
        - np.abs(columns['yaw_rate']).mean()
        + 0.1 * min(columns['speed'].min(), 20)
    )
