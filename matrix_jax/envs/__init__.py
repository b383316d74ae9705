"""Gymnasium environments: `from matrix_jax.envs import WorldEnv, WorldVectorEnv`.

The classes are imported on first use, because gymnasium is an optional extra.
"""

from __future__ import annotations

from matrix_jax.config import UsageError

__all__ = ['WorldEnv', 'WorldVectorEnv']


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        from matrix_jax.envs import world_env
    except ModuleNotFoundError as error:
        if error.name != 'gymnasium':
            raise
        raise UsageError("environments need gymnasium: pip install 'matrix_jax[data]'") from None
    return getattr(world_env, name)
