"""The same network in PyTorch: diffusers' CogVideoX with the same schedule of calls.

PyTorch reads our weights in the diffusers layout and runs afterwards in its own process
(`scripts/torch_cogvideox.py`). Its transformer has no control blocks and one noise level per clip.
The networks alone are therefore compared without our control blocks, outputs included; end to end
our network runs completely and computes more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import worlds
from matrix_jax.benchmark import measure
from matrix_jax.config import UsageError
from matrix_jax.dit import cogvideox as dit
from matrix_jax.parallel import compilation
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion, diffusers_layout

SCRIPT = Path(__file__).with_name('scripts') / 'torch_cogvideox.py'
LEVEL = 500  # noise level at which the outputs are compared
LATENTS = 2  # latent frames of the compared decoding


def check(name: str, cfg):
    """Raises UsageError if PyTorch lacks this network or cannot run here."""
    if not worlds.build(cfg).has_torch_baseline:
        raise UsageError(
            f'--vs torch: got {name}, expected a world of The Matrix (diffusers has '
            'the network of no other)'
        )
    if cfg.dit.int8 != 'none':
        raise UsageError(
            f'--vs torch: got int8 {cfg.dit.int8!r}, expected none, as PyTorch runs without '
            '8-bit layers'
        )
    lacking = [name for name in ('torch', 'diffusers') if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsageError(f"--vs torch: needs {' and '.join(lacking)}: pip install -e '.[parity]'")
    if not SCRIPT.is_file():
        raise UsageError(f'--vs torch: no {SCRIPT}')


def run(target, settings: measure.Settings) -> dict:
    """Measures our network alone, then PyTorch.

    Returns:
      results of the PyTorch process, with 'plain_dit' (milliseconds of our network without
      control blocks) and 'difference' (part -> largest difference of the outputs over the largest
      output).
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cfg, plain = export(target, folder)
        given, wanted, seconds = reference(target, cfg, plain, settings)
        np.savez(folder / 'given.npz', **given)
        spec = specify(target, cfg, settings)
        (folder / 'spec.json').write_text(json.dumps(spec))
        done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            raise UsageError(
                f'--vs torch: the PyTorch process ended with exit code {done.returncode} ({reason})'
            )
        found = json.loads((folder / 'results.json').read_text())
        with np.load(folder / 'made.npz') as made:
            found['difference'] = {
                name: float(np.abs(made[name] - wanted[name]).max() / np.abs(wanted[name]).max())
                for name in wanted
            }
    return found | {'plain_dit': measure.spread(seconds)}


def export(target, folder: Path):
    """Writes the network without control blocks and the decoder -> (its config, its parameters)."""
    world, params = target.world, jax.tree.map(np.asarray, target.params)
    cfg = dataclasses.replace(world.cfg.dit, control=None)
    tensors = {
        name: value
        for name, value in conversion.to_torch(
            world.tables['transformer'], params['transformer']
        ).items()
        if 'control' not in name
    }
    diffusers_layout.write_component(folder, 'transformer', cfg.to_released(), tensors, dtype=None)
    rows = [row for row in world.tables['vae'] if row.path.startswith('decoder/')]
    decoder = conversion.to_torch(rows, {'decoder': params['vae']['decoder']})
    diffusers_layout.write_component(
        folder, 'vae', world.cfg.vae.to_released(), decoder, dtype=None
    )
    return cfg, conversion.to_jax(dit.weights(cfg), tensors, dit.shapes(cfg))


def reference(target, cfg, plain, settings: measure.Settings):
    """Runs what both sides compute -> (inputs, outputs, seconds of our network alone)."""
    world, chance = target.world, np.random.default_rng(settings.seed)
    shape = target.cond.latents.shape
    latents = chance.standard_normal((1, world.cfg.stream.frames, *shape[2:]), np.float32)
    text = chance.standard_normal((1, cfg.text_length, cfg.text_dim), np.float32)
    net = compilation.jit(
        lambda params, *given: dit.CogVideoXTransformer(cfg).apply({'params': params}, *given)
    )
    given = (jax.device_put(plain), latents, text, jnp.full([1], LEVEL))
    net = net.lower(*given).compile()
    seconds = []
    for _ in range(settings.warmup + settings.steps):
        began = time.perf_counter()
        made = np.asarray(net(*given))
        seconds.append(time.perf_counter() - began)
    clip = latents[:, :LATENTS]
    frames = compilation.jit(lambda params, clip: vae.decode(world.cfg.vae, params, clip))(
        target.params['vae'], clip
    )
    return (
        {'latents': latents, 'text': text, 'clip': clip},
        {'dit': made, 'vae': np.asarray(frames, np.float32)},
        np.asarray(seconds[settings.warmup :]),
    )


def specify(target, cfg, settings: measure.Settings) -> dict:
    """Instructions for the PyTorch process."""
    world = target.world
    stream, net = world.cfg.stream, world.cfg.vae
    calls = stream.steps // stream.groups
    return {
        'steps': settings.steps,
        'warmup': settings.warmup,
        'level': LEVEL,
        'calls': calls,
        'windows': stream.passes // calls,
        'context': stream.context,
        'group_frames': stream.group_frames,
        'frames_per_latent': world.cfg.frames_per_control,
        'patch': net.patch_size,
        'dit_dtype': cfg.dtype,
        'vae_dtype': net.dtype,
        'device': 'cuda' if jax.default_backend() == 'gpu' else 'cpu',
        'threads': len(os.sched_getaffinity(0)),
    }
