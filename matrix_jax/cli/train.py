"""Train a stage of a world; the same command again continues where it stopped.

    matrix-jax train carracing:SWIN --out runs/swin --weights runs/vae/weights --steps 6000
    matrix-jax train the_matrix:STAGE3 --mesh.fsdp 8 --dry-run     cost of an update per device
    matrix-jax train the_matrix:STAGE3 --dry-run --compile-for h200x8      the same on 8 H200s

Several processes or hosts on one file system run the same command, each with its own number (or the
environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID):

    matrix-jax train RECIPE --mesh.fsdp 16 --coordinator host0:1234 --processes 2 --process 0
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from matrix_jax import config, recipes
from matrix_jax.cli.parser import Parser


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 diverged, 2 bad input, 74 a state could not be saved, 75 stopped by
    SIGTERM with its state saved. After 74 and 75 the same command continues."""
    parser = Parser('train', __doc__)
    add = parser.add_argument
    add(
        '--dry-run',
        action='store_true',
        help='compile one update in full size, print its memory and FLOPs',
    )
    add(
        '--compile-for',
        metavar='GPUS',
        help='with --dry-run: compile for h200 or h200x8 instead, without any GPU',
    )
    add(
        '--coordinator',
        metavar='HOST:PORT',
        help='address of process 0; auto asks the cluster (Slurm, MPI, ...)',
    )
    add('--processes', type=int, metavar='N', help='number of processes')
    add('--process', type=int, metavar='I', help='number of this process, from 0')
    args, run = parser.parse_run(argv, 'carracing:SWIN')
    if run.stage is None:
        able = [name for name in recipes.list_recipes() if recipes.load(name).stage]
        raise config.UsageError(
            f'{run.name}: has no training stage; recipes with one: ' + ', '.join(able)
        )
    if args.compile_for and not args.dry_run:
        raise config.UsageError(f'--compile-for: got {args.compile_for} without --dry-run')
    if args.dry_run:
        with config.usage_errors():
            if args.compile_for:
                from matrix_jax.benchmark import compile_for

                print(compile_for.training(run, args.compile_for))
                return 0
            from matrix_jax.train import dry_run

            dry_run.emulate_devices(run.mesh.devices)
            print(dry_run.report(run))
        return 0
    if run.data is None:
        raise config.UsageError('--data: needs a folder of recorded clips (matrix-jax collect)')
    out = run.out or f'runs/{run.name.replace(":", "-").lower()}'
    config.check_writable('--out', out, folder=True)
    run = dataclasses.replace(run, out=out)
    with config.usage_errors():
        from matrix_jax import worlds
        from matrix_jax.data import records
        from matrix_jax.train import multihost
        from matrix_jax.train.loop import fit
        from matrix_jax.train.nan_guard import Diverged
        from matrix_jax.weights.diffusers_layout import SaveError

        run.stage.check_world(worlds.build(run.world))
        others = multihost.settings(args.coordinator, args.processes, args.process)
        for folder in records.folders(run.data):
            records.shards(Path(folder), 'train')
        multihost.join(others)
        alone = config.lock_folder('--out', out) if multihost.first() else contextlib.nullcontext()
        with alone:
            world, params = worlds.start(run)
            try:
                result = fit(run, world, params)
            except (Diverged, SaveError) as error:
                print(f'error: {error}', file=sys.stderr)
                return 1 if isinstance(error, Diverged) else 74
    if multihost.first():
        print(f'step {result["step"]} loss {result["loss"]:.6f}')
    return 0
