"""Roofline of The Matrix: CogVideoX's transformer with control blocks, and its decoder."""

from __future__ import annotations

import math

from matrix_jax.benchmark.roofline_layers import Conv, convolved, rows_sent, size_of
from matrix_jax.nn.attention import route


def dit(cfg, frames: int, height: int, width: int, literal: bool = False) -> float:
    """FLOPs of one call of the transformer on latents of this size.

    Args:
      literal: count control attention as published, with a key per token under a causal mask.
    """
    video, d = frames * (height // cfg.patch) * (width // cfg.patch), cfg.width
    tokens = video + cfg.text_length
    products = 4 * tokens * d * d + 8 * tokens * d * d + 2 * tokens * tokens * d
    total = cfg.layers * products + 2 * video * cfg.patch**2 * cfg.channels * d
    if cfg.control:
        # Queries and outputs; keys and values, one per latent frame, are too few to count.
        keys = video if literal else frames
        block = 2 * video * d * d + 2 * video * keys * d + 2 * video * d * d * literal
        total += (cfg.control.end - cfg.control.start) * block
    return 2 * total


def decoder(cfg) -> tuple[list[Conv], list[int]]:
    """Convolutions of the autoencoder's decoder, and the channels of its norms."""
    z, widths = cfg.latent_channels, cfg.block_out_channels[::-1]
    convs, norms = [], []

    def add(inner, outer, taps):
        convs.append(Conv(inner, outer, taps, frames, scale))

    def norm(channels):  # scale and shift are convolutions of the latents
        norms.append(channels)
        convs.extend(2 * [Conv(z, channels, (1, 1, 1), 1, 1)])

    def resnet(inner, outer):
        norm(inner)
        add(inner, outer, (3, 3, 3))
        norm(outer)
        add(outer, outer, (3, 3, 3))
        if inner != outer:
            add(inner, outer, (1, 1, 1))

    inner, frames, scale = widths[0], 1, 1
    add(z, inner, (3, 3, 3))
    resnet(inner, inner)
    resnet(inner, inner)
    for level, outer in enumerate(widths):
        for _ in range(cfg.layers_per_block + 1):
            resnet(inner, outer)
            inner = outer
        if level < len(widths) - 1:
            scale *= 2
            add(outer, outer, (1, 3, 3))  # per frame, before time doubles
            frames *= 1 + cfg.halves_time(level)
    norm(inner)
    add(inner, cfg.out_channels * cfg.patch_size**2, (3, 3, 3))
    return convs, norms


def vae(cfg, height: int, width: int) -> float:
    """FLOPs of decoding one latent frame after the first of a clip."""
    return convolved(decoder(cfg)[0], height, width)


# --- many devices ----------------------------------------------------------------------------


def tokens(cfg, frames: int, height: int, width: int) -> tuple[int, int]:
    """(queries, keys) of a call's self-attention: video and text tokens."""
    count = frames * (height // cfg.patch) * (width // cfg.patch) + cfg.text_length
    return count, count


def share(cfg, frames: int, height: int, width: int, parts: int) -> float:
    """Largest share of a call's tokens on one device."""
    return held(cfg, frames, height, width, parts) / tokens(cfg, frames, height, width)[0]


def held(cfg, frames: int, height: int, width: int, parts: int) -> int:
    """Most tokens on one device: the same patches of all frames, and a part of the text."""
    places = (height // cfg.patch) * (width // cfg.patch)
    return frames * math.ceil(places / parts) + math.ceil(cfg.text_length / parts)


def exchanged(cfg, frames: int, height: int, width: int, parts: int) -> tuple[str, float]:
    """What devices exchange during a call, and the bytes that each one sends.

    'heads' if they divide evenly: queries, keys, values and results each pass once through an
    all-to-all. Otherwise 'keys': keys and values are all-gathered. The prediction, gathered once,
    is too small to count.
    """
    mine = held(cfg, frames, height, width, parts) * cfg.width * size_of(cfg.dtype)
    what = route(cfg.heads, parts, cfg.exchange)
    times = 4 / parts if what == 'heads' else 2
    return what, cfg.layers * times * mine * (parts - 1)


def bordered(cfg, frames: int, height: int, width: int, parts: int) -> float:
    """Bytes that each device sends to decode `frames` latent frames together, split by rows:
    neighbouring rows for each convolution, and two numbers per channel for each norm."""
    if parts == 1:
        return 0
    convs, norms = decoder(cfg)
    return rows_sent(convs, frames, width, cfg.dtype) + (parts - 1) * sum(norms) * 2 * 4
