"""The worlds, and three ways to open one: from weights, for training, or without parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matrix_jax.worlds import matrix_game_2, matrix_game_3, the_matrix
from matrix_jax.worlds.networks import Params
from matrix_jax.worlds.protocols import World

# Config of a world -> the world. A new world is one more line.
REGISTRY: dict[type, Callable[[Any], World]] = {
    the_matrix.Config: the_matrix.World,
    matrix_game_2.Config: matrix_game_2.World,
    matrix_game_3.Config: matrix_game_3.World,
}


def build(cfg: Any) -> World:
    """Returns the world of a config, without parameters."""
    return REGISTRY[type(cfg)](cfg)


def describe(cfg: Any, folder: str | Path, whole: bool = False) -> World:
    """Returns the world with the sizes that a weights folder describes, without parameters.

    Args:
      cfg: the recipe's world, which says what the folder does not.
      folder: weights folder in the diffusers layout.
      whole: whether all components are to be loaded from the folder.

    Raises:
      CheckpointError: the folder describes another world.
    """
    return build(cfg).described_by(folder, whole)


def load(
    name: str = 'carracing', weights: str | None = None, mesh: Any = None
) -> tuple[World, Params]:
    """Returns a recipe's world and its parameters, on a mesh.

    Args:
      name: 'world:RECIPE' from configs/; a bare world means its default recipe.
      weights: folder in the diffusers layout, bundled name or hub repository; the recipe's weights
        by default.
      mesh: `config.Mesh`; one device by default.

    Raises:
      UsageError, CheckpointError, ConversionError: what cannot be used, in one line.
    """
    from matrix_jax import recipes

    run = recipes.load(name)
    return open_run(dataclasses.replace(run, weights=weights or run.weights, mesh=mesh or run.mesh))


def open_run(run: Any, split_decoder: bool = False) -> tuple[World, Params]:
    """Returns a run's world and its parameters, read strictly and placed on the run's mesh.

    Args:
      run: a `config.Run` with weights.
      split_decoder: whether the decoder's parameters may lie on a mesh of their own, and those of
        layers be separate (`Networks.stream_params`), for callers that stream.

    Raises:
      UsageError, CheckpointError, ConversionError: what cannot be used, in one line.
    """
    import jax

    from matrix_jax import config
    from matrix_jax.parallel import compilation, sharding
    from matrix_jax.weights import diffusers_layout

    if not run.weights:
        raise config.UsageError(
            f'{run.name}: needs --weights, a folder in the diffusers layout or a hub repository'
        )
    compilation.enable_cache(run.keep_programs)
    meshes = sharding.make_meshes(run.mesh) if split_decoder else (sharding.make_mesh(run.mesh),)
    folder = diffusers_layout.resolve(run.weights)
    world = describe(run.world, folder, whole=True).with_tokenizers(folder)
    world.programs_folder = folder
    params = _with_adapter(run, world, lambda: world.load(folder, None, run.allow_non_finite))
    if world.cfg.dit.dtype == 'float32':
        params = jax.tree.map(_as_float32, params)
    params = world.quantize(world.device_put(params, *meshes))
    return world, world.stream_params(params) if split_decoder else params


def _as_float32(leaf: Any) -> Any:
    """Returns a leaf in float32; numpy converts those that are not on a device yet."""
    return leaf if leaf.dtype == 'float32' else leaf.astype('float32')


def start(run: Any) -> tuple[World, Params]:
    """Returns a training run's world and its first parameters.

    Components in the run's weights are read, all others are initialised.

    Raises:
      UsageError, CheckpointError, ConversionError: what cannot be used, in one line.
    """
    from matrix_jax import config
    from matrix_jax.parallel import compilation
    from matrix_jax.weights import diffusers_layout

    compilation.enable_cache(run.keep_programs)
    seed = run.train.seed
    if run.weights is None:
        world = build(run.world).with_tokenizers(None)
        return world, _with_adapter(run, world, lambda: world.init(seed))
    folder = diffusers_layout.resolve(run.weights)
    found = describe(run.world, folder)
    world = found.with_new_layers(run.world).with_tokenizers(folder)
    external = world.external_parts(folder)
    if external and getattr(run.stage, 'train_encoders', False):
        raise config.UsageError(
            f'stage.train_encoders: got True, expected False, as {folder} '
            'takes its control encoder from another folder'
        )
    names = [component.folder for component in world.components]
    present = tuple(name for name in names if world.can_load(folder, name))
    missing = tuple(name for name in names if name not in (*present, *external))
    params = _with_adapter(
        run,
        found,
        lambda: found.init(seed, only=missing) | found.load(folder, present, run.allow_non_finite),
    )
    return world, world.add_params(params, found, seed)


def _with_adapter(run: Any, world: World, load: Callable[[], Params]) -> Params:
    """Returns the parameters of `load()` with the run's LoRA adapter merged in, if it has one.

    The adapter is read first: it is small, and its faults show before the weights are read.
    """
    if run.lora is None:
        return load()
    import jax

    from matrix_jax import config
    from matrix_jax.nn import lora

    if len(world.network_folders) > 1:
        raise config.UsageError(
            f'--lora: got {run.lora}, expected none: this world has two networks'
        )
    name = 'transformer'
    adapter = lora.read(run.lora, world.tables[name], world.shapes()[name])
    params = load()
    merged = lora.merge(params[name], adapter, run.lora_scale)
    if world.cfg.dit.dtype != 'float32':
        merged = jax.tree.map(lambda new, old: new.astype(old.dtype), merged, params[name])
    return params | {name: merged}
