"""ODE initialisation: a streaming network learns where the probability-flow paths of a teacher end.

The teacher sees whole clips and solves each path from noise to clean latents in many Euler steps.
The points at the student's own levels are kept. The block-causal student sees each block at a level
of its own and predicts the end of the path (CausVid, arXiv 2412.07772; Self-Forcing, arXiv
2506.08009):

    loss = | (x - sigma v_student) - x_end |^2

Teacher and student both start from the weights of the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.data import cache as caches
from matrix_jax.data import image_clips
from matrix_jax.diffusion import flow
from matrix_jax.parallel import compilation
from matrix_jax.stream import causal
from matrix_jax.train.flow_matching import FlowMatching

TOGETHER = 8  # paths solved in one batch


@dataclasses.dataclass(frozen=True)
class ODEPairs(FlowMatching):
    """Regression on the ends of the teacher's paths.

    Attributes:
      points: steps of the teacher between two levels of the student.
      paths: number of clips with a path; None = all.
    """

    points: int = 12
    paths: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_fields(points=(1, None), paths=(1, None))

    def loader(self, world, params, data, batch, seed, cache):
        store = image_clips.encode(data, world, params, cache, self.clip_frames)
        count = min(self.paths or len(store), len(store))
        paths = self._solved(world, params, store, count, seed, cache)
        return image_clips.ClipBatches(store, batch, seed, {'path': paths})

    def example(self, world, batch):
        clip = super().example(world, batch)
        shape = len(world.cfg.stream.steps) + 1, *clip['latents'].shape[1:]
        return clip | {'path': jax.ShapeDtypeStruct((batch, *shape), jnp.float16)}

    def loss(self, world, params, batch, key):
        stream, count = world.cfg.stream, self.blocks(world)
        table, path = causal.step_table(stream, world.cfg.flow), batch['path'].astype(jnp.float32)
        step = jax.random.randint(key, (len(path), count), 0, len(stream.steps))
        step = jnp.repeat(step, stream.frames, axis=1)
        x = jnp.take_along_axis(path, step[:, None, :, None, None, None], axis=1)[:, 0]
        cond = self.block_condition(world, self.condition(world, params, batch), path[:, -1])
        v = world.denoise(
            params, x, jnp.asarray(table.level)[step], cond, batch['actions'], stream.frames
        )
        error = jnp.square(flow.x0_from_v(jnp.asarray(table.sigma)[step], x, v) - path[:, -1])
        return error.mean(), {}

    def _solved(self, world, params, store, count: int, seed: int, cache):
        """Paths float16 [M S+1 T H W C] of the first `count` clips of a store; solved only once."""
        source = {
            'steps': world.cfg.stream.steps,
            'shift': world.cfg.flow.shift,
            'points': self.points,
            'count': count,
            'seed': seed,
            'clips': store.folder.name,
            'teacher': caches.params_digest(params['transformer']),
            'image_encoder': caches.params_digest(params['image_encoder']),
        }

        def solve(params, batch, key):
            cond = self.condition(world, params, batch)
            noise = jax.random.normal(key, batch['latents'].shape)

            def denoise(x, level):
                return world.denoise(params, x, level, cond, batch['actions'])

            return path(world.cfg.flow, world.cfg.stream.steps, self.points, denoise, noise)

        def fill(folder):
            from tqdm import tqdm

            shape = count, len(world.cfg.stream.steps) + 1, *store.latents.shape[1:]
            paths = np.lib.format.open_memmap(folder / 'path.npy', 'w+', np.float16, shape)
            step = compilation.jit(solve)
            for first in tqdm(range(0, count, TOGETHER), desc='paths', unit='batch'):
                chosen = np.minimum(np.arange(first, first + TOGETHER), count - 1)
                batch = {name: getattr(store, name)[chosen] for name in image_clips.ARRAYS}
                key = jax.random.fold_in(jax.random.key(seed), first)
                paths[first : first + TOGETHER] = step(params, batch, key)[: count - first]
            paths.flush()

        folder = Path(cache) / f'paths-{caches.name(source)}'
        return np.load(caches.build(folder, 'path.npy', fill) / 'path.npy', mmap_mode='r')


def path(cfg: flow.Config, steps, points: int, denoise, noise):
    """Solves the probability flow by Euler steps.

    Args:
      steps: S student levels, descending from `cfg.train_steps`.
      points: Euler steps between two student levels, and from the last one to 0.
      denoise: `denoise(x, level [B T]) -> v`.
      noise: start of the path [B T H W C].

    Returns:
      [B S+1 T H W C]: the points at the student levels, and the end.
    """
    marks = np.append(steps, 0) / cfg.train_steps
    grid = np.linspace(marks[:-1], marks[1:], points + 1, axis=1)
    sigmas = np.float32(flow.sigma(cfg, grid))

    def advance(x, now):
        here, there = now
        v = denoise(x, jnp.broadcast_to(1000 * here, x.shape[:2]))
        return flow.euler(here, there, x, v), None

    def leg(x, sigmas):
        return jax.lax.scan(advance, x, (sigmas[:-1], sigmas[1:]))[0], x

    end, starts = jax.lax.scan(leg, noise, sigmas)
    return jnp.moveaxis(jnp.concatenate([starts, end[None]]), 0, 1)
