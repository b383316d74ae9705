"""The modes of `matrix-jax benchmark`: one run, a comparison, a sweep of meshes, or a count."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os

from matrix_jax.benchmark import (
    compiled,
    int8,
    measure,
    pages,
    report,
    roofline,
    torch_baseline,
    torch_training,
)
from matrix_jax.benchmark import target as targets
from matrix_jax.benchmark.measure import Settings
from matrix_jax.config import Mesh, UsageError
from matrix_jax.train import dry_run

TFLOPS = 0.8 * 989  # of a device, assumed by a count: 80 % of the H200's data sheet
LINK = 450e9  # bytes per second that a device sends over NVLink (H100, H200)
PARTS = range(2, 9)  # numbers of devices for which a count shows the exchange
SWEEP = {
    **{f'seq={size}': Mesh(seq=size) for size in (1, 2, 4, 8)},
    **{name: Mesh(pipeline=name) for name in ('5dit_3vae', '6dit_2vae')},
}


def benchmark(
    run, settings: Settings, random: bool = False, layers: int | None = None, mode: str = ''
) -> str:
    """Measures, writes to `run.out` and returns the page to print.

    Args:
      run: the run.
      settings: how much to measure.
      random: whether to draw the weights at random.
      layers: layers of a random network; None = as in the recipe.
      mode: '', 'vs' (compare with PyTorch), 'train' (compare an update of the stage, with random
        weights), 'sweep', 'int8' (errors, no timing) or 'count' (FLOPs only, writes nothing).

    Raises:
      UsageError: the run cannot be measured; raised before anything is computed.
    """
    cfg = targets.shape(run, random or mode == 'train', layers)
    out = run.out or f'outputs/benchmark-{run.name.replace(":", "-").lower()}'
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UsageError(f'--out: {out} is a file, expected a folder')
    if mode == 'count':
        return count(run.name, cfg, settings.peak_tflops or TFLOPS)
    if mode == 'train':
        torch_training.check(run)
        results = torch_training.run(run, settings)
        text = torch_training.page(results)
        report.write(out, results, text)
        return f'{text}\n{out}/benchmark.json, {out}/benchmark.md'
    measure.control_bindings(cfg.stream, settings.entries)
    if mode == 'vs':
        torch_baseline.check(run.name, cfg)

    def keep(results, text=None):
        report.write(out, results, text or pages.benchmark(results))

    if mode == 'sweep':
        results, text = sweep(run, settings, random, layers, keep)
    elif mode == 'int8':
        results, text = int8.run(run, random, layers, settings.seed)
    else:
        results = one(run, settings, random, layers, mode == 'vs', keep)
        text = pages.benchmark(results)
        text += pages.torch_comparison(results) if mode == 'vs' else ''
    keep(results, text)
    return f'{text}\n{out}/benchmark.json, {out}/benchmark.md'


def one(
    run,
    settings: Settings,
    random: bool,
    layers: int | None,
    compare: bool = False,
    keep=lambda results: None,
) -> dict:
    """Benchmarks in this process and returns the content of `benchmark.json`; see `report.run`."""
    import jax

    target = targets.open_target(run, random, layers, settings.seed)
    # XLA cannot count the FLOPs of a GPU attention kernel.
    work = (
        compiled.flops(target.world)
        if jax.default_backend() == 'cpu'
        else apart(compiled.flops_of, target.world.cfg)
    )
    results = report.run(target, settings, work, keep=keep)
    if compare:
        results['torch'] = torch_baseline.run(target, settings)
    return results


def apart(function, *arguments, devices: int = 1, emulate: bool = True):
    """Calls `function(*arguments)` in a new process.

    Args:
      function, arguments: must be picklable.
      devices: number of devices that the CPU emulates.
      emulate: whether to run on the CPU; otherwise on the default backend.
    """
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_begin, devices, emulate, function, arguments).result()


def _begin(devices, emulate, function, arguments):
    import jax

    if emulate:
        flags = [
            flag for flag in os.environ.get('XLA_FLAGS', '').split() if dry_run.FLAG not in flag
        ]
        os.environ['XLA_FLAGS'] = ' '.join([*flags, f'{dry_run.FLAG}={devices}'])
        jax.config.update('jax_platforms', 'cpu')
    return function(*arguments)


# --- one per mesh ----------------------------------------------------------------------------


def sweep(
    run, settings: Settings, random: bool, layers: int | None, keep=lambda results, text: None
) -> tuple[dict, str]:
    """Benchmarks every mesh of `SWEEP`, each in a new process; the other mesh axes are the run's.

    Args:
      keep: called with the results and the page after every mesh.

    Returns:
      (results, page).

    Raises:
      UsageError: no mesh could be measured.
    """
    on_cpu = apart(_backend, emulate=False) == 'cpu'
    settings = dataclasses.replace(settings, entries=())
    runs, refused = {}, {}
    for name, mesh in SWEEP.items():
        try:
            if not mesh.parts:
                mesh = dataclasses.replace(run.mesh, seq=mesh.seq, pipeline='1')
            runs[name] = apart(
                one,
                dataclasses.replace(run, mesh=mesh),
                settings,
                random,
                layers,
                devices=mesh.devices,
                emulate=on_cpu,
            )
        # Too many devices, too little memory, or a process that the system killed.
        except (ValueError, RuntimeError, MemoryError) as error:
            refused[name] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if runs:
            results = {'sweep': runs, 'refused': refused}
            text = pages.sweep(run.name, settings.steps, random, on_cpu, runs, refused)
            keep(results, text)
    if not runs:
        raise UsageError('; '.join(f'{name}: {why}' for name, why in refused.items()))
    return results, text


def _backend() -> str:
    import jax

    return jax.default_backend()


# --- a count ---------------------------------------------------------------------------------


def count(name: str, cfg, tflops: float) -> str:
    """Page of what a step must compute and send; nothing is timed.

    Args:
      name: name of the recipe.
      cfg: the world's config.
      tflops: assumed TFLOP/s of a device.
    """
    flops, weights = apart(compiled.costs, cfg)
    sizes = cfg.stream.frames, *roofline.size(cfg)
    exchange = [(parts, *roofline.of(cfg).exchanged(cfg.dit, *sizes, parts)) for parts in PARTS]
    return pages.count(
        name,
        {
            'flops': flops,
            'weights': weights,
            'roofline': roofline.flops(cfg),
            'frames': roofline.frames(cfg),
            'exchange': [(parts, what, cfg.stream.passes * sent) for parts, what, sent in exchange],
            'tflops': tflops,
            'link': LINK,
            'bounds': {
                label: roofline.bounds(cfg, mesh, tflops * pages.TERA, LINK)
                for label, mesh in SWEEP.items()
            },
        },
    )
