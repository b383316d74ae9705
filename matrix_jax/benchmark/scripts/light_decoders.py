"""Measures decoders with fewer channels against the full one: PSNR and frames per second.

    python -m matrix_jax.benchmark.scripts.light_decoders --recipe gallery:MEMORY \
        --data data/gallery --weights full=runs/memory/weights 50=runs/light50/weights \
        75=runs/light75/weights

Prints a table, a row per weights folder. The first folder must have the full autoencoder; all
others have a light decoder in `vae_decoder`. The clips are held-out ones.
Speeds are those of the streaming decoder, in frames per CPU second of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import jax
import numpy as np

from matrix_jax import recipes, worlds
from matrix_jax.benchmark.scripts.autoencoders import CLIPS, FRAMES, edges, speed
from matrix_jax.data.loader import Clips
from matrix_jax.evals.markdown import table
from matrix_jax.evals.video import psnr, rebuild
from matrix_jax.weights import diffusers_layout

HEAD = (
    'decoder',
    'channels',
    'parameters',
    'PSNR, dB',
    'PSNR to the full decoder, dB',
    'edges',
    'frames per CPU second',
)


def main(argv):
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--recipe', default='gallery:MEMORY')
    parser.add_argument('--data', required=True, help='recorded clips')
    parser.add_argument('--weights', nargs='+', required=True, metavar='NAME=WEIGHTS')
    args = parser.parse_args(argv)
    given = [one.partition('=') for one in args.weights]
    if not all(sign and weights for _, sign, weights in given):
        parser.error('--weights: expected NAME=WEIGHTS')
    opened = {name: read(args.recipe, weights) for name, _, weights in given}
    full = next(iter(opened.values()))
    if full[0].cfg.light is not None:
        parser.error(f'--weights: {given[0][2]} has a light decoder, expected the full one first')
    print('\n'.join(table(HEAD, rows(opened, Clips(args.data, 'heldout', FRAMES, cache=False)))))


def read(recipe: str, weights: str):
    """(world, parameters of its autoencoder) of a weights folder, with the light decoder if it has
    one."""
    cfg = recipes.load(recipe).world
    folder = diffusers_layout.resolve(weights)
    has_light = worlds.build(cfg).has_part(folder, 'vae_decoder')
    cfg = dataclasses.replace(cfg, light=cfg.vae if has_light else None)
    world = worlds.describe(cfg, folder)
    names = ('vae', 'vae_decoder') if has_light else ('vae',)
    return world, world.load(folder, only=names)


def rows(opened: dict, held_out, clips: int = CLIPS) -> list[list[str]]:
    """Rows of the table under `HEAD`; the first of `opened` is the full autoencoder."""
    made, whole = [], None
    for name, (world, params) in opened.items():
        shape = world.cfg.stream.context, world.cfg.stream.step_frames
        frames, true = rebuild(world, params, held_out, clips, FRAMES, *shape)
        whole = frames if whole is None else whole
        decoder = params['vae_decoder' if world.cfg.light else 'vae']['decoder']
        count = sum(leaf.size for leaf in jax.tree.leaves(decoder))
        same = psnr(zip(whole, frames, strict=True))
        made.append(
            [
                name,
                str(world.decoder_vae.decoder_widths[-1]),
                f'{count / 1e6:.2f} M',
                f'{psnr(zip(true, frames, strict=True)):.1f}',
                '' if np.isinf(same) else f'{same:.1f}',
                f'{edges(true, frames):.2f}',
                f'{speed(world, params):.0f}',
            ]
        )
    return made


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main(sys.argv[1:])
