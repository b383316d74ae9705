"""Image condition of a video model: the latents of the first frame, and a mask.

image -> pixels              cropped to the aspect ratio of the video, resized, in [-1, 1]
pixels -> mask + latents     of a clip of the image and grey frames
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from matrix_jax.vae import wan


def fit(picture, height: int, width: int, resample: str = 'bilinear') -> np.ndarray:
    """Crops the middle of an image uint8 [H W 3] and resizes it: uint8 [height width 3].

    Args:
      picture: the image.
      height, width: pixels of the result.
      resample: filter of Pillow, such as 'bilinear' or 'bicubic'.

    Raises:
      ValueError: not an image, or without pixels.
    """
    from PIL import Image

    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f'picture: got {picture.dtype} {picture.shape}, expected uint8 [H W 3]')
    top, left, bottom, right = crop(*picture.shape[:2], height, width)
    image = Image.fromarray(picture).crop((left, top, right, bottom))
    return np.asarray(image.resize((width, height), Image.Resampling[resample.upper()]))


def crop(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the middle part with the aspect ratio height : width.

    PARITY: the borders are rounded separately, halves to even.
    """
    tall, wide = rows, columns
    if rows / columns > height / width:
        tall = int(columns * height / width)
    else:
        wide = int(rows * width / height)
    top, left = round((rows - tall) / 2), round((columns - wide) / 2)
    bottom, right = round((rows + tall) / 2), round((columns + wide) / 2)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def pixels(picture):
    """uint8 [... 3] -> float32 in [-1, 1]."""
    return (jnp.asarray(picture, jnp.float32) / 255 - 0.5) / 0.5


def condition(cfg: wan.Config, params, image, frames: int):
    """Condition channels of a clip: a mask and the scaled latents of the image and grey frames.

    Beyond the receptive field of the image all latent frames are equal, so only the first ones are
    encoded.

    Args:
      cfg: config of the autoencoder.
      params: its parameters.
      image: [B H W 3] in [-1, 1].
      frames: latent frames T.

    Returns:
      [B T h w 4+C].
    """
    time, coded = cfg.temporal_compression, min(frames, cfg.settled + 1)
    clip = jnp.pad(image[:, None], ((0, 0), (0, (coded - 1) * time), (0, 0), (0, 0), (0, 0)))
    latents = wan.scaled(cfg, wan.encode(cfg, params, clip)[0])
    last = jnp.repeat(latents[:, -1:], frames - coded, axis=1)
    latents = jnp.concatenate([latents, last], axis=1)
    mask = jnp.zeros((*latents.shape[:-1], time), latents.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)
