"""Pictures whose rows are split over devices.

A network of convolutions and norms runs on each device with the rows that it holds. What it needs
of the other devices it asks here: the rows next to its own for a convolution, the statistics of all
rows for a norm. Where a picture is whole the answers are the plain ones, so layers never learn
whether there is more than one device.

    split       function of a picture -> the same over the devices of a mesh
    bordered    a device's rows -> with its neighbours' next to them
    whole       a device's rows -> all rows
    mean, pool  statistics of a device's rows, and of all
"""

from __future__ import annotations

import contextvars
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from matrix_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """How the rows of a picture lie on devices, at any size of it.

    Attributes:
      axis: mesh axis.
      count: devices.
      total: rows of the picture at its smallest.
      held: rows of a device at that size; the last devices may hold rows below the picture, which
        nothing reads.
    """

    axis: str
    count: int
    total: int
    held: int

    @property
    def even(self) -> bool:
        """Whether every row of every device is of the picture."""
        return self.count * self.held == self.total

    @property
    def parts(self) -> np.ndarray:
        """The rows of the picture that each device holds, as a share of `held` [count]."""
        return np.clip(self.total / self.held - np.arange(self.count), 0, 1).astype(np.float32)

    def masked(self, x):
        """Rows below the picture as zeros: [B T H W C] -> the same."""
        if self.even:
            return x
        rows = x.shape[2]
        row = lax.axis_index(self.axis) * rows + jnp.arange(rows)
        return jnp.where((row < self.total * rows // self.held)[:, None, None], x, 0)


# Set while the function of a `split` is traced, so that layers need not hand it on.
_share: contextvars.ContextVar[RowSharding | None] = contextvars.ContextVar('share', default=None)


def split_rows(function, params, cache, x, unit: int = 1):
    """`function(params, cache, x) -> (cache, y)` of a picture, its rows split over the devices.

    Within `jax.set_mesh`; without a mesh, or with rows that are no multiple of `unit`, it is the
    plain call. The result is equal either way. Where rows do not divide, each device holds as many
    as the first, and the cache keeps the rows below the picture.

    Args:
      function: its arrays are [B T H W C], and rows of different sizes of the picture are whole
        multiples of each other. It asks the functions below wherever rows meet.
      params: tree that every device has whole.
      cache: tree of the call before, or None.
      x: [B T H W C].
      unit: rows of x that must not be torn apart (those of a latent row).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = sharding.RULES['rows']
    count = mesh.shape.get(axis, 1)
    if count == 1 or x.shape[2] % unit:
        return function(params, cache, x)
    total = x.shape[2] // unit
    share = RowSharding(axis, count, total, held=-(-total // count))
    below = share.held * count - total
    x = jnp.pad(x, ((0, 0), (0, 0), (0, below * unit), (0, 0), (0, 0)))

    def own(params, cache, x):
        token = _share.set(share)
        try:
            return function(params, cache, x)
        finally:
            _share.reset(token)

    place = sharding.fitting_spec(('batch', None, 'rows', None, None), x.shape, mesh)
    cache, y = jax.shard_map(
        own, in_specs=(jax.P(), place, place), out_specs=place, check_vma=False
    )(params, cache, x)
    if not share.even:
        y = y[:, :, : y.shape[2] * total // (count * share.held)]
    return cache, y


# --- for layers ------------------------------------------------------------------------------


def with_halo(x, above: int, below: int):
    """The rows that a convolution reads beyond those it makes.

    Args:
      x: [B T H W C].
      above, below: how many, each at most as many as a device holds.

    Returns:
      x [B T above+H+below W C] and (0, 0), the zero rows that the convolution has to add itself;
      or x as it is and (above, below) where the picture is whole.
    """
    share = _share.get()
    if share is None or not above + below:
        return x, (above, below)
    x = share.masked(x)
    parts, steps = [x], range(share.count - 1)
    # What nobody sends is zeros: the border of the picture.
    if above:
        parts.insert(0, lax.ppermute(x[:, :, -above:], share.axis, [(i, i + 1) for i in steps]))
    if below:
        parts.append(lax.ppermute(x[:, :, :below], share.axis, [(i + 1, i) for i in steps]))
    return jnp.concatenate(parts, axis=2), (0, 0)


def all_rows(x):
    """All rows of the picture on every device: [B T H W C] of its own -> [B T H' W C]."""
    share = _share.get()
    if share is None:
        return x
    total = x.shape[2] * share.total // share.held
    return lax.all_gather(x, share.axis, axis=2, tiled=True)[:, :, :total]


def local_mean(x):
    """Mean of each channel over a device's own rows: [B T H W C] -> [B C]."""
    share = _share.get()
    if share is None or share.even:
        return x.mean((1, 2, 3))
    part = jnp.asarray(np.where(share.parts, share.parts, 1))[lax.axis_index(share.axis)]
    return share.masked(x).mean((1, 2, 3)) / part


def pooled_statistics(mean, variance):
    """Mean and variance over the whole picture from those of a device's own rows, any shape."""
    share = _share.get()
    if share is None:
        return mean, variance
    # One exchange for both, and as exact as two passes over the whole.
    means, variances = lax.all_gather(jnp.stack([mean, variance]), share.axis, axis=1)
    weights = (share.parts / share.parts.sum()).reshape(-1, *[1] * mean.ndim)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + jnp.square(means - mean))).sum(0)
