"""Images whose rows are split over devices.

Each device runs a network of convolutions and norms on its own rows. Where a layer needs other
rows, it asks a function here: the neighbouring rows for a convolution, the statistics of all rows
for a norm. For a whole image these functions return the plain answer, so a layer need not know how
many devices there are.

    split_rows          runs a function with the rows split over the devices of a mesh
    with_halo           a device's rows, with its neighbours' next to them
    all_rows            all rows on every device
    local_mean          mean over a device's rows
    pooled_statistics   mean and variance over all rows
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from matrix_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """How the rows of an image are split over devices, at any resolution of it.

    Attributes:
      axis: mesh axis.
      count: devices.
      total: rows of the image at its lowest resolution.
      local_rows: rows per device at that resolution. The last devices may have padding rows below
        the image, which are never used.
    """

    axis: str
    count: int
    total: int
    local_rows: int

    @property
    def even(self) -> bool:
        """Whether no device holds padding rows."""
        return self.count * self.local_rows == self.total

    @property
    def row_fractions(self) -> np.ndarray:
        """Image rows on each device as a fraction of `local_rows`, float32 [count]."""
        return np.clip(self.total / self.local_rows - np.arange(self.count), 0, 1).astype(
            np.float32
        )

    def masked(self, x: jax.Array) -> jax.Array:
        """Sets padding rows to zero: [B T H W C] -> [B T H W C]."""
        if self.even:
            return x
        rows = x.shape[2]
        row = lax.axis_index(self.axis) * rows + jnp.arange(rows)
        return jnp.where((row < self.total * rows // self.local_rows)[:, None, None], x, 0)


# Set while `split_rows` traces its function, so that layers need not pass it on.
_rows: contextvars.ContextVar[RowSharding | None] = contextvars.ContextVar('rows', default=None)


def split_rows(
    function: Callable, params: Any, cache: Any, x: jax.Array, unit: int = 1
) -> tuple[Any, jax.Array]:
    """Computes `function(params, cache, x) -> (cache, y)` with image rows split over devices.

    Without a mesh, or if the rows are no multiple of `unit`, it calls the function directly. The
    result is the same either way. If rows do not divide evenly, every device holds as many as the
    first, and the cache keeps the padding rows.

    Args:
      function: works on arrays [B T H W C] whose row counts are whole multiples of each other, and
        uses the functions below wherever rows interact.
      params: tree that every device holds whole.
      cache: tree from the previous call, or None.
      x: [B T H W C].
      unit: rows of x that must stay on one device (those of a latent row).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis: Any = sharding.RULES['rows']
    count = mesh.shape.get(axis, 1)
    if count == 1 or x.shape[2] % unit:
        return function(params, cache, x)
    total = x.shape[2] // unit
    rows = RowSharding(axis, count, total, local_rows=-(-total // count))
    padding = rows.local_rows * count - total
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding * unit), (0, 0), (0, 0)))

    def on_device(params: Any, cache: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        token = _rows.set(rows)
        try:
            return function(params, cache, x)
        finally:
            _rows.reset(token)

    spec = sharding.fitting_spec(('batch', None, 'rows', None, None), x.shape, mesh)
    cache, y = jax.shard_map(
        on_device, in_specs=(jax.P(), spec, spec), out_specs=spec, check_vma=False
    )(params, cache, x)
    if not rows.even:
        y = y[:, :, : y.shape[2] * total // (count * rows.local_rows)]
    return cache, y


# --- for layers ------------------------------------------------------------------------------


def with_halo(x: jax.Array, above: int, below: int) -> tuple[jax.Array, tuple[int, int]]:
    """Returns the rows that a convolution reads, and the zero rows that it must pad with.

    Args:
      x: [B T H W C].
      above, below: rows that the convolution reads beyond its own, at most as many as a device
        holds.

    Returns:
      x with its neighbours' rows [B T above+H+below W C], and (0, 0); for a whole image x itself,
      and (above, below).
    """
    rows = _rows.get()
    if rows is None or not above + below:
        return x, (above, below)
    x = rows.masked(x)
    parts, steps = [x], range(rows.count - 1)
    # The first and last device receive zeros, which is the padding at the border of the image.
    if above:
        parts.insert(0, lax.ppermute(x[:, :, -above:], rows.axis, [(i, i + 1) for i in steps]))
    if below:
        parts.append(lax.ppermute(x[:, :, :below], rows.axis, [(i + 1, i) for i in steps]))
    return jnp.concatenate(parts, axis=2), (0, 0)


def all_rows(x: jax.Array) -> jax.Array:
    """Gathers all rows of the image on every device: [B T H W C] -> [B T H' W C]."""
    rows = _rows.get()
    if rows is None:
        return x
    total = x.shape[2] * rows.total // rows.local_rows
    return lax.all_gather(x, rows.axis, axis=2, tiled=True)[:, :, :total]


def local_mean(x: jax.Array) -> jax.Array:
    """Returns the mean of each channel over a device's own rows: [B T H W C] -> [B C]."""
    rows = _rows.get()
    if rows is None or rows.even:
        return x.mean((1, 2, 3))
    part = jnp.asarray(np.where(rows.row_fractions, rows.row_fractions, 1))[
        lax.axis_index(rows.axis)
    ]
    return rows.masked(x).mean((1, 2, 3)) / part


def pooled_statistics(mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance over the whole image, given those of a device's own rows."""
    rows = _rows.get()
    if rows is None:
        return mean, variance
    # One exchange for both, as exact as two passes over the whole image.
    means, variances = lax.all_gather(jnp.stack([mean, variance]), rows.axis, axis=1)
    weights = (rows.row_fractions / rows.row_fractions.sum()).reshape(-1, *[1] * mean.ndim)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + jnp.square(means - mean))).sum(0)
