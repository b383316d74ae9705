"""Train a stage of a world; run it again to go on where it stopped.

    tools/train.py carracing:SWIN --out runs/swin --weights runs/vae/weights --steps 6000
"""

import dataclasses
import sys

from matrix_jax import config


def main(argv):
    """Exit codes: 0 done, 1 diverged, 2 bad input, 74 a save could not be written, 75 stopped by
    SIGTERM with its state saved. After 74 and 75 the same command goes on."""
    _, run = config.Parser(__doc__).run(argv, recipe='carracing:SWIN')
    if run.stage is None:
        able = [name for name in config.list_recipes() if config.load(name).stage]
        raise config.UsageError(f'{run.name}: has no training stage; recipes with one: '
                                + ', '.join(able))
    if run.data is None:
        raise config.UsageError('--data: needs a folder of recorded clips (tools/collect.py)')
    run = dataclasses.replace(run, out=run.out or f'runs/{run.name.replace(":", "-").lower()}')
    with config.door():
        from matrix_jax import checkpoint, worlds
        from matrix_jax.train.guard import Diverged
        from matrix_jax.train.loop import fit
        world, params = worlds.start(run)
        try:
            result = fit(run, world, params)
        except Diverged as error:
            print(f'error: {error}', file=sys.stderr)
            return 1
        except checkpoint.SaveError as error:
            print(f'error: {error}', file=sys.stderr)
            return 74
    print(f'step {result["step"]} loss {result["loss"]:.6f}')


if __name__ == '__main__':
    config.main_guard(main)
