"""Roofline of Matrix-Game 3.0: Wan's transformer with memory and camera.

A call denoises the T latent frames of a segment after M memory frames; all of them attend to all.
The decoder is that of Wan (`roofline_wan`). The null condition of guidance has no memory frames; it
is counted as if it had.
"""

from __future__ import annotations

import math

from matrix_jax.benchmark.roofline_layers import size_of
from matrix_jax.benchmark.roofline_wan import bordered, vae
from matrix_jax.dit.wan_caches import sites
from matrix_jax.nn.attention import route

__all__ = ['bordered', 'dit', 'exchanged', 'share', 'tokens', 'vae']


def dit(cfg, frames: int, height: int, width: int) -> float:
    """FLOPs of one call of the transformer on latents of this size, memory frames included."""
    queries, keys = tokens(cfg, frames, height, width)
    d, length = cfg.width, cfg.text_length
    # Self-attention, cross-attention to the text, MLP.
    block = 4 * queries * d * d + 2 * queries * keys * d
    block += 2 * queries * d * d + 2 * length * d * d + 2 * queries * length * d
    block += 2 * queries * d * cfg.mlp
    patch = cfg.patch**2
    total = queries * patch * (cfg.in_channels + cfg.channels) * d
    total += length * (cfg.text_dim + d) * d
    total += frames * (cfg.time_dim + 7 * d) * d  # time embedding and modulation
    if cfg.memory:
        block += 4 * queries * d * d
        total += queries * (patch * cfg.camera_channels + 2 * d) * d
    total += cfg.layers * block
    if cfg.actions:
        total += len(cfg.actions.layers) * action_block(cfg, frames, queries)
    return 2 * total


def action_block(cfg, frames: int, queries: int) -> float:
    """Multiply-adds of an action module: mouse, then keyboard. All patches of a frame share its
    actions, and each patch attends along time only."""
    size, d, window, total = cfg.actions, cfg.width, cfg.actions.ratio * cfg.actions.span, 0
    if size.mouse:
        m = size.mouse_width
        total += queries * (2 * d + 4 * m + 2 * frames) * m + frames * window * size.mouse * m
    if size.keyboard:
        m, e = size.keyboard_width, size.embed
        total += frames * window * (size.keyboard + e) * e + 2 * frames * window * e * m
        total += queries * (2 * d + 2 * frames) * m
    return total


def tokens(cfg, frames: int, height: int, width: int) -> tuple[int, int]:
    """(queries, keys) of a call's self-attention: all tokens attend to all."""
    count = frames * sites(cfg, height, width)
    return count, count


def share(cfg, frames: int, height: int, width: int, parts: int) -> float:
    """Largest share of a call's tokens on one device: the same patches of all frames."""
    per = sites(cfg, height, width)
    return math.ceil(per / parts) / per


def exchanged(cfg, frames: int, height: int, width: int, parts: int) -> tuple[str, float]:
    """What devices exchange during a call, and the bytes that each one sends.

    'heads' if they divide evenly: queries, keys, values and results through an all-to-all.
    Otherwise 'keys': keys and values are all-gathered.
    """
    mine = math.ceil(sites(cfg, height, width) / parts) * frames * cfg.width * size_of(cfg.dtype)
    what = route(cfg.heads, parts, cfg.exchange)
    times = 4 / parts if what == 'heads' else 2
    return what, cfg.layers * times * mine * (parts - 1)
