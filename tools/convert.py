"""Convert a folder of weights: released layout (safetensors, or pickles) <-> ours (orbax).

tools/convert.py SRC DST                                   either way, by what SRC holds
tools/convert.py VAE.pth DIR/vae --recipe RECIPE           one pickle, to a part of the recipe
tools/convert.py --random the_matrix:STAGE4 DST --layers 2  random weights, released layout
"""

import importlib.util
import subprocess
import sys

from matrix_jax import config
from matrix_jax.cli.arguments import SEED, whole

# Reads tensors only, in a process of its own: a pickle can be made to run code.
UNPICKLE = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location='cpu', weights_only=True)
state = state.get('state_dict', state)
save_file({name: value.contiguous().clone() for name, value in state.items()}, sys.argv[2])
"""


def unpickle(source, target):
    """Tensors of a PyTorch pickle to safetensors."""
    if importlib.util.find_spec('torch') is None:
        raise config.UsageError(f"{source}: a pickle needs torch: pip install -e '.[parity]'")
    done = subprocess.run(
        [sys.executable, '-c', UNPICKLE, source, target], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise config.UsageError(f'{source}: not a pickle of tensors alone ({reason})')


def main(argv):
    """Exit codes: 0 done, 2 bad input (nothing is written)."""
    parser = config.Parser(__doc__)
    parser.add_argument('source', nargs='?', metavar='SRC', help='folder, or one pickle')
    parser.add_argument('target', metavar='DST', help='must not exist')
    parser.add_argument('--recipe', default='the_matrix:STAGE4', help='a world of that kind')
    parser.add_argument('--random', metavar='RECIPE', help='write random weights to DST; no SRC')
    parser.add_argument(
        '--layers', type=whole(1), help='of random weights, if fewer than the recipe'
    )
    parser.add_argument(
        '--text-layers', type=whole(1), help='of its text encoder (default: --layers)'
    )
    parser.add_argument(
        '--seed', type=whole(0, SEED), default=0, help='of random weights (default 0)'
    )
    options = parser.parse_args(argv)
    if bool(options.random) == bool(options.source):
        raise config.UsageError('expected SRC and DST, or --random RECIPE and DST')
    cfg = config.load(options.random or options.recipe).world
    with config.door():
        from matrix_jax.weights import converter

        if options.random:
            line = converter.write_random(
                cfg, options.target, options.seed, options.layers, options.text_layers
            )
        else:
            line = converter.translate(cfg, options.source, options.target, unpickle)
    print(line)


if __name__ == '__main__':
    config.main_guard(main)
