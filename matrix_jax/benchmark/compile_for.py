"""The programs of a recipe compiled for GPUs that are not there, and what they consist of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from matrix_jax.benchmark import compiled, hlo, measure, pages, roofline
from matrix_jax.benchmark import target as targets
from matrix_jax.benchmark.run import LINK, TFLOPS
from matrix_jax.evals.markdown import table
from matrix_jax.parallel import compilation, compile_only, sharding
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.train import dry_run


def streaming(
    run, name: str, random: bool = False, layers: int | None = None, tflops: float | None = None
) -> str:
    """Page of a step of a stream, compiled for GPUs.

    Args:
      run: the run. On several GPUs, a mesh of one device becomes mesh.seq of them all.
      name: the GPUs (`compile_only.NAMES`).
      random, layers: see `target.shape`.
      tflops: TFLOP/s of a device; None = `run.TFLOPS`.

    Raises:
      UsageError, ValueError: the recipe does not stream, or the GPUs do not suit it.
    """
    run, gpus = prepare(run, name, 'seq')
    world = targets.build(targets.shape(run, random, layers))
    rates = _rates(tflops) | {'frames': roofline.frames(world.cfg)}
    found = {
        part: count(program, run.mesh.devices)
        for part, program in stream_programs(run, world, gpus).items()
    }
    return page(f'{run.name}, a step on {_title(run, gpus)}', found, 'step', rates)


def training(run, name: str, tflops: float | None = None) -> str:
    """Page of an update of a run, compiled for GPUs.

    Args:
      run: the run. On several GPUs, a mesh of one device becomes mesh.fsdp of them all.
      name, tflops: see `streaming`.

    Raises:
      UsageError, ValueError: the stage, the batch and the GPUs do not suit each other.
    """
    run, gpus = prepare(run, name, 'fsdp')
    with compile_only.tracing():
        update = dry_run.lower(run, gpus)
        program = update.lowered.compile()
    found = count(program, run.mesh.devices)
    found['memory'] |= dry_run.sizes(update.state, update.made.places)
    title = f'{dry_run.title(run, update)}; {_title(run, gpus)}'
    return page(title, {'update': found}, 'update', _rates(tflops))


def prepare(run, name: str, axis: str):
    """(the run with a mesh for these GPUs, the GPUs)."""
    number = compile_only.parse(name)
    run = dataclasses.replace(run, mesh=compile_only.fit_mesh(run.mesh, number, axis))
    jax.config.update('jax_platforms', 'cpu')  # what is computed while tracing
    return run, compile_only.devices(number)


def _rates(tflops: float | None) -> dict:
    return {'tflops': tflops or TFLOPS, 'memory': compile_only.BANDWIDTH, 'link': LINK}


def _title(run, gpus) -> str:
    axes = ' '.join(f'{axis}={size}' for axis, size in run.mesh.axes.items() if size > 1)
    layout = run.mesh.pipeline if run.mesh.parts else axes
    return f'{len(gpus)} x {gpus[0].device_kind}' + f' ({layout})' * (len(gpus) > 1)


def count(program, devices: int) -> dict:
    """`hlo.summary` of a compiled program, and its 'memory' per device in bytes."""
    memory = program.memory_analysis()
    return hlo.summary(program.as_text(), devices) | {
        'memory': {
            'in all': dry_run.program_bytes(memory),
            'arguments': memory.argument_size_in_bytes,
            'work space': memory.temp_size_in_bytes,
        }
    }


def stream_programs(run, world, gpus, settled: bool = True) -> dict[str, Any]:
    """Compiles a step of a stream -> {'end_to_end'} or, in a pipeline, {'dit', 'vae'}.

    Args:
      run: the run; its mesh has as many devices as there are GPUs.
      world: the world, for random weights.
      gpus: compile-only devices.
      settled: whether to compile the step that all steps but the first are, whose carry lies where
        it stays; otherwise the first step, in half the time.
    """
    mesh, decoder = sharding.make_meshes(run.mesh, gpus)
    with compile_only.tracing():
        with sharding.use_mesh(mesh):
            params, carry, control = compiled.step_arguments(world)
        params, control = _on_meshes(world, params, mesh, decoder), _replicated(control, mesh)
        if decoder != mesh:
            return dict(zip(('dit', 'vae'), _pipeline(world, params, control, mesh), strict=True))
        step, given = targets.stream(world).step, (params, _replicated(carry, mesh), control)
        with sharding.use_mesh(mesh):
            program = _compile(step, given)
            if mesh.size > 1 and settled:
                carry = sharding.output_shapes(program)[0]
                program = _compile(step, (params, carry, control), carry)
    return {'end_to_end': program}


def _compile(step, given: tuple, carry=None):
    """Compiles a step, whose carry is returned in the shardings of `carry`."""
    places = {}
    if carry is not None:
        places['out_shardings'] = (jax.tree.map(lambda leaf: leaf.sharding, carry), None)
    return compilation.jit(step, donate_argnums=1, **places).lower(*given).compile()


def _pipeline(world, params: dict, control, mesh) -> tuple[Any, Any]:
    name = world.decoder_folder
    network, decoder = params | {name: {}}, {name: params[name]}
    cond = _replicated(targets.condition_shapes(world), mesh)
    key = _replicated(jax.eval_shape(lambda: measure.player(0)), mesh)
    pipeline = Pipeline(
        **world.stages(), params=(network, decoder), first_control=targets.first_control(world)
    )
    pipeline.compile(network, pipeline.compile_init(network, cond, key), control)
    return pipeline.programs


def _on_meshes(world, params: dict, mesh, decoder) -> dict:
    """Parameters of a step as streams read them, in their shardings; 8-bit layers replicated."""
    wanted = targets.step_params(world)
    places = world.param_places(wanted, mesh, decoder)
    placed = {
        name: _placed(tree, places[name])
        if jax.tree.structure(tree) == jax.tree.structure(wanted[name])
        else _replicated(tree, mesh)
        for name, tree in params.items()
    }
    return world.stream_params(placed)


def _replicated(tree, mesh):
    place = sharding.replicated(mesh)
    return _placed(tree, jax.tree.map(lambda _: place, tree))


def _placed(tree, places):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


# --- the page --------------------------------------------------------------------------------


def page(title: str, found: dict, unit: str, rates: dict) -> str:
    """Page of what programs consist of (`count`).

    Args:
      title: heading.
      found: part -> its counts, by device.
      unit: what a run of the programs makes: 'step' or 'update'.
      rates: 'tflops' of products, 'memory' and 'link' bytes per second, and the 'frames' of a step.
    """
    lines = []
    for part, one in found.items():
        lines += [f'## {pages.LABELS.get(part, part)}', ''] if len(found) > 1 else []
        lines += table((f'per device and {unit}', ''), _rows(one, unit, rates))
    return pages.page(
        title,
        'Compiled, never run. Bytes are those that kernels ask for; caches of the device may '
        f'spare some. At {rates["tflops"]:g} TFLOP/s, {rates["memory"] / pages.TERA:g} TB/s of '
        f'memory and {rates["link"] / 1e9:g} GB/s sent.',
        [],
        *lines,
    )


def _rows(one: dict, unit: str, rates: dict) -> list[list]:
    memory, attention = one['memory'], one['attention']
    products = 1e3 * one['flops'] / (rates['tflops'] * pages.TERA)
    moved, layouts = (1e3 * one[key] / rates['memory'] for key in ('bytes', 'transposed_bytes'))
    floor = products + moved + layouts
    sizes = ', '.join(f'{name} {size / pages.MIB:,.1f}' for name, size in memory.items())
    rows = [
        ['memory, MiB', sizes],
        ['launches', f'{one["launches"]:,}'],
        [
            'attention by cuDNN',
            f'{attention["cudnn"]} of {attention["cudnn"] + attention["dense"]}'
            + f', and {attention["gradient"]} gradients' * (attention['gradient'] > 0),
        ],
        [
            'convolutions',
            ', '.join(f'{count} {layout}' for layout, count in one['convolutions'].items())
            or 'none',
        ],
        *(
            [
                kind,
                f'{many["count"]:g}, {many["bytes"] / pages.MIB:,.1f} MiB sent '
                f'({1e3 * many["bytes"] / rates["link"]:.2f} ms), '
                f'{many["overlapped"]:g} with products meanwhile',
            ]
            for kind, many in sorted(one['collectives'].items())
        ),
        [
            'products, convolutions, attention',
            f'{one["flops"] / pages.TERA:.4g} TFLOP, {products:.2f} ms',
        ],
        ['all other kernels', f'{one["bytes"] / 1e9:.2f} GB, {moved:.2f} ms'],
        [
            'changes of layout inside cuDNN',
            f'{one["transposed_bytes"] / 1e9:.2f} GB, {layouts:.2f} ms',
        ],
        ['64-bit floats', 'yes' if one['float64'] else 'none'],
        ['calls of the host', one['callbacks'] or 'none'],
        [f'the {unit} takes at least', f'{floor:.1f} ms, what is sent not counted'],
    ]
    if 'frames' in rates:
        rows.append(['frames per second at most', f'{1e3 * rates["frames"] / floor:.0f}'])
    return rows
