"""Stages 1 and 2 (arXiv 2412.03568): denoising of whole clips, without condition frames.

Each sample has one level t, uniform in 0 .. 999; all frames count. The base model of a bundled
world trains completely (`WholeClip`). From a released model, stage 1 adapts the attention to the
domain by LoRA, without control (`LoRA`), and stage 2 adds the control path and trains only that
(`ControlSFT`).
"""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp

from matrix_jax.nn import lora
from matrix_jax.train.denoise import Denoising, denoise_loss
from matrix_jax.weights import conversion


@dataclasses.dataclass(frozen=True)
class WholeClip(Denoising):
    """Denoising of whole clips; the whole transformer trains."""

    clip_frames: tuple[int, ...] = (65,)

    def loss(self, world, params, batch, key):
        schedule, keys = world.schedule, jax.random.split(key, 4)
        clean = batch['latents'].astype(jnp.float32)
        text, control = self.conditions(world, params, batch['ids'], batch['controls'], keys[:2])
        level = jax.random.randint(keys[2], (len(clean), 1), 0, len(schedule.alphas_cumprod))
        levels = jnp.broadcast_to(level, clean.shape[:2])
        noise = jax.random.normal(keys[3], clean.shape)

        def denoise(noisy, levels):
            return world.denoise(params, noisy, levels, text, control)

        loss, _ = denoise_loss(schedule, denoise, clean, noise, levels, jnp.ones(clean.shape[1]))
        return loss, {}


@dataclasses.dataclass(frozen=True)
class ControlSFT(WholeClip):
    """Stage 2: only the control path trains; it starts as the identity."""

    clip_frames: tuple[int, ...] = (21, 65)

    def trainable(self, path):
        # The published rule: parameters of the transformer whose name contains 'control'.
        component, _, name = path.partition('/')
        encoder = self.train_encoders and component == 'control_encoder'
        return encoder or (component == 'transformer' and 'control' in name)


@dataclasses.dataclass(frozen=True)
class LoRA(WholeClip):
    """Stage 1: low-rank updates of the attention train on text alone (LoRA, arXiv 2106.09685).

    Exports the merged model, and the adapter beside it as `nn.lora.FILE`.

    Attributes:
      rank: rank r of the adapter.
      alpha: the update is scaled by alpha / rank.
    """

    clip_frames: tuple[int, ...] = (17, 33, 65)
    control_dropout: float = 1.0  # control blocks, if any, see the null control
    rank: int = 256
    alpha: float = 256.0

    def __post_init__(self):
        super().__post_init__()
        if self.train_encoders:
            raise ValueError(
                'stage.train_encoders: got True, expected False (an adapter changes '
                'the transformer alone)'
            )
        self.check_fields(rank=(1, None))
        if not 0 < self.alpha < float('inf'):
            raise ValueError(f'stage.alpha: got {self.alpha}, expected a number above 0')

    def start(self, world, params, seed, allow_non_finite=False):
        name = 'transformer'
        adapter = lora.init(world.tables[name], params[name], self.rank, self.alpha, seed)
        return super().start(world, params, seed, allow_non_finite) | {'lora': adapter}

    def axes(self, world):
        kernels = conversion.axes(world.tables['transformer'])
        return super().axes(world) | conversion.flatten({'lora': lora.axes(kernels)})

    def trainable(self, path):
        return path.startswith('lora/') and not path.endswith('/alpha')

    def loss(self, world, params, batch, key):
        return super().loss(world, _merged(params), batch, key)

    def finish(self, world, params, loader):
        return world, _merged(params)

    def save(self, world, params, folder, run):
        super().save(world, params, folder, run)
        lora.write(os.path.join(folder, lora.FILE), params['lora'], world.tables['transformer'])


def _merged(params):
    """Parameters with the adapter merged into the transformer."""
    return {**params, 'transformer': lora.merge(params['transformer'], params['lora'])}
