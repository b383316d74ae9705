"""Train a stage of a world; run it again to go on where it stopped.

    tools/train.py carracing:SWIN --out runs/swin --weights runs/vae/weights --steps 6000
    tools/train.py the_matrix:STAGE3 --mesh.fsdp 8 --dry-run       what an update costs per device

Several processes or hosts, each with the same command and a number of its own (or the environment:
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), on one file system:

    tools/train.py RECIPE --mesh.fsdp 16 --coordinator host0:1234 --processes 2 --process 0
"""

import dataclasses
import sys

from matrix_jax import config
from matrix_jax.cli.arguments import check_place


def main(argv):
    """Exit codes: 0 done, 1 diverged, 2 bad input, 74 a save could not be written, 75 stopped by
    SIGTERM with its state saved. After 74 and 75 the same command goes on."""
    parser = config.Parser(__doc__)
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='compile one update in full size, print its memory and FLOPs',
    )
    parser.add_argument(
        '--coordinator',
        metavar='HOST:PORT',
        help='where process 0 listens; auto asks the cluster (Slurm, MPI, ...)',
    )
    parser.add_argument('--processes', type=int, metavar='N', help='how many there are')
    parser.add_argument('--process', type=int, metavar='I', help='which of them this is, from 0')
    options, run = parser.run(argv, recipe='carracing:SWIN')
    if run.stage is None:
        able = [name for name in config.list_recipes() if config.load(name).stage]
        raise config.UsageError(
            f'{run.name}: has no training stage; recipes with one: ' + ', '.join(able)
        )
    if options.dry_run:
        with config.door():
            from matrix_jax.train import dry_run

            dry_run.imitate(run.mesh.devices)
            print(dry_run.report(run))
        return 0
    if run.data is None:
        raise config.UsageError('--data: needs a folder of recorded clips (tools/collect.py)')
    run = dataclasses.replace(run, out=run.out or f'runs/{run.name.replace(":", "-").lower()}')
    check_place('--out', run.out, folder=True)
    with config.door():
        from matrix_jax import worlds
        from matrix_jax.data import records
        from matrix_jax.train import multihost
        from matrix_jax.train.loop import fit
        from matrix_jax.train.nan_guard import Diverged
        from matrix_jax.weights import diffusers_layout

        others = multihost.settings(options.coordinator, options.processes, options.process)
        for folder in records.folders(run.data):
            records.shards(folder, 'train')
        multihost.join(others)
        world, params = worlds.start(run)
        try:
            result = fit(run, world, params)
        except Diverged as error:
            print(f'error: {error}', file=sys.stderr)
            return 1
        except diffusers_layout.SaveError as error:
            print(f'error: {error}', file=sys.stderr)
            return 74
    if multihost.first():
        print(f'step {result["step"]} loss {result["loss"]:.6f}')


if __name__ == '__main__':
    config.main_guard(main)
