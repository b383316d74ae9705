"""The same network in PyTorch: diffusers' CogVideoX under the same schedule of calls.

The peer gets our weights in the released layout and runs in a process of its own
(`scripts/torch_cogvideox.py`) after ours. Its transformer has no control blocks and one noise level
per clip, so for the comparison of the network alone ours runs without its control blocks as well,
and both outputs are compared; end to end ours runs whole and does more.
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

from matrix_jax.benchmark import measure, report
from matrix_jax.config import UsageError
from matrix_jax.dit import cogvideox as dit
from matrix_jax.parallel import compilation
from matrix_jax.vae import cogvideox as vae
from matrix_jax.weights import conversion, diffusers_layout

SCRIPT = Path(__file__).with_name('scripts') / 'torch_cogvideox.py'
LEVEL = 500  # noise level of the outputs that are compared
LATENTS = 2  # latent frames of the decoding that is compared


def check(name: str, cfg):
    """Raises UsageError where the peer cannot run, or has no such network."""
    if not isinstance(cfg.dit, dit.Config):
        raise UsageError(
            f'--vs torch: got {name}, expected a world of The Matrix (diffusers has '
            'the network of no other)'
        )
    if cfg.dit.int8 != 'none':
        raise UsageError(
            f'--vs torch: got int8 {cfg.dit.int8!r}, expected none, as the peer has no 8-bit layers'
        )
    lacking = [name for name in ('torch', 'diffusers') if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsageError(f"--vs torch: needs {' and '.join(lacking)}: pip install -e '.[parity]'")
    if not SCRIPT.is_file():
        raise UsageError(f'--vs torch: no {SCRIPT}; it comes with a checkout of the repository')


def run(target, settings: measure.Settings) -> dict:
    """Measures the network alone, then the peer.

    Returns:
      What the peer wrote, with 'plain_dit' (our network without control: milliseconds) and
      'difference' (part -> largest difference of the outputs over the largest output).
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cfg, plain = export(target, folder)
        given, wanted, seconds = imitate(target, cfg, plain, settings)
        np.savez(folder / 'given.npz', **given)
        spec = specify(target, cfg, settings)
        (folder / 'spec.json').write_text(json.dumps(spec))
        done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
            raise UsageError(
                f'--vs torch: the peer ended with exit code {done.returncode} ({reason})'
            )
        found = json.loads((folder / 'peer.json').read_text())
        with np.load(folder / 'made.npz') as made:
            found['difference'] = {
                name: float(np.abs(made[name] - wanted[name]).max() / np.abs(wanted[name]).max())
                for name in wanted
            }
    return found | {'plain_dit': measure.spread(seconds)}


def export(target, folder: Path):
    """Writes the network without control and the decoder -> (its config, its parameters)."""
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


def imitate(target, cfg, plain, settings: measure.Settings):
    """(inputs, outputs, seconds of our network alone) of what both sides compute."""
    world, chance = target.world, np.random.default_rng(settings.seed)
    shape = target.cond.latents.shape
    latents = chance.standard_normal((1, world.cfg.stream.frames, *shape[2:]), np.float32)
    text = chance.standard_normal((1, cfg.text_length, cfg.text_dim), np.float32)
    net = compilation.jit(lambda params, *given: dit.DiT(cfg).apply({'params': params}, *given))
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
    """What the peer is to run."""
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


def markdown(results: dict) -> str:
    """The comparison as a part of the page."""
    ours, peer = results['parts'], results['torch']
    rows = [
        [
            label,
            f'{ours[name]["fps"]:.2f}',
            f'{peer[name]["fps"]:.2f}',
            f'{ours[name]["fps"] / peer[name]["fps"]:.2f}',
        ]
        for name, label in (
            ('end_to_end', 'end to end, fps; ours with control blocks'),
            ('vae', 'VAE + uint8 + host copy, fps'),
        )
    ]
    mine, theirs = (1e3 / one['p50_ms'] for one in (peer['plain_dit'], peer['dit_call']))
    rows.append(
        [
            'the same DiT, calls/s; both without control',
            f'{mine:.3f}',
            f'{theirs:.3f}',
            f'{mine / theirs:.2f}',
        ]
    )
    difference = ', '.join(f'{name} {value:.1e}' for name, value in peer['difference'].items())
    return (
        '\n'.join(
            [
                '',
                f'## Against torch {peer["torch"]}, diffusers {peer["diffusers"]} '
                f'({peer["device"]}, {peer["threads"]} threads, scaled dot product attention)',
                '',
                *report.table(['', 'ours', 'torch', 'ratio'], rows),
                '',
                f'- largest difference of the outputs, relative: {difference}',
                *(f'- the peer lacks {what}' for what in peer['lacks']),
            ]
        )
        + '\n'
    )
