"""One benchmark: everything that is measured of a target, as the JSON that a page is made from."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from matrix_jax.benchmark import compiled, hlo, measure, pages, roofline
from matrix_jax.nn.attention import route

BUSY_SECONDS = 0.5  # how long the load of the machine is observed


def run(
    target, settings: measure.Settings, work: dict[str, float], say=print, keep=lambda results: None
) -> dict:
    """Measures a target.

    Args:
      target: `target.Target`.
      settings: how much to measure.
      work: FLOPs of a step by part (`compiled.flops`).
      say: prints a line of progress.
      keep: called with the results so far after every measured part.

    Returns:
      The content of `benchmark.json`.
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
        name: hlo.collectives(one.as_text(), devices[name])
        for name, one in zip(names, program.programs, strict=True)
    }
    results |= {
        'compile_seconds': seconds,
        'collectives': found,
        # The programs of a pipeline run on different devices: the larger one counts.
        'mesh_bytes': max(map(hlo.sent_bytes, found.values())),
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
    results['ceilings_tflops'] = {name: value / pages.TERA for name, value in best.items()}
    keep(results)
    # A control binding other than the recipe's needs a program of its own, so it comes last.
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
    """Speed of one part from the seconds of its steps."""
    tflops = flops / seconds.mean() / pages.TERA
    found = {'fps': frames / seconds.mean(), **measure.spread(seconds), 'tflops': tflops}
    if settings.peak_tflops:
        found['peak_share'] = tflops / (settings.peak_tflops * devices)
    return found


def exchange(target) -> str:
    """What devices that share the tokens exchange: 'heads' or 'keys'; '' on one device."""
    net, sizes = target.world.cfg.dit, target.mesh.shape
    if sizes['seq'] == 1:
        return ''
    return route(net.heads, sizes['seq'], net.exchange, sizes['tensor'])


def machine() -> dict:
    """Description of this machine and how busy it is."""
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
    """Share of the cores that other processes use while this one waits."""

    def ticks():
        try:
            row = Path('/proc/stat').read_text().split('\n')[0].split()[1:]
        except OSError:
            return np.zeros(2)
        counts = np.asarray(row[:8], float)
        return np.array([counts.sum(), counts[3] + counts[4]])  # total, idle and waiting

    before = ticks()
    time.sleep(BUSY_SECONDS)
    total, idle = ticks() - before
    return float(1 - idle / total) if total else 0.0


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()


def shape(world, params) -> dict:
    """Sizes that determine the cost of a step."""
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


def write(folder, results: dict, text: str):
    """Writes `benchmark.json` and `benchmark.md`, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ('benchmark.json', json.dumps(results, indent=1) + '\n'),
        ('benchmark.md', text),
    ):
        new = folder / f'.{name}'
        new.write_text(content)
        new.replace(folder / name)
