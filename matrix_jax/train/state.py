"""Training state and the update step.

A stage defines a loss over the whole parameter tree and which leaves train. The state keeps trained
and frozen leaves in separate flat dicts ('component/path/leaf' -> array), so that frozen weights
cost neither gradients nor optimizer memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct

from matrix_jax.parallel import sharding
from matrix_jax.weights.conversion import flatten, unflatten

BUFFERS = 'buffers'  # entry of a loss's metrics


@struct.dataclass
class TrainState:
    """All that a run needs to resume exactly.

    Attributes:
      step: int32 [], updates tried so far.
      skipped: int32 [], number of consecutive updates refused because they were not finite.
      student: flat dict of trained leaves, float32.
      ema: moving average of `student`; the exported weights.
      frozen: flat dict of leaves that the loss reads and the optimizer does not update.
      opt: optimizer state of `student`.
      key: uint32 [2], raw PRNG key of the run; each step folds in its index.
    """

    step: jax.Array
    skipped: jax.Array
    student: dict
    ema: dict
    frozen: dict
    opt: optax.OptState
    key: jax.Array


def init(params: Mapping, trainable: Callable[[str], bool], tx, seed: int) -> TrainState:
    """Splits `params` by `trainable(path)` and starts the optimizer.

    Raises:
      ValueError: nothing trains.
    """
    flat = flatten(params)
    student = {
        path: jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items() if trainable(path)
    }
    if not student:
        raise ValueError('stage: no parameter trains; expected at least one trainable path')
    frozen = {path: jnp.asarray(leaf) for path, leaf in flat.items() if path not in student}
    return TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        student=student,
        ema=jax.tree.map(jnp.copy, student),
        frozen=frozen,
        opt=tx.init(student),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def shardings(state, axes: Mapping[str, tuple[str, ...]], mesh):
    """Shardings of the leaves of a state.

    Optimizer moments are keyed by the paths of their leaves and share their shardings. Leaves
    without axis letters are replicated.

    Args:
      state: tree of arrays or ShapeDtypeStructs.
      axes: path -> axis letters (`conversion.axes`, flattened).
      mesh: the mesh.
    """

    def one(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        letters = axes.get(names[-1]) if names else None
        if letters is None or len(letters) != leaf.ndim:
            return sharding.replicated(mesh)
        return sharding.param_shardings(letters, leaf, mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def merged(state: TrainState, role: str = 'ema') -> dict:
    """Whole parameter tree with the trained leaves of `role` ('student' or 'ema')."""
    return unflatten({**state.frozen, **getattr(state, role)})


def make_step(loss: Callable, tx, ema_decay: float, accumulate: int = 1) -> Callable:
    """Returns `step(state, batch) -> (state, metrics)`, pure and jittable with a donated state.

    Args:
      loss: `loss(params, batch, key) -> (scalar, metrics dict)`. The metrics may hold `BUFFERS`:
        a flat dict of new values of frozen leaves, such as an error buffer.
      tx: optax transformation.
      ema_decay: decay of the average; at most (1 + step) / (10 + step).
      accumulate: number of parts that a batch is processed in. Loss and gradients are means over
        the parts; each part has its own key. Buffers are those of the last part.

    A step whose loss or gradient is not finite changes no parameters, average, buffers or optimizer
    state, and increments `skipped`.
    """

    def step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def gradient(batch, key):
            def compute(student):
                return loss(unflatten({**state.frozen, **student}), batch, key)

            return jax.value_and_grad(compute, has_aux=True)(state.student)

        (value, metrics), grads, buffers = _accumulated(gradient, batch, key, accumulate)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt = tx.update(grads, state.opt, state.student)
        student = optax.apply_updates(state.student, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)).astype(jnp.float32)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, student)
        frozen = {**state.frozen, **buffers}
        student, ema, opt, frozen = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old) if new is not old else old,
            (student, ema, opt, frozen),
            (state.student, state.ema, state.opt, state.frozen),
        )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=jnp.where(finite, 0, state.skipped + 1),
            student=student,
            ema=ema,
            frozen=frozen,
            opt=opt,
        )
        return state, {'loss': value, 'grad_norm': norm, 'skipped': state.skipped, **metrics}

    return step


def _accumulated(gradient, batch, key, parts: int):
    """(mean of `gradient(part of the batch, key of the part)` over the parts, buffers of the last).

    Returns:
      ((value, metrics), gradient, flat dict of buffers).
    """

    def split_buffers(batch, key):
        (value, metrics), grads = gradient(batch, key)
        metrics = dict(metrics)
        buffers = metrics.pop(BUFFERS, {})
        return ((value, metrics), grads), buffers

    if parts == 1:
        means, buffers = split_buffers(batch, key)
        return *means, buffers
    # Part a takes the examples a, a + parts, ..., so no example moves between devices.
    split = jax.tree.map(lambda leaf: rearrange(leaf, '(b a) ... -> a b ...', a=parts), batch)
    keys = jax.random.split(key, parts)

    def add(carry, part):
        means, buffers = split_buffers(*part)
        return (jax.tree.map(jnp.add, carry[0], means), buffers), None

    shapes = jax.eval_shape(split_buffers, *jax.tree.map(lambda leaf: leaf[0], (split, keys)))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (total, buffers), _ = jax.lax.scan(add, start, (split, keys))
    return *jax.tree.map(lambda leaf: leaf / parts, total), buffers
