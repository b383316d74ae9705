"""What a step has to compute and move whatever the program: the floor that measurements stand on.

Only matrix products and convolutions count, two FLOPs for each multiplication and addition; norms,
softmax and activations are left out. Nothing is skipped that the networks define, and nothing is
computed twice that a stream computes once (`World.ready`, `init`).

Each kind of network has a module that counts for it:

    dit(cfg, frames, height, width)               FLOPs of a call
    tokens(cfg, frames, height, width)            (queries, keys) of a call's self-attention
    share(cfg, frames, height, width, parts)      of them, on the busiest of devices
    exchanged(cfg, frames, height, width, parts)  (what they exchange, bytes that each one sends)
    vae(cfg, height, width)                       FLOPs of decoding a latent frame
    bordered(cfg, frames, height, width, parts)   bytes that each one sends to decode them
"""

from __future__ import annotations

import math

from matrix_jax import worlds
from matrix_jax.benchmark import roofline_cogvideox, roofline_wan
from matrix_jax.dit import cogvideox, wan_config

FLOORS = {cogvideox.Config: roofline_cogvideox, wan_config.Config: roofline_wan}


def of(cfg):
    """The module that counts for the networks of a world's config."""
    return FLOORS[type(cfg.dit)]


def size(cfg) -> tuple[int, int]:
    """Height and width of the latents of a world's config."""
    scale = cfg.vae.spatial_compression
    return cfg.height // scale, cfg.width // scale


def frames(cfg) -> int:
    """Frames that a step of a world's config makes."""
    return cfg.stream.step_frames * cfg.vae.temporal_compression


def flops(cfg) -> dict[str, float]:
    """FLOPs of one step of a world's config: {'dit', 'vae'}."""
    stream, net = cfg.stream, of(cfg)
    return {
        'dit': stream.passes * net.dit(cfg.dit, stream.frames, *size(cfg)),
        'vae': stream.step_frames * net.vae(cfg.vae, *size(cfg)),
    }


def bounds(cfg, mesh, rate: float, link: float) -> dict[str, dict[str, float]]:
    """The least that a step can take on a mesh: {'dit', 'vae'} -> {'seconds' of arithmetic on the
    busiest device, 'bytes' that it sends, 'sending' in seconds}, and 'fps', if all runs at the
    ceilings and nothing is sent while something is computed.

    Args:
      cfg: of the world.
      mesh: `mesh.Mesh` of `seq` alone, or a pipeline, whose parts work at the same time.
      rate: FLOP/s of a device.
      link: bytes per second that a device sends.
    """
    stream, net, whole = cfg.stream, of(cfg), size(cfg)
    network, pictures = (one.seq for one in mesh.parts or (mesh, mesh))
    # What does not divide is padded: the busiest device has as much as the first.
    share = {
        'dit': net.share(cfg.dit, stream.frames, *whole, network),
        'vae': math.ceil(whole[0] / pictures) / whole[0],
    }
    chunk = worlds.build(cfg).decode_chunk or stream.step_frames
    sent = {
        'dit': stream.passes * net.exchanged(cfg.dit, stream.frames, *whole, network)[1],
        'vae': stream.step_frames // chunk * net.bordered(cfg.vae, chunk, *whole, pictures),
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
