"""Convert weights between the diffusers layout and orbax, either way; write clips for LeRobot.

matrix-jax convert SRC DST                                   safetensors, pickles or orbax in SRC
matrix-jax convert VAE.pth DIR/vae --recipe RECIPE           one pickle, to a part of the recipe
matrix-jax convert --random the_matrix:STAGE4 DST --layers 2  random weights, diffusers layout
matrix-jax convert --export carracing DST                    the stream's programs, by jax.export
matrix-jax convert --lerobot data/doom DST                   recorded clips, as a LeRobot data set
matrix-jax convert --compile-for cpu carracing DST           weights and compiled programs
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matrix_jax import config, recipes
from matrix_jax.cli.parser import SEED, Parser, whole

# Loads tensors only, and in a process of its own, because a pickle can contain code. Trainers nest
# the weights (the average over training first) beside numbers such as a step, and wrap the names.
UNPICKLE = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location='cpu', weights_only=True)
names = ('generator_ema', 'ema', 'state_dict', 'model', 'gen_model', 'generator', 'module')
while inner := next((state[name] for name in names if isinstance(state.get(name), dict)), None):
    state = inner
tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
others = [name for name, value in state.items() if isinstance(value, (dict, list))]
if not tensors or others:
    sys.exit('it holds ' + ', '.join(map(str, list(state)[:5])))
for prefix in ('_orig_mod.', 'module.', '_fsdp_wrapped_module.') * 2:
    if all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
tensors = {name.replace('_fsdp_wrapped_module.', ''): one for name, one in tensors.items()}
save_file({name: value.contiguous().clone() for name, value in tensors.items()}, sys.argv[2])
"""


def unpickle(source: Path, target: Path) -> None:
    """Writes the tensors of a PyTorch pickle as safetensors."""
    if importlib.util.find_spec('torch') is None:
        raise config.UsageError(f"{source}: a pickle needs torch: pip install 'matrix_jax[parity]'")
    done = subprocess.run(
        [sys.executable, '-c', UNPICKLE, source, target], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise config.UsageError(f'{source}: not a pickle of tensors alone ({reason})')


def _compile(args: argparse.Namespace) -> None:
    """Writes weights and compiled programs."""
    run = recipes.load(args.source)
    run = dataclasses.replace(run, weights=args.weights or run.weights)
    if args.compile_for != 'cpu':
        from matrix_jax.parallel import compile_only

        try:
            compile_only.parse(args.compile_for)
        except ValueError as error:
            raise config.UsageError(
                f'--compile-for: got {args.compile_for}, expected cpu, {compile_only.NAMES}'
            ) from error
    from matrix_jax.pipelines import compile_ahead

    with config.usage_errors():
        print(compile_ahead.save(run, args.compile_for, args.target, args.players or 4))


def main(argv: Sequence[str]) -> None:
    """Exit codes: 0 done, 2 bad input (nothing is written)."""
    parser = Parser('convert', __doc__)
    add = parser.add_argument
    add('source', nargs='?', metavar='SRC', help='folder, or one pickle')
    add('target', metavar='DST', help='must not exist')
    add('--recipe', default='the_matrix:STAGE4', help='a recipe of the same world')
    add('--random', metavar='RECIPE', help='write random weights to DST; no SRC')
    add('--export', metavar='RECIPE', help='write the programs of a stream to DST; no SRC')
    add('--lerobot', metavar='DATA', help='write recorded clips to DST as LeRobot v3.0; no SRC')
    add(
        '--compile-for',
        metavar='DEVICE',
        help='cpu, h200, or h200x2 to h200x8: write the weights of a RECIPE to DST, and the '
        'programs of generate and play; SRC is the RECIPE',
    )
    add('--players', type=whole(1, 1024), help='with --compile-for: as of play (default 4)')
    add('--weights', help='of --export and --compile-for, if the recipe brings none')
    add('--layers', type=whole(1), help='layers of random weights, if fewer than the recipe')
    add('--text-layers', type=whole(1), help='layers of their text encoder (default: --layers)')
    add('--allow-non-finite', action='store_true', help='take weights that are not finite')
    add('--seed', type=whole(0, SEED), default=0, help='seed of random weights (default 0)')
    args = parser.parse_args(argv)
    if args.players is not None and not args.compile_for:
        raise config.UsageError(f'--players: got {args.players}, expected --compile-for with it')
    if args.compile_for:
        if args.random or args.export or args.lerobot or not args.source:
            raise config.UsageError('--compile-for: expected RECIPE and DST')
        return _compile(args)
    if sum(map(bool, (args.random, args.export, args.lerobot, args.source))) != 1:
        raise config.UsageError(
            'expected SRC and DST, or DST with --random RECIPE, --export RECIPE or --lerobot DATA'
        )
    if args.lerobot:
        from matrix_jax.data import lerobot_export

        config.check_writable('DST', args.target)
        with config.usage_errors():
            print(lerobot_export.export(args.lerobot, args.target))
        return
    if args.export:
        from matrix_jax.pipelines import export

        run = recipes.load(args.export)
        run = dataclasses.replace(run, weights=args.weights or run.weights)
        with config.usage_errors():
            print(export.save(run, args.target))
        return
    cfg = recipes.load(args.random or args.recipe).world
    with config.usage_errors():
        from matrix_jax.weights import converter

        if args.random:
            line = converter.write_random(
                cfg, args.target, args.seed, args.layers, args.text_layers
            )
        else:
            line = converter.convert(cfg, args.source, args.target, unpickle, args.allow_non_finite)
    print(line)
