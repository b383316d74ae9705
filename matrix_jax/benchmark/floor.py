"""What a shift has to compute and move whatever the program: the floor that measurements stand on.

Only matrix products and convolutions count, two FLOPs for each multiplication and addition; norms,
softmax and activations are left out. Nothing is skipped that the networks define, and nothing is
computed twice that a stream computes once (`World.ready`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Conv(NamedTuple):
    """A convolution of a decoder: channels, taps, and its frames and pixels (in each direction) per
    frame and pixel of the latents."""
    inputs: int
    outputs: int
    taps: tuple[int, int, int]
    frames: int
    scale: int


def decoder(cfg) -> tuple[list[Conv], list[int]]:
    """Convolutions of the autoencoder's decoder, and the channels of its norms."""
    z, widths = cfg.latent_channels, cfg.block_out_channels[::-1]
    convs, norms = [], []

    def add(inner, outer, taps):
        convs.append(Conv(inner, outer, taps, frames, scale))

    def norm(channels):     # scale and shift are read off the latents
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
            add(outer, outer, (1, 3, 3))        # per frame, before time doubles
            frames *= 1 + cfg.halves_time(level)
    norm(inner)
    add(inner, cfg.out_channels * cfg.patch_size ** 2, (3, 3, 3))
    return convs, norms


def vae(cfg, height: int, width: int) -> float:
    """FLOPs of decoding one latent frame of this size, without the first of a clip."""
    return sum(2 * one.inputs * one.outputs * math.prod(one.taps) * one.frames * one.scale ** 2
               * height * width for one in decoder(cfg)[0])


# --- many devices ----------------------------------------------------------------------------


def bordered(cfg, frames: int, width: int, parts: int) -> float:
    """Bytes that each device sends while latent frames are decoded at once, whose rows are split:
    a row up and a row down for each convolution, and two numbers per channel for each norm.

    Args:
      cfg: of the autoencoder.
      frames: latent frames.
      width: of a row of the latents.
      parts: devices.
    """
    if parts == 1:
        return 0
    convs, norms = decoder(cfg)
    rows = sum(2 * (frames * one.frames + one.taps[0] - 1) * width * one.scale * one.inputs
               for one in convs if one.taps[1] > 1)
    return rows * (2 if cfg.dtype == 'bfloat16' else 4) + (parts - 1) * sum(norms) * 2 * 4


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


def bounds(cfg, mesh, rate: float, link: float) -> dict[str, dict[str, float]]:
    """The least that a shift can take on a mesh: {'dit', 'vae'} -> {'seconds' of arithmetic on the
    busiest device, 'bytes' that it sends, 'sending' in seconds}, and 'fps', if all runs at the
    ceilings and nothing is sent while something is computed.

    Args:
      cfg: of the world.
      mesh: `mesh.Mesh` of `seq` alone, or a pipeline, whose parts work at the same time.
      rate: FLOP/s of a device.
      link: bytes per second that a device sends.
    """
    stream, scale = cfg.stream, cfg.vae.spatial_compression
    height, width = cfg.height // scale, cfg.width // scale
    network, pictures = (one.seq for one in mesh.parts or (mesh, mesh))
    places = (height // cfg.dit.patch) * (width // cfg.dit.patch)
    tokens = stream.frames * places + cfg.dit.text_length
    held = (stream.frames * math.ceil(places / network)
            + math.ceil(cfg.dit.text_length / network))
    # What does not divide is padded: the busiest device has as much as the first.
    share = {'dit': held / tokens, 'vae': math.ceil(height / pictures) / height}
    chunks = stream.group_frames // cfg.decode_chunk
    sent = {'dit': stream.passes * exchanged(cfg.dit, stream.frames, height, width, network)[1],
            'vae': chunks * bordered(cfg.vae, cfg.decode_chunk, width, pictures)}
    found = {part: {'seconds': work * share[part] / rate, 'bytes': sent[part],
                    'sending': sent[part] / link} for part, work in flops(cfg).items()}
    both = [one['seconds'] + one['sending'] for one in found.values()]
    frames = stream.group_frames * cfg.frames_per_control
    return found | {'fps': frames / (max(both) if mesh.parts else sum(both))}
