"""Results of benchmarks as Markdown pages."""

from __future__ import annotations

from matrix_jax.benchmark import hlo
from matrix_jax.evals.markdown import table

TERA, GIB, MIB = 1e12, 2**30, 2**20
RANDOM = 'random weights: the speed is real, the frames mean nothing'
BUSY = 0.1  # share of the cores used by other processes above which a page says so
ENOUGH = 30  # timed steps below which a page says so
LABELS = {
    'end_to_end': 'DiT + VAE + uint8 + host copy',
    'dit': 'DiT',
    'vae': 'VAE + uint8 + host copy',
}
HEADERS = {
    'speed': (
        'part',
        'fps',
        'p50 ms',
        'p95 ms',
        'p99 ms',
        'jitter ms',
        'TFLOP per frame',
        'TFLOP/s',
    ),
    'latency': ('control binding', 'first changed frame', 'visible frame', 'noise'),
    'int8': (
        'arithmetic of the blocks',
        'MiB of the DiT',
        'prediction: rms',
        'largest',
        'cosine',
        'rms to bfloat16',
        'latents of the stream: rms',
        'rms to bfloat16',
    ),
    'sweep': (
        'mesh',
        'devices',
        'DiT exchanges',
        'fps',
        'DiT fps',
        'VAE fps',
        'speed-up',
        'efficiency',
        'MiB sent per device',
        'GiB per device',
    ),
    'count': ('part', 'TFLOP per step', 'TFLOP per frame', 'roofline', 'of the roofline'),
    'exchange': ('mesh.seq', 'devices exchange', 'MiB sent by each per step'),
    'bounds': (
        'mesh',
        'DiT ms',
        'VAE ms',
        'DiT MiB',
        'VAE MiB',
        'sending ms (DiT + VAE)',
        'fps by arithmetic and sending',
    ),
}


def page(title: str, about: str, notes: list[str], *lines: str) -> str:
    """A page: heading, one paragraph, notes, and lines of Markdown."""
    head = [f'# {title}', '', *([about, ''] if about else [])]
    noted = [line for note in notes for line in (f'Note: {note}.', '')]
    return '\n'.join([*head, *noted, *lines]).rstrip('\n') + '\n'


# --- one benchmark ---------------------------------------------------------------------------


def benchmark(results: dict) -> str:
    """Page of the results of `report.run`, complete or not."""
    shape, machine, steps = results['shape'], results['machine'], results['settings']['steps']
    keys = f' that see {shape["keys"]}' * (shape['keys'] != shape['tokens'])
    about = (
        f'{shape["height"]}x{shape["width"]}, {shape["dit_parameters"] / 1e6:,.1f} M '
        f'parameters in {shape["layers"]} layers ({shape["dit_dtype"]}, VAE '
        f'{shape["vae_dtype"]}), {shape["tokens"]} tokens{keys}, {shape["calls_per_step"]} '
        f'network call(s) and {results["frames_per_step"]} frames per step; '
        f'{results["devices"]} x {machine["device"]} ({machine["processor"]}, '
        f'{machine["cores"]} cores), jax {machine["jax"]}; {timed(steps)}.'
    )
    lines = speed_table(results)
    if results['latency']:
        lines += table(
            HEADERS['latency'],
            [
                [binding, _when(one['changed']), _when(one['visible']), one['noise']]
                for binding, one in results['latency'].items()
            ],
        )
    lines += [
        f'- compile time of a step: {results["compile_seconds"]["cold"]:.1f} s cold, '
        f'{results["compile_seconds"]["cached"]:.1f} s with a filled cache on disk',
        _memory_line(results),
        '- ceilings (one device, same run): matrix product '
        f'{results["ceilings_tflops"]["matmul"]:.4g} TFLOP/s ({shape["dit_dtype"]}), '
        f'convolution {results["ceilings_tflops"]["conv"]:.4g} ({shape["vae_dtype"]})',
        *(_mesh_line(name, found) for name, found in results['collectives'].items()),
    ]
    return page(results['recipe'], about, _notes(results), *lines)


def speed_table(results: dict) -> list[str]:
    """Lines of the table of parts: speed, work, and the share of the ceilings reached."""
    peak, rows = results['settings']['peak_tflops'], []
    for name, one in results['parts'].items():
        work = results['flops']
        work = sum(work.values()) if name == 'end_to_end' else work[name]
        rows.append(
            [
                LABELS[name],
                f'{one["fps"]:.2f}',
                *(f'{one[key]:.1f}' for key in ('p50_ms', 'p95_ms', 'p99_ms', 'jitter_ms')),
                f'{work / results["frames_per_step"] / TERA:.4g}',
                f'{one["tflops"]:.4g}',
                *([f'{one["peak_share"]:.1%}'] if peak else []),
                f'{at_best(results, name) / (one["mean_ms"] / 1e3):.1%}',
            ]
        )
    share = [f'of {peak:g} TFLOP/s'] if peak else []
    return table([*HEADERS['speed'], *share, 'of its ceiling'], rows)


def timed(steps: int) -> str:
    """'N steps timed', with a remark if they are few."""
    return f'{steps} steps timed' + f' (fewer than {ENOUGH} steps)' * (steps < ENOUGH)


def at_best(results: dict, part: str) -> float:
    """Seconds of a step of a part that runs at its ceiling throughout."""
    ceilings = {'dit': 'matmul', 'vae': 'conv'}
    seconds = {
        name: results['flops'][name]
        / results['devices_of'][name]
        / (results['ceilings_tflops'][ceiling] * TERA)
        for name, ceiling in ceilings.items()
    }
    # The two programs of a pipeline run at the same time.
    both = max if len(results['collectives']) > 1 else sum
    return seconds.get(part) or both(seconds.values())


def _notes(results: dict) -> list[str]:
    missing = [LABELS[name] for name in LABELS if name not in results['parts']]
    missing += [
        f'latency with {binding} control binding'
        for binding in results['settings']['entries']
        if binding not in results['latency']
    ]
    machine = results['machine']
    notes = [f'not measured: {"; ".join(missing)}'] if missing else []
    if results['random_weights']:
        notes += [RANDOM]
    if machine['device'] == 'cpu':
        notes += [
            'FLOPs are those of plain convolutions; the CPU uses faster algorithms '
            '(`nn/conv_cpu.py`), so a share of the ceiling may exceed 100 %'
        ]
    if machine['busy'] > BUSY:
        notes += [
            f'other processes kept {machine["busy"]:.0%} of the machine busy at the start; the '
            'times below are too long'
        ]
    return notes


def _memory_line(results: dict) -> str:
    memory = results['memory']
    held = f'{memory["process"] / GIB:.2f} GiB of the process'
    if 'device' in memory:
        held = f'{memory["device"] / GIB:.2f} GiB of the fullest device, {held}'
    program = results['program_bytes'] / GIB
    return f'- peak memory: {held}; the compiler counts {program:.2f} GiB for a step'


def _mesh_line(name: str, found: dict) -> str:
    kinds = ', '.join(
        f'{one["count"]:g} {kind} ({one["bytes"] / MIB:.2f} MiB)'
        for kind, one in sorted(found.items())
    )
    sent = hlo.sent_bytes(found) / MIB
    return (
        f'- over the mesh per step ({LABELS[name]}): {sent:.2f} MiB sent by each device'
        f'{": " + kinds if kinds else ""}'
    )


def _when(found) -> str:
    if found is None:
        return 'none in this run'
    return f'step {found["steps"]}, frame {found["frame"]}, {found["ms"]:.0f} ms'


# --- the other modes -------------------------------------------------------------------------


def torch_comparison(results: dict) -> str:
    """The section of `--vs torch`, which follows the page of `benchmark`."""
    ours, torch = results['parts'], results['torch']
    rows = [
        [label, f'{mine:.{digits}f}', f'{theirs:.{digits}f}', f'{mine / theirs:.2f}']
        for label, mine, theirs, digits in (
            *(
                (label, ours[name]['fps'], torch[name]['fps'], 2)
                for name, label in (
                    ('end_to_end', 'end to end, fps; ours with control blocks'),
                    ('vae', 'VAE + uint8 + host copy, fps'),
                )
            ),
            (
                'the same DiT, calls/s; both without control',
                1e3 / torch['plain_dit']['p50_ms'],
                1e3 / torch['dit_call']['p50_ms'],
                3,
            ),
        )
    ]
    difference = ', '.join(f'{name} {value:.1e}' for name, value in torch['difference'].items())
    lines = [
        '',
        f'## Against torch {torch["torch"]}, diffusers {torch["diffusers"]} '
        f'({torch["device"]}, {torch["threads"]} threads, scaled dot product attention)',
        '',
        *table(['', 'ours', 'torch', 'ratio'], rows),
        f'- largest difference of the outputs, relative: {difference}',
        *(f'- PyTorch lacks {what}' for what in torch['lacks']),
    ]
    return '\n'.join(lines) + '\n'


def int8(name: str, random: bool, results: dict) -> str:
    """Page of the errors of 8-bit layers (`int8.run`)."""
    rows = []
    for arithmetic, one in results.items():
        prediction, half = one['prediction'], one['to_bfloat16']
        rows.append(
            [
                arithmetic,
                f'{one["bytes"] / MIB:,.1f}',
                *(f'{prediction[key]:.2e}' for key in ('rms', 'largest')),
                f'{prediction["cosine"]:.6f}',
                f'{half["prediction"]["rms"]:.2e}',
                f'{one["latents"]["rms"]:.2e}',
                f'{half["latents"]["rms"]:.2e}',
            ]
        )
    return page(
        f'{name}: 8-bit layers against float32 and bfloat16',
        'Errors are relative to float32, or to bfloat16 where the column says so: root mean square '
        'over root mean square, and largest over largest.',
        [RANDOM] if random else [],
        *table(HEADERS['int8'], rows),
    )


def sweep(name: str, steps: int, random: bool, on_cpu: bool, runs: dict, refused: dict) -> str:
    """Page of one benchmark per mesh (`run.sweep`).

    Args:
      runs: mesh -> results of `report.run`.
      refused: mesh -> why it could not run.
    """
    first = next(iter(runs.values()))
    base = first['parts']['end_to_end']['fps'] / first['devices']
    rows = []
    for mesh, found in runs.items():
        fps = {part: one['fps'] for part, one in found['parts'].items()}
        rows.append(
            [
                mesh,
                found['devices'],
                found['exchange'] or 'nothing',
                *(f'{fps[part]:.2f}' for part in LABELS),
                f'{fps["end_to_end"] / base / first["devices"]:.2f}',
                f'{fps["end_to_end"] / base / found["devices"]:.1%}',
                f'{found["mesh_bytes"] / MIB:.2f}',
                f'{found["program_bytes"] / GIB:.2f}',
            ]
        )
    machine, notes = first['machine'], []
    if on_cpu:
        notes += [
            f'the devices are emulated and share {machine["cores"]} cores: bytes and memory '
            'scale, times do not'
        ]
    notes += [RANDOM] if random else []
    if any(found['machine']['busy'] > BUSY for found in runs.values()):
        notes += ['the machine was busy before a start; the times are too long']
    return page(
        f'{name}: scaling over meshes',
        f'{machine["device"]}, {machine["processor"]}, {machine["cores"]} cores; {timed(steps)}.',
        notes,
        *table(HEADERS['sweep'], rows),
        *(f'- {mesh}: not run ({why})' for mesh, why in refused.items()),
    )


def count(name: str, found: dict) -> str:
    """Page of FLOPs, bytes and the resulting bounds, without any timing (`run.count`)."""
    work, read = found['flops'], found['weights']
    least, frames = found['roofline'], found['frames']
    rows = []
    for part in ('dit', 'vae', 'both'):
        flop, lowest = (one.get(part, sum(one.values())) / frames / TERA for one in (work, least))
        rows.append(
            [part, f'{flop * frames:.4g}', f'{flop:.4g}', f'{lowest:.4g}', f'{flop / lowest:.3f}']
        )
    lines = table(HEADERS['count'], rows)
    lines += [
        '- weights read: '
        + ', '.join(f'{name} {size / MIB:,.4g} MiB' for name, size in read.items()),
        '',
        *table(
            HEADERS['exchange'],
            [[parts, what, f'{sent / MIB:,.4g}'] for parts, what, sent in found['exchange']],
        ),
        f'At {found["tflops"]:g} TFLOP/s and {found["link"] / 1e9:g} GB/s sent, with nothing '
        'overlapping but the parts of a pipeline; of the busiest device, per step:',
        '',
        *table(HEADERS['bounds'], [_bound(*one) for one in found['bounds'].items()]),
    ]
    return page(f"{name}: FLOPs by XLA's count, {frames} frames per step", '', [], *lines)


def _bound(mesh: str, found: dict) -> list:
    dit, vae = found['dit'], found['vae']
    return [
        mesh,
        *(f'{1e3 * one["seconds"]:.1f}' for one in (dit, vae)),
        *(f'{one["bytes"] / MIB:,.0f}' for one in (dit, vae)),
        f'{1e3 * dit["sending"]:.2f} + {1e3 * vae["sending"]:.2f}',
        f'{found["fps"]:.0f}',
    ]
