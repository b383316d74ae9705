"""What `matrix-jax benchmark` does: one benchmark, one with a peer, one per mesh, or a count."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os

from matrix_jax import worlds
from matrix_jax.benchmark import compiled, int8, measure, report, roofline, torch_baseline
from matrix_jax.benchmark import target as targets
from matrix_jax.benchmark.measure import Settings
from matrix_jax.config import Mesh, UsageError
from matrix_jax.train import dry_run

CEILING = 0.8 * 989  # TFLOP/s of a device that a count assumes: a share of the H200's data sheet
LINK = 450e9  # bytes per second that a device sends: NVLink of an H100 or H200
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
      settings: how much is measured.
      random: whether weights are drawn.
      layers: of a random network.
      mode: '', 'vs' (with the peer), 'sweep', 'int8' (errors, no clocks) or 'count' (FLOPs only,
        nothing is written).

    Raises:
      UsageError: what cannot be measured; nothing is computed.
    """
    cfg = targets.shape(run, random, layers)
    out = run.out or f'outputs/benchmark-{run.name.replace(":", "-").lower()}'
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UsageError(f'--out: {out} is a file, expected a folder')
    if mode == 'count':
        return _count_page(run.name, cfg, settings.peak_tflops or CEILING)
    measure.control_bindings(cfg.stream, settings.entries)
    if mode == 'vs':
        torch_baseline.check(run.name, cfg)

    def keep(results, text=None):
        report.write(out, results, text or report.markdown(results))

    if mode == 'sweep':
        results, text = sweep(run, settings, random, layers, keep)
    elif mode == 'int8':
        results, text = int8.run(run, random, layers, settings.seed)
    else:
        results = one(run, settings, random, layers, mode == 'vs', keep)
        text = report.markdown(results)
        text += torch_baseline.markdown(results) if mode == 'vs' else ''
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
    """One benchmark in this process -> what `benchmark.json` holds, which `keep` gets part by part."""
    import jax

    target = targets.open_target(run, random, layers, settings.seed)
    # Where attention is a kernel of its own, XLA cannot see what it costs.
    work = (
        compiled.flops(target.world)
        if jax.default_backend() == 'cpu'
        else apart(compiled.flops_of, target.world.cfg)
    )
    results = report.run(target, settings, work, keep=keep)
    if compare:
        results['torch'] = torch_baseline.run(target, settings)
    return results


def apart(function, *arguments, devices: int = 1, imitate: bool = True):
    """`function(*arguments)` in a process of its own.

    Args:
      function, arguments: what can be pickled.
      devices: that the CPU is to look like.
      imitate: whether it runs on the CPU; else where jax finds itself.
    """
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_begin, devices, imitate, function, arguments).result()


def _begin(devices, imitate, function, arguments):
    import jax

    if imitate:
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
    """(results, page) of the same benchmark on the meshes of `SWEEP`, whose devices share the
    tokens of the network; other axes are the run's. `keep` gets both after every mesh."""
    on_cpu = apart(_backend, imitate=False) == 'cpu'
    settings = dataclasses.replace(settings, entries=())
    runs, refused = {}, {}
    for name, mesh in meshes(targets.shape(run, random, layers)).items():
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
                imitate=on_cpu,
            )
        # More devices than there are, too little memory, or a process that the system ended.
        except (ValueError, RuntimeError, MemoryError) as error:
            refused[name] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if runs:
            results = {'sweep': runs, 'refused': refused}
            text = _sweep_page(run.name, settings.steps, random, on_cpu, **results)
            keep(results, text)
    if not runs:
        raise UsageError('; '.join(f'{name}: {why}' for name, why in refused.items()))
    return results, text


def _sweep_page(name: str, steps: int, random: bool, on_cpu: bool, sweep, refused) -> str:
    first = next(iter(sweep.values()))
    base = first['parts']['end_to_end']['fps'] / first['devices']
    rows = []
    for mesh, found in sweep.items():
        parts, fps = found['parts'], found['parts']['end_to_end']['fps']
        rows.append(
            [
                mesh,
                found['devices'],
                found['exchange'] or 'nothing',
                f'{fps:.2f}',
                f'{parts["dit"]["fps"]:.2f}',
                f'{parts["vae"]["fps"]:.2f}',
                f'{fps / base / first["devices"]:.2f}',
                f'{fps / base / found["devices"]:.1%}',
                f'{found["mesh_bytes"] / report.MIB:.2f}',
                f'{found["program_bytes"] / report.GIB:.2f}',
            ]
        )
    machine = first['machine']
    lines = [
        f'# {name}: scaling over meshes',
        '',
        f'{machine["device"]}, {machine["processor"]}, {machine["cores"]} cores; '
        f'{report.timed(steps)}.',
        '',
    ]
    if on_cpu:
        lines += [
            f'Note: the devices are imitated and share {machine["cores"]} cores: bytes and '
            'memory scale, clocks do not.',
            '',
        ]
    if random:
        lines += [f'Note: {report.RANDOM}.', '']
    if any(found['machine']['busy'] > report.BUSY for found in sweep.values()):
        lines += ['Note: the machine was busy before a start; the clocks are too slow.', '']
    lines += report.table(
        [
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
        ],
        rows,
    )
    lines += ['', *(f'- {mesh}: not run ({why})' for mesh, why in refused.items())]
    return '\n'.join(lines) + '\n'


def _backend() -> str:
    import jax

    return jax.default_backend()


# --- a count ---------------------------------------------------------------------------------


def _count_page(name: str, cfg, ceiling: float) -> str:
    (work, read), (anew, before) = apart(compiled.costs, cfg)
    least, spare = roofline.flops(cfg), before['transformer'] - read['transformer']
    frames = roofline.frames(cfg)
    rows = []
    for part in ('dit', 'vae', 'both'):
        count, lowest = (
            one.get(part, sum(one.values())) / frames / report.TERA for one in (work, least)
        )
        rows.append(
            [
                part,
                f'{count * frames:.4g}',
                f'{count:.4g}',
                f'{lowest:.4g}',
                f'{count / lowest:.3f}',
            ]
        )
    spared = anew['dit'] - work['dit']
    once = (
        []
        if 'once' not in read
        else [
            f'- made once, not in every step: {spared / report.TERA:.3g} TFLOP '
            f'({spared / anew["dit"]:.2%} of the DiT), and {spare / report.MIB:,.4g} MiB of weights '
            f'not read, for {read["once"] / report.MIB:,.4g} MiB kept'
        ]
    )
    return '\n'.join(
        [
            f"# {name}: FLOPs by XLA's count, {frames} frames per step",
            '',
            *report.table(
                ['part', 'TFLOP per step', 'TFLOP per frame', 'floor', 'of the floor'], rows
            ),
            '',
            *once,
            f'- weights read: DiT {read["transformer"] / report.MIB:,.4g} MiB, VAE '
            f'{read["vae"] / report.MIB:,.4g} MiB',
            '',
            *report.table(
                ['mesh.seq', 'devices exchange', 'MiB that each sends per step'],
                [exchange(cfg, parts) for parts in range(2, 9)],
            ),
            '',
            f'At {ceiling:g} TFLOP/s, sending {LINK / 1e9:g} GB/s, nothing at the same time but the '
            'parts of a pipeline; of the busiest device, per step:',
            '',
            *report.table(
                [
                    'mesh',
                    'DiT ms',
                    'VAE ms',
                    'DiT MiB',
                    'VAE MiB',
                    'sending ms (DiT + VAE)',
                    'fps at most',
                ],
                [_bound(name, cfg, mesh, ceiling) for name, mesh in meshes(cfg).items()],
            ),
        ]
    )


def meshes(cfg) -> dict[str, Mesh]:
    """Those of `SWEEP` that a world's config can be run on."""
    alone = worlds.build(cfg).one_mesh
    return {name: mesh for name, mesh in SWEEP.items() if not (alone and mesh.parts)}


def _bound(name: str, cfg, mesh: Mesh, ceiling: float) -> list:
    """A row of what a mesh can give at best."""
    found = roofline.bounds(cfg, mesh, ceiling * report.TERA, LINK)
    dit, vae = found['dit'], found['vae']
    return [
        name,
        f'{1e3 * dit["seconds"]:.1f}',
        f'{1e3 * vae["seconds"]:.1f}',
        f'{dit["bytes"] / report.MIB:,.0f}',
        f'{vae["bytes"] / report.MIB:,.0f}',
        f'{1e3 * dit["sending"]:.2f} + {1e3 * vae["sending"]:.2f}',
        f'{found["fps"]:.0f}',
    ]


def exchange(cfg, parts: int) -> list:
    """A row of what the attention of the network sends over the mesh."""
    what, sent = roofline.of(cfg).exchanged(cfg.dit, cfg.stream.frames, *roofline.size(cfg), parts)
    return [parts, what, f'{cfg.stream.passes * sent / report.MIB:,.4g}']
