"""Roofline of a step: the least that any program must compute and send.

Counts matrix products and convolutions, two FLOPs per multiply-add, and leaves out norms, softmax
and activations. What a stream computes once, in `init`, does not count.

Each kind of network has a module of functions, named in `NETWORKS`:

    dit(cfg, frames, height, width)               FLOPs of a call
    tokens(cfg, frames, height, width)            (queries, keys) of a call's self-attention
    share(cfg, frames, height, width, parts)      largest share of the tokens on one device
    exchanged(cfg, frames, height, width, parts)  (what devices exchange, bytes sent by each)
    vae(cfg, height, width)                       FLOPs of decoding one latent frame
    bordered(cfg, frames, height, width, parts)   bytes sent by each device while decoding

`cfg` is the config of the transformer or of the autoencoder; `height` and `width` are latent sizes.
"""

from __future__ import annotations

import math

from matrix_jax import worlds
from matrix_jax.benchmark import roofline_cogvideox, roofline_wan, roofline_wan_memory

NETWORKS = {'cogvideox': roofline_cogvideox, 'wan': roofline_wan, 'wan_memory': roofline_wan_memory}


def of(cfg):
    """The module that counts for the networks of a world's config (`BaseWorld.roofline`)."""
    return NETWORKS[worlds.build(cfg).roofline]


def size(cfg) -> tuple[int, int]:
    """Latent height and width of a world's config."""
    scale = cfg.vae.spatial_compression
    return cfg.height // scale, cfg.width // scale


def decoder(cfg):
    """Config of the autoencoder that decodes the stream (`BaseWorld.decoder_vae`)."""
    return worlds.build(cfg).decoder_vae


def frames(cfg) -> int:
    """Pixel frames that one step of a world's config makes."""
    return cfg.stream.step_frames * cfg.vae.temporal_compression


def flops(cfg) -> dict[str, float]:
    """FLOPs {'dit', 'vae'} of one step of a world's config."""
    stream, net = cfg.stream, of(cfg)
    return {
        'dit': stream.passes * net.dit(cfg.dit, stream.frames, *size(cfg)),
        'vae': stream.step_frames * net.vae(decoder(cfg), *size(cfg)),
    }


def bounds(cfg, mesh, rate: float, link: float) -> dict[str, dict[str, float]]:
    """Bounds of a step on a mesh when computing and sending do not overlap.

    Args:
      cfg: the world's config.
      mesh: `mesh.Mesh` with a `seq` axis alone, or a pipeline, whose parts run concurrently.
      rate: FLOP/s of a device.
      link: bytes per second that a device sends.

    Returns:
      'dit' and 'vae' -> {'seconds' of arithmetic on the busiest device, 'bytes' that it sends,
      'sending' in seconds}, and 'fps'.
    """
    stream, net, whole = cfg.stream, of(cfg), size(cfg)
    network, pictures = (one.seq for one in mesh.parts or (mesh, mesh))
    # Uneven splits are padded; the first device has the most.
    share = {
        'dit': net.share(cfg.dit, stream.frames, *whole, network),
        'vae': math.ceil(whole[0] / pictures) / whole[0],
    }
    chunk = worlds.build(cfg).decode_chunk or stream.step_frames
    sent = {
        'dit': stream.passes * net.exchanged(cfg.dit, stream.frames, *whole, network)[1],
        'vae': stream.step_frames // chunk * net.bordered(decoder(cfg), chunk, *whole, pictures),
    }
    found = {
        part: {
            'seconds': work * share[part] / rate,
            'bytes': sent[part],
            'sending': sent[part] / link,
        }
        for part, work in flops(cfg).items()
    }
    both = [one['seconds'] + one['sending'] for one in found.values()]
    return found | {'fps': frames(cfg) / (max(both) if mesh.parts else sum(both))}
