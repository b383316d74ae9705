"""Large frames in overlapping, blended tiles, and long clips in overlapping windows."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes and overlap of tiles.

    Attributes:
      sample: height, width of a tile in pixels.
      latent: height, width of a tile in latent pixels.
      overlap: overlap of neighbours, as a share of the height and of the width.
    """

    sample: tuple[int, int]
    latent: tuple[int, int]
    overlap: tuple[float, float] = (1 / 6, 1 / 5)

    @classmethod
    def of(cls, cfg) -> Tiles:
        """Tiles of half the native frame of an autoencoder, as in the reference."""
        sample = (cfg.sample_height // 2, cfg.sample_width // 2)
        return cls(sample, tuple(size // cfg.spatial_compression for size in sample))


def covers(tile, x) -> bool:
    """Whether frames x [B T H W C] fit in one tile (height, width)."""
    return x.shape[2] <= tile[0] and x.shape[3] <= tile[1]


def tiled(run, x, source, target, overlap):
    """Runs x [B T H W C] tile by tile, each over the full time, and blends the outputs.

    Args:
      run: [B T h w C] -> [B T' h' w' C']; tiles at the right and bottom are smaller.
      x: input frames.
      source: height, width of an input tile.
      target: height, width of the output of a full tile.
      overlap: overlap of neighbours, as a share of the height and of the width.
    """
    # Rounded down as in the reference, for equal sizes and strides.
    strides = [int(size * (1 - share)) for size, share in zip(source, overlap, strict=True)]
    blends = [int(size * share) for size, share in zip(target, overlap, strict=True)]
    limits = [size - blend for size, blend in zip(target, blends, strict=True)]
    rows, above = [], None
    for top in range(0, x.shape[2], strides[0]):
        row = []
        for index, left in enumerate(range(0, x.shape[3], strides[1])):
            tile = run(x[:, :, top : top + source[0], left : left + source[1]])
            # PARITY: neighbours are already blended, so corners are blended more than once.
            if above is not None:
                tile = blend(above[index], tile, blends[0], axis=2)
            if row:
                tile = blend(row[-1], tile, blends[1], axis=3)
            row.append(tile)
        rows.append(jnp.concatenate([tile[:, :, : limits[0], : limits[1]] for tile in row], axis=3))
        above = row
    return jnp.concatenate(rows, axis=2)


def blend(before, after, extent: int, axis: int):
    """`after`, with its first `extent` rows (axis 2) or columns (3) faded in from `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return after
    before, after = jnp.moveaxis(before, axis, -1), jnp.moveaxis(after, axis, -1)
    fade = jnp.arange(extent, dtype=after.dtype) / extent
    mixed = before[..., -extent:] * (1 - fade) + after[..., :extent] * fade
    return jnp.moveaxis(jnp.concatenate([mixed, after[..., extent:]], axis=-1), -1, axis)


def windowed(run, latents, window: int, overlap: int, drop: int):
    """Runs latents [B T h w C] in windows that share `overlap` latent frames.

    The first `drop` frames of all windows but the first are dropped.
    """
    total, start, parts = latents.shape[1], 0, []
    while start + window <= total:
        parts.append(run(latents[:, start : start + window]))
        start += window - overlap
    if start + overlap < total or not parts:
        parts.append(run(latents[:, start:]))
    return jnp.concatenate(parts[:1] + [part[:, drop:] for part in parts[1:]], axis=1)
