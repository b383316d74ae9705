"""The worlds, and the doors that open one: by recipe and weights, fresh, or abstract."""

from __future__ import annotations

import dataclasses

from matrix_jax.worlds import matrix_game_2, the_matrix

REGISTRY = {module.Config: module for module in (the_matrix, matrix_game_2)}


def build(cfg):
    """The world of a config, without weights; abstract until `init` or `load`."""
    return REGISTRY[type(cfg)].World(cfg)


def describe(cfg, folder, whole: bool = False):
    """The world that a weights folder describes, without weights or tokenizers.

    Args:
      cfg: the recipe's world, which says what the folder does not.
      folder: in the released layout.
      whole: whether every part is to be loaded from it.
    """
    module = REGISTRY[type(cfg)]
    return module.World(module.read_folder(cfg, folder, whole))


def load(name: str = 'carracing', weights: str | None = None, mesh=None):
    """One-call door: recipe and weights -> (world, params on the mesh).

    Args:
      name: 'world:RECIPE' from configs/; a bare world means its default recipe.
      weights: folder in the released layout, bundled name or hub repository; the recipe's own by
        default.
      mesh: `config.Mesh`; one device by default.

    Raises:
      UsageError, CheckpointError, ConversionError: all ValueErrors of one line.
    """
    from matrix_jax import recipes

    run = recipes.load(name)
    return open_run(dataclasses.replace(run, weights=weights or run.weights, mesh=mesh or run.mesh))


def open_run(run, split_decoder: bool = False):
    """A run's world and its parameters, read strictly and placed on its mesh.

    Args:
      run: the run.
      split_decoder: whether the caller streams, so that the run may have a pipeline: the parameters of the
        decoder then lie on a mesh of their own.
    """
    import jax
    import jax.numpy as jnp

    from matrix_jax import config
    from matrix_jax.parallel import compilation, sharding
    from matrix_jax.weights import diffusers_layout

    if not run.weights:
        raise config.UsageError(
            f'{run.name}: needs --weights, a folder in the released layout or a hub repository'
        )
    compilation.enable_cache(run.keep_programs)
    make = sharding.make_meshes if split_decoder else sharding.make_mesh
    mesh = make(run.mesh)
    folder = diffusers_layout.resolve(run.weights)
    world = describe(run.world, folder, whole=True).with_tokenizers(folder)
    params = _adapt(run, world, lambda: world.load(folder))
    if world.cfg.dit.dtype == 'float32':
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    params = world.device_put(params, *(mesh if split_decoder else [mesh]))
    return world, world.quantize(params)


def start(run):
    """A training run's world and start parameters: what `weights` holds, the rest fresh."""
    from matrix_jax import config
    from matrix_jax.parallel import compilation
    from matrix_jax.weights import diffusers_layout

    compilation.enable_cache(run.keep_programs)
    world = build(run.world)
    if run.weights is None:
        world.with_tokenizers(None)
        return world, _adapt(run, world, lambda: world.init(run.train.seed))
    folder = diffusers_layout.resolve(run.weights)
    found = describe(run.world, folder)
    world = found.with_new_layers(run.world).with_tokenizers(folder)
    borrowed = world.external_parts(folder)
    if borrowed and getattr(run.stage, 'train_encoders', False):
        raise config.UsageError(
            f'stage.train_encoders: got True, expected False, as {folder} '
            'leaves its control encoder to another place'
        )
    have = tuple(part.folder for part in world.components if world.can_load(folder, part.folder))
    lacking = tuple(
        part.folder for part in world.components if part.folder not in (*have, *borrowed)
    )
    params = _adapt(
        run, found, lambda: found.init(run.train.seed, only=lacking) | found.load(folder, only=have)
    )
    return world, world.add_params(params, found, run.train.seed)


def _adapt(run, world, load):
    """The parameters that `load()` gives with the run's adapter merged in, if it has one.

    The adapter is read first: it is small, and what is wrong with it shows at once.
    """
    if run.lora is None:
        return load()
    import jax

    from matrix_jax.nn import lora

    name = 'transformer'
    adapter = lora.read(run.lora, world.tables[name], world.shapes()[name])
    params = load()
    merged = lora.merge(params[name], adapter, run.lora_scale)
    if world.cfg.dit.dtype != 'float32':
        merged = jax.tree.map(lambda new, old: new.astype(old.dtype), merged, params[name])
    return params | {name: merged}
