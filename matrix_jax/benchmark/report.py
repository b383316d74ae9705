"""One benchmark: measures everything about a target; a table, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from matrix_jax.benchmark import compiled, measure, roofline
from matrix_jax.nn.attention import route

RANDOM = 'random weights: what is shown is speed, the frames mean nothing'
BUSY = 0.1  # share of the cores at work for others above which figures are marked
ENOUGH = 30  # steps below which figures are marked
LOOK = 0.5  # seconds to look at that
TERA, GIB, MIB = 1e12, 2**30, 2**20
LABELS = {
    'end_to_end': 'DiT + VAE + uint8 + host copy',
    'dit': 'DiT',
    'vae': 'VAE + uint8 + host copy',
}


def run(
    target, settings: measure.Settings, work: dict[str, float], say=print, keep=lambda results: None
) -> dict:
    """Everything but the comparison.

    Args:
      target: `target.Target`.
      settings: how much is measured.
      work: FLOPs of a step by part (`compiled.flops`).
      say: prints a line of progress.
      keep: gets what there is so far, after every measured part.

    Returns:
      What `benchmark.json` holds.
    """
    world, devices = target.world, target.devices
    frames, stream = roofline.frames(world.cfg), world.cfg.stream
    bindings = measure.control_bindings(stream, settings.entries)
    results = {
        'recipe': target.name,
        'random_weights': target.random,
        'machine': machine(),
        'settings': dataclasses.asdict(settings) | {'entries': bindings},
        'devices': devices['end_to_end'],
        'devices_of': devices,
        'exchange': exchange(target),
        'shape': shape(world, target.params),
        'frames_per_step': frames,
        'flops': work,
    }
    say(f'compiling {target.name} on {results["devices"]} device(s), cold and cached')
    seconds, program = compiled.compile_seconds(lambda: measure.whole(target, None, settings.seed))
    names = ('dit', 'vae') if len(program.programs) > 1 else ('end_to_end',)
    found = {
        name: compiled.collectives(one.as_text(), devices[name])
        for name, one in zip(names, program.programs, strict=True)
    }
    # Programs of a pipeline run on devices of their own.
    results |= {
        'compile_seconds': seconds,
        'collectives': found,
        'mesh_bytes': max(map(compiled.sent, found.values())),
        'program_bytes': max(map(compiled.memory, program.programs)),
    }
    results |= {'parts': {}, 'latency': {}}

    def clock(name, build):
        say(f'timing {name}: {settings.warmup} + {settings.steps} steps')
        times = measure.intervals(build(), settings, world.warmup_steps)
        flops = sum(work.values()) if name == 'end_to_end' else work[name]
        results['parts'][name] = speed(times, frames, flops, devices[name], settings)

    def press(binding, build):
        say(f'latency with {binding} control binding')
        results['latency'][binding] = measure.latency(target, build())

    clock('end_to_end', lambda: program)
    results['memory'] = measure.peak_memory()
    best = measure.ceilings(world.cfg.dit.dtype, world.cfg.vae.dtype)
    results['ceilings_tflops'] = {name: value / TERA for name, value in best.items()}
    keep(results)
    # A control binding that is not the recipe's needs a program of its own, and comes last.
    seed = settings.seed
    todo = [(press, stream.control_binding, lambda: program)] * (stream.control_binding in bindings)
    todo += [
        (clock, 'dit', lambda: measure.network(target, seed)),
        (clock, 'vae', lambda: measure.decoder(target)),
    ]
    todo += [
        (press, binding, lambda binding=binding: measure.whole(target, binding, seed))
        for binding in bindings
        if binding != stream.control_binding
    ]
    for measured, name, build in todo:
        measured(name, build)
        keep(results)
    return results


def speed(
    seconds: np.ndarray, frames: int, flops: float, devices: int, settings: measure.Settings
) -> dict:
    """Figures of one part from the seconds of its steps."""
    tflops = flops / seconds.mean() / TERA
    found = {'fps': frames / seconds.mean(), **measure.spread(seconds), 'tflops': tflops}
    if settings.peak_tflops:
        found['peak_share'] = tflops / (settings.peak_tflops * devices)
    return found


def exchange(target) -> str:
    """What devices that share the tokens exchange: 'heads' or 'keys'; '' where none do."""
    net, sizes = target.world.cfg.dit, target.mesh.shape
    if sizes['seq'] == 1:
        return ''
    return route(net.heads, sizes['seq'], net.exchange, sizes['tensor'])


def machine() -> dict:
    """Where this runs, and how busy it was before."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return {
        'backend': device.platform,
        'device': device.device_kind,
        'cores': cores,
        'processor': _processor(),
        'jax': jax.__version__,
        'busy': _busy(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def _busy() -> float:
    """Share of the machine's cores at work while this process waits."""

    def ticks():
        try:
            row = Path('/proc/stat').read_text().split('\n')[0].split()[1:]
        except OSError:
            return np.zeros(2)
        counts = np.asarray(row[:8], float)
        return np.array([counts.sum(), counts[3] + counts[4]])  # all, idle

    before = ticks()
    time.sleep(LOOK)
    total, idle = ticks() - before
    return float(1 - idle / total) if total else 0.0


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()


def shape(world, params) -> dict:
    """Sizes that decide what a step costs."""
    cfg = world.cfg
    stream, size = cfg.stream, roofline.size(cfg)
    queries, keys = roofline.of(cfg).tokens(cfg.dit, stream.frames, *size)
    return {
        'height': cfg.height,
        'width': cfg.width,
        'layers': cfg.dit.layers,
        'dit_parameters': sum(leaf.size for leaf in jax.tree.leaves(params['transformer'])),
        'tokens': queries,
        'keys': keys,
        'call_frames': stream.frames,
        'step_frames': stream.step_frames,
        'calls_per_step': stream.passes,
        'dit_dtype': cfg.dit.dtype,
        'vae_dtype': cfg.vae.dtype,
    }


# --- on paper --------------------------------------------------------------------------------


def table(header, rows) -> list[str]:
    """Lines of a Markdown table."""
    return [f'| {" | ".join(map(str, row))} |' for row in (header, ['---'] * len(header), *rows)]


def markdown(results: dict) -> str:
    """The results as a short page."""
    shape, machine = results['shape'], results['machine']
    seen = f' that see {shape["keys"]}' * (shape['keys'] != shape['tokens'])
    lines = [
        f'# {results["recipe"]}',
        '',
        f'{shape["height"]}x{shape["width"]}, {shape["dit_parameters"] / 1e6:,.1f} M '
        f'parameters in {shape["layers"]} layers ({shape["dit_dtype"]}, VAE '
        f'{shape["vae_dtype"]}), {shape["tokens"]} tokens{seen}, {shape["calls_per_step"]} '
        f'network call(s) and {results["frames_per_step"]} frames per step; '
        f'{results["devices"]} x '
        f'{machine["device"]} ({machine["processor"]}, {machine["cores"]} cores), jax '
        f'{machine["jax"]}; {timed(results["settings"]["steps"])}.',
        '',
    ]
    missing = [LABELS[name] for name in LABELS if name not in results['parts']]
    missing += [
        f'latency with {binding} control binding'
        for binding in results['settings']['entries']
        if binding not in results['latency']
    ]
    if missing:
        lines += [f'Note: it did not come to: {"; ".join(missing)}.', '']
    if results['random_weights']:
        lines += [f'Note: {RANDOM}.', '']
    if machine['device'] == 'cpu':
        lines += [
            'Note: FLOPs are those of plain convolutions; the CPU gets by with fewer '
            '(`nn/winograd.py`), so a share of the ceiling may be above 100 %.',
            '',
        ]
    if machine['busy'] > BUSY:
        lines += [
            f'Note: others kept {machine["busy"]:.0%} of the machine busy before the start; '
            'the clocks below are too slow.',
            '',
        ]
    peak = results['settings']['peak_tflops']
    header = [
        'part',
        'fps',
        'p50 ms',
        'p95 ms',
        'jitter ms',
        'TFLOP per frame',
        'TFLOP/s',
        *([f'of {peak:g} TFLOP/s'] if peak else []),
        'of its ceiling',
    ]
    rows = []
    for name, one in results['parts'].items():
        work = results['flops']
        work = sum(work.values()) if name == 'end_to_end' else work[name]
        share = [f'{one["peak_share"]:.1%}'] if peak else []
        ours = at_best(results, name) / (one['mean_ms'] / 1e3)
        rows.append(
            [
                LABELS[name],
                f'{one["fps"]:.2f}',
                *(f'{one[key]:.1f}' for key in ('p50_ms', 'p95_ms', 'jitter_ms')),
                f'{work / results["frames_per_step"] / TERA:.4g}',
                f'{one["tflops"]:.4g}',
                *share,
                f'{ours:.1%}',
            ]
        )
    lines += table(header, rows)
    lines += (
        [
            '',
            *table(
                ['control binding', 'first changed frame', 'visible frame', 'noise'],
                [
                    [binding, _when(one['changed']), _when(one['visible']), one['noise']]
                    for binding, one in results['latency'].items()
                ],
            ),
        ]
        if results['latency']
        else []
    )
    seconds, memory = results['compile_seconds'], results['memory']
    best = results['ceilings_tflops']
    held = f'{memory["process"] / GIB:.2f} GiB of the process'
    if 'device' in memory:
        held = f'{memory["device"] / GIB:.2f} GiB of the fullest device, {held}'
    lines += [
        '',
        f'- compile of a step: {seconds["cold"]:.1f} s cold, {seconds["cached"]:.1f} s '
        f'with a filled cache on disk',
        f'- memory: at most {held}; the step holds '
        f'{results["program_bytes"] / GIB:.2f} GiB by the compiler',
        f'- ceilings (one device, same run): a matrix product {best["matmul"]:.4g} TFLOP/s '
        f'({shape["dit_dtype"]}), a convolution {best["conv"]:.4g} ({shape["vae_dtype"]})',
    ]
    for name, found in results['collectives'].items():
        kinds = ', '.join(
            f'{one["count"]:g} {kind} ({one["bytes"] / MIB:.2f} MiB)'
            for kind, one in sorted(found.items())
        )
        lines += [
            f'- over the mesh per step ({LABELS[name]}): {compiled.sent(found) / MIB:.2f} '
            f'MiB sent by each device{": " + kinds if kinds else ""}'
        ]
    return '\n'.join(lines) + '\n'


def timed(steps: int) -> str:
    """How many steps were timed, and whether those are too few to go by."""
    return f'{steps} steps timed' + f' (fewer than {ENOUGH} steps)' * (steps < ENOUGH)


def at_best(results: dict, part: str) -> float:
    """Seconds of a step of a part if all of it ran as its ceiling does."""
    ceilings = {'dit': 'matmul', 'vae': 'conv'}
    seconds = {
        name: results['flops'][name]
        / results['devices_of'][name]
        / (results['ceilings_tflops'][ceiling] * TERA)
        for name, ceiling in ceilings.items()
    }
    # Both programs of a pipeline run at the same time.
    both = max if len(results['collectives']) > 1 else sum
    return seconds.get(part) or both(seconds.values())


def _when(found) -> str:
    if found is None:
        return 'none in this run'
    return f'step {found["steps"]}, frame {found["frame"]}, {found["ms"]:.0f} ms'


def write(folder, results: dict, text: str):
    """`benchmark.json` and `benchmark.md`, each whole at any time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ('benchmark.json', json.dumps(results, indent=1) + '\n'),
        ('benchmark.md', text),
    ):
        new = folder / f'.{name}'
        new.write_text(content)
        new.replace(folder / name)
