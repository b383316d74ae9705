"""Make a trained world small enough to ship: bfloat16 weights and held-out start clips.

matrix-jax bundle carracing --weights runs/swin/weights --data data/carracing --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from matrix_jax import config
from matrix_jax.cli.parser import Parser

LIMIT = 12 * 2**20  # bytes of a bundled world


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input."""
    parser = Parser('bundle', __doc__)
    parser.add_argument(
        '--share',
        metavar='NAME',
        help='refer to this bundled world for components that it has as well, such as the '
        'autoencoder',
    )
    args, run = parser.parse_run(argv, 'carracing')
    if not (run.data and run.out and run.weights):
        raise config.UsageError('--data, --out and --weights: all are needed')
    config.check_writable('--out', run.out, folder=True)
    with config.usage_errors():
        from matrix_jax import worlds
        from matrix_jax.data import start_clips
        from matrix_jax.weights import diffusers_layout
        from matrix_jax.worlds.protocols import TextWorld

        if args.share and args.share not in diffusers_layout.bundled_names():
            raise config.UsageError(
                f'--share: got {args.share!r}, expected one of '
                f'{", ".join(diffusers_layout.bundled_names())}'
            )
        folder = diffusers_layout.resolve(run.weights)
        world, params = worlds.open_run(run)
        world.save(run.out, params, start=str(folder))

        text = world.reads_text

        def unread(caption: str) -> str:
            return cast(TextWorld, world).tokenize_and_cut([caption])[1][0] if text else ''

        start_clips.write(run.data, run.out, picture=world.start_frames == 1, unread=unread)
        shared = diffusers_layout.share(run.out, args.share) if args.share else []
    size = sum(path.stat().st_size for path in Path(run.out).rglob('*') if path.is_file())
    if size > LIMIT:
        raise config.UsageError(f'{run.out}: {size} bytes, expected at most {LIMIT}')
    note = f', {", ".join(shared)} shared with {args.share}' if shared else ''
    print(f'{run.out}: {size / 2**20:.2f} MiB{note}')
