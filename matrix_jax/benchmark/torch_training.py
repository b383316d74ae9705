"""An update of a small world in JAX and in PyTorch: the same network, loss, optimizer and batch.

A stage that trains the denoiser is compared by the network without control blocks at one noise
level per clip, which is what diffusers has, and an autoencoder by whole clips. Both sides use
AdamW with the stage's settings. PyTorch runs afterwards, in its own process
(`scripts/torch_training.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import worlds
from matrix_jax.benchmark import measure, pages, torch_baseline
from matrix_jax.config import UsageError
from matrix_jax.dit import cogvideox as dit
from matrix_jax.evals.markdown import table
from matrix_jax.parallel import compilation
from matrix_jax.train import dry_run
from matrix_jax.train.denoise import Denoising, denoise_loss
from matrix_jax.train.optim import Optimizer, make
from matrix_jax.train.stage import latent_size
from matrix_jax.train.vae import Autoencode
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion, diffusers_layout

SCRIPT = 'matrix_jax.benchmark.scripts.torch_training'
COMPARED = 3  # updates whose losses are compared


def check(run) -> str:
    """Returns what trains, 'dit' or 'vae'.

    Raises:
      UsageError: PyTorch cannot do the same.
    """
    stage = run.stage
    kind = 'dit' if isinstance(stage, Denoising) else 'vae' if type(stage) is Autoencode else None
    if kind is None or getattr(stage, 'crop', ()) or getattr(stage, 'rare', 0):
        raise UsageError(
            f'--train: got {run.name}, expected a recipe whose stage trains a denoiser, or an '
            'autoencoder on whole frames'
        )
    torch_baseline.check(run.name, run.world)
    if getattr(run.world, kind).dtype != 'float32':
        raise UsageError(
            f'--train: got world.{kind}.dtype {getattr(run.world, kind).dtype}, expected float32'
        )
    return kind


def run(run, settings: measure.Settings) -> dict[str, Any]:
    """Measures an update on both sides.

    Returns:
      'kind', 'samples' per update, 'flops' per update, 'ceiling' in FLOP/s, 'ours' and 'torch'
      (both 'p50_ms', 'mean_ms', 'memory' in bytes and 'losses' of the first updates), and 'about'
      (versions and threads).
    """
    kind = check(run)
    world = worlds.build(run.world)
    params = world.init(settings.seed, zero_init=False, only=('transformer', 'vae'))
    plain = {'kind': 'adamw', 'schedule': 'constant', 'warmup': 0}
    optimizer = dataclasses.replace(run.stage.optimizer, **plain)
    given = batch(world, run.stage, kind, run.train.batch, settings.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg, weights = export(world, params, kind, folder)
        np.savez(folder / 'given.npz', **given)
        loss = denoiser_loss(world, cfg) if kind == 'dit' else autoencoder_loss(world, run.stage)
        found = ours(loss, weights, given, optimizer, settings)
        spec = {
            'kind': kind,
            'steps': settings.steps,
            'warmup': max(settings.warmup, COMPARED),
            'compared': COMPARED,
            'threads': len(os.sched_getaffinity(0)),
            'patch': world.cfg.vae.patch_size,
            'optimizer': dataclasses.asdict(optimizer),
            'stage': dataclasses.asdict(run.stage) if kind == 'vae' else {},
        }
        (folder / 'spec.json').write_text(json.dumps(spec, default=str))
        command = [sys.executable, '-m', SCRIPT, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            raise UsageError(
                f'--vs torch: the PyTorch process ended with exit code {done.returncode} ({reason})'
            )
        theirs = json.loads((folder / 'results.json').read_text())
    ceilings = measure.ceilings(world.cfg.dit.dtype, world.cfg.vae.dtype)
    return {
        'recipe': run.name,
        'kind': kind,
        'samples': run.train.batch,
        'ceiling': ceilings['matmul' if kind == 'dit' else 'conv'],
        'about': theirs.pop('about'),
        'torch': theirs,
        **found,
    }


def batch(world, stage, kind: str, samples: int, seed: int) -> dict[str, np.ndarray]:
    """A random batch and its noise, as both sides read it."""
    chance, cfg = np.random.default_rng(seed), world.cfg
    if kind == 'vae':
        size = cfg.height, cfg.width
        frames = chance.uniform(-1, 1, (samples, stage.frames, *size, 3)).astype(np.float32)
        scale = cfg.vae.spatial_compression
        count = 1 + (stage.frames - 1) // cfg.vae.temporal_compression
        shape = samples, count, *(side // scale for side in size), cfg.vae.latent_channels
        return {'frames': frames, 'noise': chance.standard_normal(shape, np.float32)}
    shape = samples, max(stage.lengths(world)), *latent_size(cfg), cfg.dit.channels
    text = samples, cfg.dit.text_length, cfg.dit.text_dim
    levels = chance.integers(1, cfg.scheduler.train_steps - 1, samples).astype(np.int32)
    return {
        'latents': chance.standard_normal(shape, np.float32),
        'noise': chance.standard_normal(shape, np.float32),
        'text': chance.standard_normal(text, np.float32),
        'levels': levels,
        'signal': np.asarray(world.schedule.signal)[levels],
        'sigma': np.asarray(world.schedule.sigma)[levels],
    }


def export(world, params, kind: str, folder: Path) -> tuple[Any, Any]:
    """Writes the network for PyTorch -> (its config, its parameters)."""
    if kind == 'dit':
        return torch_baseline.export(types.SimpleNamespace(world=world, params=params), folder)
    tensors = conversion.to_torch(world.tables['vae'], params['vae'])
    released = world.cfg.vae.to_released()
    diffusers_layout.write_component(folder, 'vae', released, tensors, dtype=None)
    return world.cfg.vae, params['vae']


def denoiser_loss(world, cfg):
    """`loss(params, batch)` of `train.denoise` at one level per clip."""
    net = dit.CogVideoXTransformer(cfg)

    def loss(params, given):
        frames = given['latents'].shape[1]
        levels = jnp.broadcast_to(given['levels'][:, None], (len(given['levels']), frames))

        def denoise(noisy, levels):
            return net.apply({'params': params}, noisy, given['text'], levels[:, 0])

        return denoise_loss(
            world.schedule, denoise, given['latents'], given['noise'], levels, jnp.ones(frames)
        )[0]

    return loss


def autoencoder_loss(world, stage):
    """`loss(params, batch)` of `train.vae`, with whole clips decoded."""
    cfg = world.cfg.vae

    def loss(params, given):
        mean, logvar = vae.encode(cfg, params, given['frames'])
        made = vae.decode(cfg, params, vae.sample(mean, logvar, given['noise']))
        error = made - given['frames'][:, -made.shape[1] :]
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return (
            stage.absolute * jnp.abs(error).mean()
            + stage.square * jnp.square(error).mean()
            + stage.edges * edges
            + stage.kl * kl
        )

    return loss


def ours(loss, params, given, optimizer: Optimizer, settings: measure.Settings) -> dict[str, Any]:
    """Our side -> 'ours' and 'flops' of `run`."""
    before = resident()
    flat = conversion.flatten(jax.tree.map(jnp.asarray, params))
    tx = make(optimizer, settings.steps, {})

    def update(state, given):
        flat, opt = state
        value, grads = jax.value_and_grad(lambda flat: loss(conversion.unflatten(flat), given))(
            flat
        )
        changes, opt = tx.update(grads, opt, flat)
        return (jax.tree.map(jnp.add, flat, changes), opt), value

    state, given = (flat, tx.init(flat)), jax.tree.map(jnp.asarray, given)
    flops = dry_run.flops(update, state, given)
    step = compilation.jit(update, donate_argnums=0).lower(state, given).compile()
    seconds, losses, warmup = [], [], max(settings.warmup, COMPARED)
    for index in range(warmup + settings.steps):
        if index == warmup:
            reset_peak()
        began = time.perf_counter()
        state, value = step(state, given)
        losses.append(float(value))
        seconds.append(time.perf_counter() - began)
    return {
        'flops': flops,
        'ours': measure.spread(np.asarray(seconds[warmup:]))
        | {'memory': peak() - before, 'losses': losses[:COMPARED]},
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return _status('VmRSS')


def peak() -> int:
    """The most bytes of this process in memory since `reset_peak`."""
    return _status('VmHWM')


def reset_peak() -> None:
    """Lets `peak` begin anew."""
    Path('/proc/self/clear_refs').write_text('5')


def _status(name: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f'{name}:')).split()[1])


def page(results: dict[str, Any]) -> str:
    """The page of `run`."""
    mine, theirs, samples = results['ours'], results['torch'], results['samples']
    about, flops = results['about'], results['flops']
    rows = []
    for label, ours, torch, digits in (
        ('samples/s', *(1e3 * samples / one['mean_ms'] for one in (mine, theirs)), 3),
        ('update, p50 ms', mine['p50_ms'], theirs['p50_ms'], 1),
        ('memory, MiB', mine['memory'] / pages.MIB, theirs['memory'] / pages.MIB, 0),
        ('TFLOP/s', *(1e3 * flops / one['mean_ms'] / pages.TERA for one in (mine, theirs)), 4),
    ):
        rows.append([label, f'{ours:.{digits}f}', f'{torch:.{digits}f}', f'{ours / torch:.2f}'])
    share = 1e3 * flops / mine['mean_ms'] / results['ceiling']
    what = 'DiT without control blocks' if results['kind'] == 'dit' else 'autoencoder, whole clips'
    difference = max(
        abs(one / other - 1) for one, other in zip(mine['losses'], theirs['losses'], strict=True)
    )
    lines = [
        f'# {results["recipe"]}: an update in JAX and in PyTorch',
        '',
        f'{what}, batch {samples}, AdamW, float32, {about["threads"]} threads; torch '
        f'{about["torch"]}, diffusers {about["diffusers"]}.',
        '',
        *table(['', 'ours', 'torch', 'ratio'], rows),
        f'- FLOPs of an update: {flops / 1e9:.2f} GFLOP; ours reaches {share:.1%} of the fastest '
        f'{"product" if results["kind"] == "dit" else "convolution"} here '
        f'({results["ceiling"] / 1e9:.1f} GFLOP/s)',
        f'- largest relative difference of the first {COMPARED} losses: {difference:.1e}',
        '- memory: the most while updating, less what the process had before the network',
    ]
    return '\n'.join(lines) + '\n'
