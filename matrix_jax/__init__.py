"""Interactive video world models in JAX: run, train and serve them.

`TheMatrix(...)` keeps the call of the published system; `load(name, weights)` is the general door.
Both are resolved on first use, so that importing the package stays free of work.
"""

__version__ = '0.1.0'
__all__ = ['TheMatrix', 'load']


def __getattr__(name):
    if name == 'TheMatrix':
        from matrix_jax.pipelines.the_matrix import TheMatrix

        return TheMatrix
    if name == 'load':
        from matrix_jax.worlds import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
