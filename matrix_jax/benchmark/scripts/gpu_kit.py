"""Everything that a quarter of an hour with one GPU should answer, in phases.

    python -m matrix_jax.benchmark.scripts.gpu_kit OUT
    python -m matrix_jax.benchmark.scripts.gpu_kit OUT --train 'carracing:SWIN --data D --out RUN'
    python -m matrix_jax.benchmark.scripts.gpu_kit OUT --tiny      a dry run on the CPU

Each phase is a process with a budget of seconds and a folder OUT/PHASE with its log and results.
One that fails or runs over is stopped; the next begins all the same. OUT/summary.md and
OUT/summary.json are written after every phase. All phases share OUT/programs (compiled programs)
and OUT/autotune (the kernels that XLA chose), so that a second call begins where time is spent on
measuring alone. No phase needs a network.

The minutes that are left train, one after the other, the runs given with `--train`: arguments of
`matrix-jax train`. Their latents should be there before: `--train.steps 0` with the same --out
makes them. A run is stopped by SIGTERM, saves its state, and continues with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
GOLDENS = ROOT / 'tests' / 'goldens'
BENCHMARK = 'benchmark', '--random'
SAVED = 75  # exit code of a training run that was stopped with its state saved
CPU_TIMES = 6  # how many times longer a phase of test size may take on a CPU
GRACE = 15  # seconds between SIGTERM and SIGKILL


@dataclasses.dataclass(frozen=True)
class Phase:
    """One process of the kit.

    Attributes:
      name: name of its folder.
      budget: seconds that it may take.
      argv: arguments of `matrix-jax`; the folder of the phase follows with `--out` if it is a
        benchmark.
      flags: flags of XLA besides the usual ones.
      precise: whether products are in full float32.
    """

    name: str
    budget: int
    argv: tuple[str, ...]
    flags: str = ''
    precise: bool = False


def phases(tiny: bool = False) -> list[Phase]:
    """The phases in order of importance.

    Args:
      tiny: test sizes and few steps, for a dry run.
    """

    def bench(name: str, budget: int, recipe: str, *options: str, flags: str = '') -> Phase:
        world = recipe.partition(':')[0]
        recipe = f'{world}:TINY' if tiny else recipe
        steps = '2' if tiny else '40'
        argv = (*BENCHMARK, recipe, '--steps', steps, '--peak-tflops', '989', *options)
        return Phase(name, budget, argv, flags)

    def parity(system: str, budget: int) -> Phase:
        folder = GOLDENS / system
        cases = sorted(map(str, (*folder.glob('*.safetensors'), *folder.glob('*.json'))))
        argv = ('parity', *cases[: 2 if tiny else None])
        return Phase(f'parity_{system}', budget, argv, precise=True)

    shift, brief = 'the_matrix:STAGE4', ('--entries', 'none')
    found = [
        bench('stage4', 90, shift, '--entries', 'late'),
        parity('the_matrix', 50),
        bench('universal', 80, 'matrix_game_2:UNIVERSAL', *brief),
        bench('distilled', 80, 'matrix_game_3:DISTILLED', *brief),
        bench('bfloat16', 40, shift, *(() if tiny else ('--layers', '4')), '--int8'),
        bench('early', 50, shift, '--entries', 'early', '--world.stream.control_binding', 'early'),
        parity('matrix_game_2', 40),
        # Levers of the compiler, each against the phase `stage4`.
        bench('channels_first', 35, shift, *brief, flags='--xla_gpu_force_conv_nhwc=false'),
        bench('no_triton', 35, shift, *brief, flags='--xla_gpu_enable_triton_gemm=false'),
        bench('no_graphs', 35, shift, *brief, flags='--xla_gpu_enable_command_buffer='),
        bench('int8', 35, shift, *brief, '--world.dit.int8', 'blocks'),
        parity('matrix_game_3', 30),
    ]
    times = CPU_TIMES if tiny else 1
    return [dataclasses.replace(one, budget=times * one.budget) for one in found]


def environment(phase: Phase, out: Path, cpu: bool) -> dict[str, str]:
    """Variables of a phase's process."""
    flags = [os.environ.get('XLA_FLAGS', ''), phase.flags]
    if cpu:
        flags = [flag for flag in flags if 'xla_gpu' not in flag]
    else:
        flags.append(f'--xla_gpu_per_fusion_autotune_cache_dir={out / "autotune"}')
    found = os.environ | {
        'XLA_FLAGS': ' '.join(filter(None, flags)),
        'JAX_COMPILATION_CACHE_DIR': str(out / 'programs'),
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'HF_HUB_OFFLINE': '1',
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
    }
    if phase.precise:
        found['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
    return found | {'JAX_PLATFORMS': 'cpu'} if cpu else found


def run(phase: Phase, out: Path, seconds: float, cpu: bool = False) -> dict:
    """Runs a phase for at most so many seconds.

    Returns:
      'phase', 'seconds', 'exit' (an exit code, or 'over time'), and 'found' (see `figures`).
    """
    folder, began = out / phase.name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, '-m', 'matrix_jax', *phase.argv]
    if phase.argv[0] == 'benchmark':
        argv += ['--out', str(folder)]
    with (folder / 'log.txt').open('w') as log:
        process = subprocess.Popen(
            argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(phase, out, cpu),
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = stop(process)
    taken = time.monotonic() - began
    return {'phase': phase.name, 'seconds': taken, 'exit': code, 'found': figures(folder)}


def stop(process: subprocess.Popen) -> int | str:
    """Stops a phase and what it started; returns its exit code if it saved its state."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        code = process.wait(GRACE)
    except subprocess.TimeoutExpired:
        code = None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    process.wait()
    return code if code == SAVED else 'over time'


def figures(folder: Path) -> dict:
    """What a phase has measured so far: figures of benchmark.json, or the last line of its log."""
    try:
        made = json.loads((folder / 'benchmark.json').read_text())
        whole = made['parts']['end_to_end']
        keys = {
            f'key {binding}, ms': one['visible'] and one['visible']['ms']
            for binding, one in made['latency'].items()
        }
        names = ('fps', 'p50_ms', 'p95_ms', 'p99_ms', 'tflops')
        return {name: whole[name] for name in names} | keys
    except (OSError, ValueError, KeyError):
        lines = (folder / 'log.txt').read_text(errors='replace').replace('\r', '\n').split('\n')
        return {'last line': next((line.strip() for line in reversed(lines) if line.strip()), '')}


def summary(done: list[dict]) -> str:
    """Page of all phases."""
    lines = ['| phase | seconds | exit code | found |', '|---|---|---|---|']
    for one in done:
        found = ', '.join(
            f'{name} {value:.1f}' if isinstance(value, float) else f'{name}: {value}'
            for name, value in one['found'].items()
        )
        lines.append(
            f'| {one["phase"]} | {one["seconds"]:.0f} | {one["exit"]} | {found.replace("|", "/")} |'
        )
    return '\n'.join(lines) + '\n'


def kit(out: Path, minutes: float, training: list[str], tiny: bool, only: list[str]) -> list[dict]:
    """Runs the phases and writes the summary after each -> what each of them gave."""
    end, done = time.monotonic() + 60 * minutes, []
    todo = [one for one in phases(tiny) if not only or one.name in only]
    for at, line in enumerate(training):
        todo.append(Phase(f'train_{at}', int(60 * minutes), ('train', *shlex.split(line))))
    out.mkdir(parents=True, exist_ok=True)
    for at, phase in enumerate(todo):
        left, budget = end - time.monotonic() - GRACE, phase.budget
        if phase.argv[0] == 'train':
            budget = left / (len(todo) - at)  # the runs share what is left
        if left < min(20, budget):
            done.append({'phase': phase.name, 'seconds': 0, 'exit': 'no time left', 'found': {}})
        else:
            done.append(run(phase, out, min(budget, left), cpu=tiny))
        (out / 'summary.json').write_text(json.dumps(done, indent=1) + '\n')
        (out / 'summary.md').write_text(summary(done))
        print(summary(done[-1:]).splitlines()[-1], flush=True)
    return done


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 all phases done, 1 some not, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path)
    parser.add_argument('--minutes', type=float, default=12)
    parser.add_argument('--train', action='append', default=[], metavar='ARGUMENTS')
    parser.add_argument('--tiny', action='store_true', help='test sizes on the CPU')
    parser.add_argument('--only', default='', help='names of phases, separated by commas')
    args = parser.parse_args(argv)
    only, names = list(filter(None, args.only.split(','))), [one.name for one in phases(args.tiny)]
    if unknown := set(only) - set(names):
        parser.error(f'--only: got {", ".join(sorted(unknown))}, expected {", ".join(names)}')
    if args.minutes <= 0:
        parser.error(f'--minutes: got {args.minutes:g}, expected more than 0')
    done = kit(args.out.absolute(), args.minutes, args.train, args.tiny, only)
    return int(any(one['exit'] not in (0, SAVED) for one in done))


if __name__ == '__main__':
    sys.exit(main())
