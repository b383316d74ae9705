"""Interactive video world models in JAX: run, train and serve them.

`load(name, weights)` opens any world. `live_frames(name, actions)` yields the frames of a world
that a list or a function drives. `TheMatrix(...)` keeps the call of the published system. All are
imported on first use, so that importing the package is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matrix_jax.pipelines.live import live_frames
    from matrix_jax.pipelines.the_matrix import TheMatrix
    from matrix_jax.worlds import load

__version__ = '0.1.0'
__all__ = ['TheMatrix', 'live_frames', 'load']


def __getattr__(name: str) -> Any:
    if name == 'TheMatrix':
        from matrix_jax.pipelines.the_matrix import TheMatrix

        return TheMatrix
    if name == 'live_frames':
        from matrix_jax.pipelines.live import live_frames

        return live_frames
    if name == 'load':
        from matrix_jax.worlds import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
