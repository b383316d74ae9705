"""What a shift has to compute and move whatever the program: the floor that measurements stand on.

Only matrix products and convolutions count, two FLOPs for each multiplication and addition; norms,
softmax and activations are left out. Nothing is skipped that the networks define, and nothing is
computed twice that a stream computes once (`World.ready`).
"""

from __future__ import annotations

import math

from matrix_jax.nn.attention import route


def flops(cfg) -> dict[str, float]:
    """FLOPs of one shift of a world's config: {'dit', 'vae'}."""
    stream = cfg.stream
    scale = cfg.vae.spatial_compression
    frame = (cfg.height // scale, cfg.width // scale)
    return {'dit': stream.passes * dit(cfg.dit, stream.frames, *frame),
            'vae': stream.group_frames * vae(cfg.vae, *frame)}


def dit(cfg, frames: int, height: int, width: int, literal: bool = False) -> float:
    """FLOPs of one call of the transformer on latents of this size.

    Args:
      literal: count control attention as published: a key for every token, under a causal mask.
    """
    video = frames * (height // cfg.patch) * (width // cfg.patch)
    tokens, d = video + cfg.text_length, cfg.width
    products = 4 * tokens * d * d + 8 * tokens * d * d + 2 * tokens * tokens * d
    total = cfg.layers * products + 2 * video * cfg.patch ** 2 * cfg.channels * d
    if cfg.control:
        # Queries and outputs; keys and values are as few as symbols, and made once.
        keys = video if literal else frames
        block = 2 * video * d * d + 2 * video * keys * d + 2 * video * d * d * literal
        total += (cfg.control.end - cfg.control.start) * block
    return 2 * total


def vae(cfg, height: int, width: int) -> float:
    """FLOPs of decoding one latent frame of this size, without the first of a clip."""
    def conv(inner, outer, taps, size):
        return 2 * taps * inner * outer * math.prod(size)

    latent, widths = (1, height, width), cfg.block_out_channels[::-1]
    z = cfg.latent_channels

    def norm(channels):     # scale and shift are read off the latents
        return 2 * conv(z, channels, 1, latent)

    def resnet(inner, outer, size):
        shortcut = conv(inner, outer, 1, size) if inner != outer else 0
        return (conv(inner, outer, 27, size) + conv(outer, outer, 27, size) + shortcut
                + norm(inner) + norm(outer))

    inner, size = widths[0], latent
    total = conv(z, inner, 27, size) + 2 * resnet(inner, inner, size)
    for level, outer in enumerate(widths):
        for _ in range(cfg.layers_per_block + 1):
            total += resnet(inner, outer, size)
            inner = outer
        if level < len(widths) - 1:
            size = (size[0], 2 * size[1], 2 * size[2])
            total += conv(outer, outer, 9, size)        # per frame, before time doubles
            size = (size[0] * (1 + cfg.halves_time(level)), *size[1:])
    return total + norm(inner) + conv(inner, cfg.out_channels * cfg.patch_size ** 2, 27, size)


def exchanged(cfg, frames: int, height: int, width: int, parts: int) -> tuple[str, float]:
    """What devices that share the tokens of a call exchange, and the bytes that each one sends.

    Heads where they divide: queries, keys, values and the results, each once to the others. Else
    keys and values, gathered by all. The prediction, gathered once, is too small to count.
    """
    places = (height // cfg.patch) * (width // cfg.patch)
    tokens = frames * math.ceil(places / parts) + math.ceil(cfg.text_length / parts)
    mine = tokens * cfg.width * (2 if cfg.dtype == 'bfloat16' else 4)
    what = route(cfg.heads, parts, cfg.exchange)
    times = 4 / parts if what == 'heads' else 2
    return what, cfg.layers * times * mine * (parts - 1)
