"""ODE initialisation: a streaming network learns where the paths of its teacher end.

The teacher, which sees clips whole, walks from noise to clean latents in many steps. Of each path
the points at the student's own levels are kept. The student sees blocks and what came before them,
each block at a level of its own, and is to name the end of the path (CausVid, arXiv 2412.07772;
Self-Forcing, arXiv 2506.08009). Teacher and student start as the weights that the run starts from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.data import image_clips, latents
from matrix_jax.diffusion import flow
from matrix_jax.parallel import compilation
from matrix_jax.stream import causal
from matrix_jax.train.flow_matching import FlowMatching
from matrix_jax.weights import diffusers_layout

TOGETHER = 8  # paths walked side by side


@dataclasses.dataclass(frozen=True)
class ODEPairs(FlowMatching):
    """Regression of the ends of the teacher's paths.

    Attributes:
      points: steps of the teacher between two levels of the student.
      paths: how many clips a path is walked for; None = for all.
    """

    points: int = 12
    paths: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ('points', 'paths'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'stage.{name}: got {value}, expected at least 1')

    def loader(self, world, params, data, batch, seed, cache):
        store = image_clips.encode(data, world, params, cache, self.clip_frames)
        count = min(self.paths or len(store), len(store))
        made = self._walked(world, params, store, count, seed, cache)
        return image_clips.ClipBatches(store, batch, seed, {'path': made})

    def example(self, world, batch):
        clip = super().example(world, batch)
        shape = len(world.cfg.stream.steps) + 1, *clip['latents'].shape[1:]
        return clip | {'path': jax.ShapeDtypeStruct((batch, *shape), jnp.float16)}

    def loss(self, world, params, batch, key):
        stream, count = world.cfg.stream, self.blocks(world)
        table, path = causal.step_table(stream, world.cfg.flow), batch['path'].astype(jnp.float32)
        drawn = jax.random.randint(key, (len(path), count), 0, len(stream.steps))
        drawn = jnp.repeat(drawn, stream.frames, axis=1)
        x = jnp.take_along_axis(path, drawn[:, None, :, None, None, None], axis=1)[:, 0]
        given = self.told(world, self.given(world, params, batch), path[:, -1])
        v = world.denoise(
            params, x, jnp.asarray(table.level)[drawn], given, batch['actions'], stream.frames
        )
        error = jnp.square(flow.x0_from_v(jnp.asarray(table.sigma)[drawn], x, v) - path[:, -1])
        return error.mean(), {}

    def _walked(self, world, params, store, count: int, seed: int, cache):
        """Paths float16 [M S+1 T H W C] of the first `count` clips of a store, walked once."""
        about = {
            'steps': world.cfg.stream.steps,
            'shift': world.cfg.flow.shift,
            'points': self.points,
            'count': count,
            'seed': seed,
            'clips': store.folder.name,
            'teacher': latents.digest(params['transformer']),
            'image_encoder': latents.digest(params['image_encoder']),
        }
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        final = Path(cache) / f'paths-{name[:16]}'

        def walk(params, batch, key):
            cond = self.given(world, params, batch)
            noise = jax.random.normal(key, batch['latents'].shape)

            def denoise(x, level):
                return world.denoise(params, x, level, cond, batch['actions'])

            return path(world.cfg.flow, world.cfg.stream.steps, self.points, denoise, noise)

        def fill(part):
            from tqdm import tqdm

            shape = count, len(world.cfg.stream.steps) + 1, *store.latents.shape[1:]
            made = np.lib.format.open_memmap(part / 'path.npy', 'w+', np.float16, shape)
            step = compilation.jit(walk)
            for first in tqdm(range(0, count, TOGETHER), desc='paths', unit='batch'):
                chosen = np.minimum(np.arange(first, first + TOGETHER), count - 1)
                batch = {name: getattr(store, name)[chosen] for name in image_clips.ARRAYS}
                key = jax.random.fold_in(jax.random.key(seed), first)
                made[first : first + TOGETHER] = step(params, batch, key)[: count - first]
            made.flush()

        if not (final / 'path.npy').exists():
            os.makedirs(cache, exist_ok=True)
            diffusers_layout.replace_folder(final, fill)
        return np.load(final / 'path.npy', mmap_mode='r')


def path(cfg: flow.Config, steps, points: int, denoise, noise):
    """A walk from noise [B T H W C] in Euler steps: [B S+1 T H W C], where it was at each of the
    student's `steps`, and its end.

    Args:
      steps: S even steps, descending from `cfg.train_steps`.
      points: Euler steps from one of these to the next, and from the last one to 0.
      denoise: `denoise(x, level [B T]) -> v`.
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

    end, made = jax.lax.scan(leg, noise, sigmas)
    return jnp.moveaxis(jnp.concatenate([made, end[None]]), 0, 1)
