"""Gymnasium environments: `from matrix_jax.envs import WorldEnv, WorldVectorEnv, FunctionalEnv`.

The classes are imported on first use, because gymnasium is an optional extra. Gymnasium knows the
environments of `IDS` by name once the package is installed or this module is imported:

    gymnasium.make('matrix_jax/CarRacing-v0')
    gymnasium.make_vec('matrix_jax/World-v0', num_envs=8, recipe='doom', max_episode_steps=200)
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from matrix_jax.config import UsageError

__all__ = ['FunctionalEnv', 'WorldEnv', 'WorldVectorEnv', 'register']
IDS = {  # id -> arguments of the environment
    'matrix_jax/World-v0': {},
    'matrix_jax/CarRacing-v0': {'recipe': 'carracing', 'reward': 'carracing_reward'},
    'matrix_jax/Doom-v0': {'recipe': 'doom'},
    'matrix_jax/Gallery-v0': {'recipe': 'gallery', 'reward': 'gallery_reward'},
}
MODULES = {'FunctionalEnv': 'functional', 'WorldEnv': 'world_env', 'WorldVectorEnv': 'vector_env'}


def register() -> None:
    """Registers `IDS` with gymnasium; gymnasium calls it when it is imported."""
    from gymnasium.envs.registration import register, registry

    for name, arguments in IDS.items():
        if name not in registry:
            register(
                name,
                entry_point='matrix_jax.envs.world_env:WorldEnv',
                vector_entry_point='matrix_jax.envs.vector_env:WorldVectorEnv',
                kwargs=dict(arguments),
            )


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        module = importlib.import_module(f'matrix_jax.envs.{MODULES[name]}')
    except ModuleNotFoundError as error:
        if error.name != 'gymnasium':
            raise
        raise UsageError("environments need gymnasium: pip install 'matrix_jax[data]'") from None
    return getattr(module, name)


if importlib.util.find_spec('gymnasium'):
    register()
