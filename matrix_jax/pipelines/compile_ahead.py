"""A weights folder with compiled programs beside the weights (`weights.stored_programs`)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from matrix_jax import config, worlds
from matrix_jax.parallel import compile_only, sharding
from matrix_jax.pipelines.stream_runner import StreamRunner
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.weights import diffusers_layout, stored_programs
from matrix_jax.worlds.networks import Params
from matrix_jax.worlds.protocols import World

BINDINGS = 'late', 'early'


def save(run: config.Run, target: str, folder: str | Path, players: int) -> str:
    """Compiles the programs of `generate` and `play`; returns a line about them.

    Args:
      run: a recipe with weights.
      target: 'cpu', or GPUs as in `compile_only.NAMES`.
      folder: where to write: a new folder, which gets the weights as well, or the weights folder of
        the run, which gets the programs.
      players: players of `play`.

    Raises:
      UsageError, ValueError: the model makes whole clips, or the folder or the target does not
        suit.
    """
    if run.world.clip:
        raise config.UsageError(f'{run.name}: makes whole clips, expected a model that streams')
    if run.mesh.parts:
        raise config.UsageError(
            f'--mesh.pipeline: got {run.mesh.pipeline}, expected 1: programs of two parts are '
            'not stored'
        )
    source, folder = diffusers_layout.resolve(run.weights or ''), Path(folder)
    ours = folder.exists() and folder.samefile(source)
    if folder.exists() and not ours:
        raise config.UsageError(f'{folder}: is there already, expected a new name')
    if ours and source.is_relative_to(diffusers_layout.ASSETS):
        raise config.UsageError(f'{folder}: belongs to this package, expected a new name')
    config.check_writable('DST', folder, folder=True)
    stored_programs.signing_key(create=True)
    if not ours:
        diffusers_layout.replace_folder(folder, lambda new: _link(source, new))
    run = dataclasses.replace(run, weights=str(folder))
    count = size = 0
    with _opened(run, target) as (world, params):
        for key, made in _programs(world, params, players):
            size += stored_programs.save(folder, key, made, world.shapes())
            count += len(made)
    return f'{folder}: {count} programs of {run.name} for {target}, {size / 2**20:.1f} MiB'


@contextlib.contextmanager
def _opened(run: config.Run, target: str) -> Iterator[tuple[World, Params]]:
    """The world and its parameters; those for GPUs that are not there are shapes."""
    # A program that jax has loaded from its cache cannot be stored: it lacks its functions.
    settings: Any = jax.config
    cached = settings.jax_enable_compilation_cache
    settings.update('jax_enable_compilation_cache', False)
    try:
        if target == 'cpu':
            if jax.default_backend() != 'cpu':
                raise ValueError('--compile-for: got cpu, expected a process on the CPU')
            yield worlds.open_run(run)
            return
        number = compile_only.parse(target)
        mesh = compile_only.fit_mesh(run.mesh, number, 'seq')
        settings.update('jax_platforms', 'cpu')  # what is computed while tracing
        gpus = compile_only.devices(number)
        folder = diffusers_layout.resolve(run.weights or '')
        world = worlds.describe(run.world, folder, whole=True).with_tokenizers(folder)
        world.programs_folder = folder
        with compile_only.tracing():
            yield world, _shapes(world, sharding.make_mesh(mesh, gpus))
    finally:
        settings.update('jax_enable_compilation_cache', cached)


def _shapes(world: Any, mesh: Any) -> Params:
    """Parameters of a world as ShapeDtypeStructs on a mesh."""
    shapes = {name: tree for name, tree in world.shapes().items() if world.needs(name)}
    shapes = jax.eval_shape(world.quantize, shapes)
    places = world.param_places(shapes, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def _programs(
    world: World, params: Params, players: int
) -> Iterator[tuple[stored_programs.Key, dict[str, Any]]]:
    """Yields the programs of `generate` for each control binding, then those of `play`."""
    controls = [world.vocabulary.idle] * (
        world.first_step_controls + world.cfg.stream.controls_per_step
    )
    for binding in BINDINGS:
        try:
            world.cfg.stream.with_control_binding(binding)
        except ValueError:
            continue  # this stream has no choice
        runner = StreamRunner(world, params, binding, load_stored=False)
        known, steps = world.split_controls(controls)
        frames = np.zeros((world.start_frames, world.cfg.height, world.cfg.width, 3), np.uint8)
        inputs, _ = world.inputs(world.cfg.prompt, frames, known)
        key = jax.random.split(jax.random.key(0), 1)
        yield runner.key(), runner.compile_all(inputs, key, steps)
    stream = BatchedStream(world, params, players)
    yield stream.key(), stream.compile_all({})


def _link(source: Path, new: Path) -> None:
    """Fills a folder with hard links to the files of another, or with copies of them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(os.path.realpath(one), other)
        except OSError:
            shutil.copyfile(one, other)

    ignore = shutil.ignore_patterns(stored_programs.FOLDER)
    shutil.copytree(source, new, copy_function=link, dirs_exist_ok=True, ignore=ignore)
