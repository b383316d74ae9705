"""Trains the recipes of configs/autoencoders.py in turn, and measures their reconstructions.

    python -m matrix_jax.benchmark.scripts.autoencoders --data data/carracing \
        --out runs/autoencoders
    python -m matrix_jax.benchmark.scripts.autoencoders ... --only LEAN CROPS \
        --weights shipped=carracing

Prints a table and writes OUT/NAME/sheet.png: true frames of held-out clips, with kerbs in view, and
below them the reconstructions. Call it again after an interruption: an unfinished run resumes, a
finished one is only read. CPU times are those of the process, so other processes do not count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from matrix_jax import recipes, video, worlds
from matrix_jax.data.loader import Clips
from matrix_jax.evals import drift
from matrix_jax.evals.carracing import shape
from matrix_jax.evals.video import psnr, rebuild
from matrix_jax.parallel import compilation
from matrix_jax.weights import conversion

CLIPS, FRAMES = 16, 25  # held-out clips and frames of each, as in the model cards
SHOWN = 6  # clips on a sheet


def main(argv):
    """Runs everything; exits with the code of the first training that fails."""
    names = [name.partition(':')[2] for name in recipes.list_recipes('autoencoders')]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', required=True, help='recorded clips')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument(
        '--only',
        nargs='*',
        choices=names,
        default=names,
        metavar='NAME',
        help=f'recipes to run, of {", ".join(names)}',
    )
    parser.add_argument(
        '--weights',
        nargs='+',
        default=[],
        metavar='NAME=WEIGHTS',
        help='trained weights for more rows of the table, as `matrix-jax generate` takes them',
    )
    args = parser.parse_args(argv)
    for given in args.weights:
        if '=' not in given:
            parser.error(f'--weights: got {given!r}, expected NAME=WEIGHTS')
    rows = []
    for name in args.only:
        run, result = args.out / name / 'run', args.out / name
        if not (run / 'weights').is_dir():
            train(name, args.data, run)
        rows.append(read(name, f'autoencoders:{name}', str(run / 'weights'), args.data, result))
    for given in args.weights:
        name, _, weights = given.partition('=')
        rows.append(read(name, 'carracing:PLAY', weights, args.data, args.out / name))
    print(table(rows))


def train(name: str, data: str, run: Path):
    """Trains a recipe, and writes the CPU seconds of all its starts to run/cpu_seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ['train', f'autoencoders:{name}', '--data', data, '--out', str(run)]
    done = subprocess.run([sys.executable, '-m', 'matrix_jax', *command])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    path = run / 'cpu_seconds'
    if run.is_dir():
        path.write_text(f'{spent + float(path.read_text() if path.exists() else 0):.0f}\n')
    if done.returncode:
        sys.exit(done.returncode)


def read(name: str, recipe: str, weights: str, data: str, out: Path) -> dict:
    """The row of trained weights, measured once and kept in out/results.json."""
    path = out / 'results.json'
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(name, recipe, weights, data, out), indent=1))
    return json.loads(path.read_text())


def measure(name: str, recipe: str, weights: str, data: str, out: Path) -> dict:
    """Figures of an autoencoder on held-out clips; writes out/sheet.png."""
    run = recipes.load(recipe, [f'--weights={weights}'])
    world, params = worlds.start(run)
    held_out = Clips(data, 'heldout', FRAMES, cache=False)
    made, true = rebuild(world, params, held_out, CLIPS, FRAMES, *shape(world))
    by_clip = [psnr([pair]) for pair in zip(true, made, strict=True)]
    draw(true, made, out / 'sheet.png')
    cpu = Path(weights).parent / 'cpu_seconds'
    vae = world.cfg.vae
    scale = vae.spatial_compression
    return {
        'name': name,
        'psnr': psnr(zip(true, made, strict=True)),
        'worst': min(by_clip),
        'best': max(by_clip),
        'edges': edges(true, made),
        'decoder_fps': speed(world, params),
        'parameters': sum(leaf.size for leaf in conversion.flatten(params['vae']).values()),
        'latent': [world.cfg.height // scale, world.cfg.width // scale, vae.latent_channels],
        'clips': run.train.batch * run.train.steps if run.stage else None,
        'frames': run.stage.frames if run.stage else None,
        'minutes': float(cpu.read_text()) / 60 if cpu.exists() else None,
    }


def draw(true, made, path: Path):
    """Writes true frames and reconstructions of the clips with the most kerbs.

    Args:
      true, made: clips uint8 [N F H W 3].
      path: image file.
    """
    sharpest = [int(np.argmax(drift.sharpness(clip))) for clip in true]
    colors = true.astype(int)
    kerbs = ((colors[..., 0] > 150) & (colors[..., 1] < 90)).mean(axis=(1, 2, 3))  # red pixels
    pictures = [
        video.enlarge(clips[index][sharpest[index]], 3 * clips.shape[3])
        for clips in (true, made)
        for index in np.argsort(-kerbs)[:SHOWN]
    ]
    video.write_image(path, video.contact_sheet(pictures, min(SHOWN, len(true))))


def edges(true, made) -> float:
    """Contrast of edges relative to the true frames, where it is 1.

    Differences of neighbouring pixels are projected on the true ones. Blur lowers the value, and
    noise does not raise it.
    """
    both = square = 0.0
    for axis in (2, 3):
        steps, drawn = (np.diff(clips.astype(np.float32), axis=axis) for clips in (true, made))
        both += (steps * drawn).sum(dtype=np.float64)
        square += np.square(steps).sum(dtype=np.float64)
    return float(both / square)


def speed(world, params) -> float:
    """Frames per CPU second of the streaming decoder, one latent frame at a time."""
    cfg, decoder = world.cfg, world.decoder()
    scale = cfg.vae.spatial_compression
    size = 1, 1, cfg.height // scale, cfg.width // scale, cfg.vae.latent_channels
    latents = np.random.default_rng(0).standard_normal(size, np.float32)
    cache, _ = compilation.jit(decoder.prefill)(params, latents)
    step, rates = compilation.jit(decoder.step), []
    for _ in range(30):
        began = time.process_time()
        cache, frames = jax.block_until_ready(step(params, cache, latents))
        rates.append(frames.shape[1] / max(time.process_time() - began, 1e-9))
    return float(np.median(rates[5:]))


def table(rows) -> str:
    """Markdown table of the rows of `read`."""
    lines = [
        '| variant | parameters | latent | clips seen | CPU minutes | CPU s per clip | PSNR, dB | '
        'by clip | edges | decoder, frames per CPU second |',
        '|---' * 10 + '|',
    ]
    for row in rows:
        seen, minutes = row['clips'], row['minutes']
        lines.append(
            '| '
            + ' | '.join(
                (
                    row['name'],
                    f'{row["parameters"] / 1e6:.2f} M',
                    'x'.join(map(str, row['latent'])),
                    f'{seen} of {row["frames"]}' if seen else '',
                    f'{minutes:.1f}' if minutes else '',
                    f'{60 * minutes / seen:.2f}' if seen and minutes else '',
                    f'{row["psnr"]:.1f}',
                    f'{row["worst"]:.1f} to {row["best"]:.1f}',
                    f'{row["edges"]:.2f}',
                    f'{row["decoder_fps"]:.0f}',
                )
            )
            + ' |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main(sys.argv[1:])
