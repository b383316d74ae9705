"""Roofline of Matrix-Game 2.0: Wan's causal transformer with action modules, and its decoder.

A call denoises the T latent frames of a block, whose queries attend to the frames of the window
(`cfg.local`). Keys and values of the start picture are computed once and cached.
"""

from __future__ import annotations

import math

from matrix_jax.benchmark.roofline_layers import Conv, convolved, rows_sent, size_of
from matrix_jax.dit.wan_caches import sites
from matrix_jax.nn.attention import route


def dit(cfg, frames: int, height: int, width: int) -> float:
    """FLOPs of one call of the transformer on latents of this size."""
    queries, keys = tokens(cfg, frames, height, width)
    d = cfg.width
    # Self-attention, cross-attention to the picture (queries and outputs), MLP.
    block = 4 * queries * d * d + 2 * queries * keys * d
    block += 2 * queries * d * d + 2 * queries * cfg.image_length * d
    block += 2 * queries * d * cfg.mlp
    total = cfg.layers * block
    total += queries * cfg.patch**2 * (2 * cfg.channels + cfg.cond_channels) * d
    total += frames * (cfg.time_dim + 7 * d) * d  # time embedding and modulation
    if cfg.actions:
        size = cfg.actions
        total += len(size.layers) * action_block(cfg, frames, queries)
        if size.modulate:
            inputs = size.ratio * size.span * (size.keyboard + (size.mouse or 0))
            total += frames * (inputs + d) * d
    return 2 * total


def action_block(cfg, frames: int, queries: int) -> float:
    """Multiply-adds of an action module: mouse, then keyboard. All patches of a frame share its
    actions, and each patch attends along time only."""
    size, d, window = cfg.actions, cfg.width, cfg.actions.ratio * cfg.actions.span
    total = 0
    if size.mouse:
        m = size.mouse_width
        total += queries * (2 * d + 4 * m + 2 * cfg.local) * m + frames * window * size.mouse * m
    m, e = size.keyboard_width, size.embed
    total += size.steps(frames) * (size.keyboard + e) * e + 2 * frames * window * e * m
    return total + queries * (2 * d + 2 * cfg.local) * m


def tokens(cfg, frames: int, height: int, width: int) -> tuple[int, int]:
    """(queries, keys) of a call's self-attention: tokens of the block and of the window."""
    per = sites(cfg, height, width)
    return frames * per, cfg.local * per


def decoder(cfg) -> list[Conv]:
    """Convolutions of the autoencoder's decoder after the first frame of a clip."""
    widths, convs = cfg.decoder_widths, []

    def add(inner, outer, taps):
        convs.append(Conv(inner, outer, taps, frames, scale))

    def resnet(inner, outer):
        add(inner, outer, (3, 3, 3))
        add(outer, outer, (3, 3, 3))
        if inner != outer:
            add(inner, outer, (1, 1, 1))

    inner, frames, scale = widths[0], 1, 1
    add(cfg.latent_channels, cfg.latent_channels, (1, 1, 1))
    add(cfg.latent_channels, inner, (3, 3, 3))
    resnet(inner, inner)
    add(inner, 4 * inner, (1, 1, 1))  # projections of the attention
    resnet(inner, inner)
    for level, outer in enumerate(widths):
        for _ in range(cfg.layers + 1):
            resnet(inner, outer)
            inner = outer
        if level == len(widths) - 1:
            break
        if cfg.doubles_time[level]:
            add(inner, 2 * inner, (3, 1, 1))
            frames *= 2
        scale *= 2
        handed = inner if cfg.residual else inner // 2
        add(inner, handed, (1, 3, 3))
        inner = handed
    add(inner, cfg.channels * cfg.patch_size**2, (3, 3, 3))
    return convs


def vae(cfg, height: int, width: int) -> float:
    """FLOPs of decoding one latent frame after the first of a clip."""
    attention = 4 * (height * width) ** 2 * cfg.decoder_widths[0]
    return convolved(decoder(cfg), height, width) + attention


# --- many devices ----------------------------------------------------------------------------


def share(cfg, frames: int, height: int, width: int, parts: int) -> float:
    """Largest share of a call's tokens on one device: the same patches of all frames."""
    per = sites(cfg, height, width)
    return math.ceil(per / parts) / per


def exchanged(cfg, frames: int, height: int, width: int, parts: int) -> tuple[str, float]:
    """What devices exchange during a call, and the bytes that each one sends.

    'heads' if they divide evenly: queries and results of the block, keys and values of the window,
    each once through an all-to-all. Otherwise 'keys': keys and values of the window are
    all-gathered. The prediction, gathered once, is too small to count; action attention runs per
    patch and exchanges nothing.
    """
    mine = math.ceil(sites(cfg, height, width) / parts) * cfg.width * size_of(cfg.dtype)
    what = route(cfg.heads, parts, cfg.exchange)
    times = 2 * (frames + cfg.local) / parts if what == 'heads' else 2 * cfg.local
    return what, cfg.layers * times * mine * (parts - 1)


def bordered(cfg, frames: int, height: int, width: int, parts: int) -> float:
    """Bytes that each device sends to decode `frames` latent frames together, split by rows:
    neighbouring rows for each convolution, and all-gathered keys and values of the attention."""
    if parts == 1:
        return 0
    rows, chunks = math.ceil(height / parts), max(frames // cfg.chunk, 1)
    first = frames - cfg.chunk * (chunks - 1)
    sent = sum(
        rows_sent(decoder(cfg), count, width, cfg.dtype)
        for count in (first, *[cfg.chunk] * (chunks - 1))
    )
    seen = frames * rows * width * 2 * cfg.decoder_widths[0] * size_of(cfg.dtype)
    return sent + (parts - 1) * seen
