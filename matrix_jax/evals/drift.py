"""Drift of videos: measures per second, and distances between sets of videos.

Every figure is shown next to that of the real game.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from matrix_jax.evals.video import by_second

# Linear sRGB to XYZ, divided by the white point D65, for CIE 1976 L*a*b*.
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
) / np.array([[0.95047], [1.0], [1.08883]])
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def lab(colors) -> np.ndarray:
    """sRGB [... 3] in 0 .. 255 -> CIE L*a*b* [... 3]; the Euclidean distance of two is Delta E."""
    light = np.asarray(colors, np.float64) / 255
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    x, y, z = np.moveaxis(light @ XYZ.T, -1, 0)
    x, y, z = (
        np.where(part > 216 / 24389, np.cbrt(part), (24389 / 27 * part + 16) / 116)
        for part in (x, y, z)
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def sharpness(frames) -> np.ndarray:
    """Mean luma difference of neighbouring pixels [F], 0 to 255, of frames uint8 [F H W 3]."""
    found = []
    for frame in frames:
        luma = frame.astype(np.float32) @ LUMA
        found.append(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean())
    return np.array(found) / 2


def change(frames) -> np.ndarray:
    """Mean difference from the frame before [F], 0 to 255, of frames uint8 [F H W 3]; first 0."""
    steps = [
        np.abs(np.subtract(after, before, dtype=np.float32)).mean()
        for before, after in zip(frames, frames[1:], strict=False)
    ]
    return np.array([0, *steps], np.float32)


def ground_motion(frames, rows: int) -> np.ndarray:
    """Motion of the upper `rows` downwards in pixels per frame [F]; first 0.

    The peak of the phase correlation of neighbouring frames (Kuglin and Hines 1975), to a part of a
    pixel. A picture that moves sideways or turns gives the vertical part only.

    Args:
      frames: uint8 [F H W 3].
      rows: rows of the picture that are read.
    """
    luma = frames[:, :rows].astype(np.float32) @ LUMA
    luma -= luma.mean(axis=(1, 2), keepdims=True)
    height, width = luma.shape[1:]
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    spectra = np.fft.rfft2(luma * window)
    found = np.zeros(len(frames))
    for index, (before, after) in enumerate(zip(spectra, spectra[1:], strict=False), 1):
        cross = before.conj() * after
        size = np.abs(cross)
        if not size.max():
            continue  # blank pictures
        peaks = np.fft.irfft2(cross / (size + 1e-3 * size.max()), s=(height, width))
        row, column = np.unravel_index(peaks.argmax(), peaks.shape)
        above, top, below = peaks[np.arange(row - 1, row + 2) % height, column]
        bend = above - 2 * top + below
        place = row + (0.5 * (above - below) / bend if bend else 0.0)
        found[index] = place - height if place > height / 2 else place
    return found


def mean_color(frames) -> np.ndarray:
    """Mean colours [F 3] of frames uint8 [F H W 3]."""
    return frames.reshape(len(frames), -1, 3).mean(axis=1)


def seconds(
    videos: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    own: Sequence[Mapping[str, Callable]],
    fps: int,
) -> dict[str, list[float]]:
    """Measures by second, averaged over videos.

    Args:
      videos: uint8 [F H W 3] each, all of the same length.
      reference: real videos, one per video; their mean colour is the reference colour.
      own: further measures of each video: name -> function of frames that returns [F].
      fps: frames per second.

    Returns:
      the measures of `own`, sharpness, and color: Delta E between the mean colour of the second
      and that of the whole reference.
    """
    found = {}
    for frames, real, measures in zip(videos, reference, own, strict=True):
        shown = by_second(mean_color(frames).T, fps).T
        apart = lab(shown) - lab(mean_color(real).mean(axis=0))
        values = {
            name: by_second(measure(frames), fps)
            for name, measure in (*measures.items(), ('sharpness', sharpness))
        }
        for name, value in (*values.items(), ('color', np.linalg.norm(apart, axis=-1))):
            found.setdefault(name, []).append(value)
    return {name: np.mean(values, axis=0).round(3).tolist() for name, values in found.items()}


def minutes(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Means by minute of values by second."""
    return {
        name: [round(float(np.mean(one[at : at + 60])), 3) for at in range(0, len(one), 60)]
        for name, one in values.items()
    }


def seams(videos, shift_frames: int) -> float:
    """Change of the picture between steps over that within steps; 1 = no seam.

    Args:
      videos: uint8 [B F H W 3] whose first frame starts a step.
      shift_frames: frames of a step.
    """
    inside, across = [], []
    for frames in videos:
        step = change(frames)[1:]
        border = np.arange(1, len(step) + 1) % shift_frames == 0
        across.append(step[border])
        inside.append(step[~border])
    across, inside = np.concatenate(across).mean(), np.concatenate(inside).mean()
    return float(across / inside) if inside else 1.0


def frechet(first, second) -> float:
    """Frechet distance of Gaussians fitted to features [N D] and [M D].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as in the Frechet inception distance
    (arXiv 1706.08500). Values compare only between the same features.

    Raises:
      ValueError: fewer than two samples.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f'frechet: got {len(first)} and {len(second)} samples, expected two each')
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    apart = first.mean(axis=0) - second.mean(axis=0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2).
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(max(apart @ apart + np.trace(one) + np.trace(two) - 2 * mixed, 0.0))
