"""Make a trained world ready to ship: weights in bfloat16 and held-out start clips.

tools/bundle.py carracing --weights runs/swin/weights --data data/carracing --out DIR
"""

from pathlib import Path

from matrix_jax import config
from matrix_jax.cli.arguments import check_place

LIMIT = 12 * 2**20  # bytes; a clone stays light


def main(argv):
    """Exit codes: 0 done, 2 bad input."""
    _, run = config.Parser(__doc__).run(argv, recipe='carracing')
    if not (run.data and run.out):
        raise config.UsageError('--data and --out: both are needed')
    check_place('--out', run.out, folder=True)
    with config.door():
        from matrix_jax import worlds
        from matrix_jax.data import start_clips
        from matrix_jax.weights import diffusers_layout

        folder = diffusers_layout.resolve(run.weights)
        world, params = worlds.open_run(run)
        world.save(run.out, params, start=folder)
        start_clips.write(run.data, run.out, picture=world.start_frames == 1)
    size = sum(path.stat().st_size for path in Path(run.out).rglob('*') if path.is_file())
    if size > LIMIT:
        raise config.UsageError(f'{run.out}: {size} bytes, expected at most {LIMIT}')
    print(f'{run.out}: {size / 2**20:.2f} MiB')


if __name__ == '__main__':
    config.main_guard(main)
