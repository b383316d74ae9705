"""The PyTorch side of `matrix-jax benchmark --train --vs torch`, which calls it.

    python -m matrix_jax.benchmark.scripts.torch_training FOLDER

FOLDER holds transformer/ or vae/ in the diffusers layout, spec.json (what to run) and given.npz
(the batch). Writes results.json into it.
"""

import json
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

from matrix_jax.benchmark.scripts.torch_cogvideox import network, pixels, tensors


def status(name):
    """A value of this process in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f'{name}:')).split()[1])


def autoencoder(folder, patch):
    """The autoencoder for `patch` x `patch` pixels per input and output."""
    config = json.loads((folder / 'config.json').read_text())
    config = {
        name: value
        for name, value in config.items()
        if name not in ('patch_size', 'single_latent_frames')
    }
    more = {name: config[name] * patch**2 for name in ('in_channels', 'out_channels')}
    net = diffusers.AutoencoderKLCogVideoX.from_config(config | more)
    net.load_state_dict(tensors(folder))
    return net


def denoiser_loss(net, given):
    """The loss of the x0 estimate, weighted by the noise level."""
    latents, noise = (given[name].permute(0, 1, 4, 2, 3) for name in ('latents', 'noise'))
    signal, sigma = (given[name][:, None, None, None, None] for name in ('signal', 'sigma'))
    noisy = signal * latents + sigma * noise
    v = net(noisy, given['text'], given['levels'], return_dict=False)[0]
    x0 = signal * noisy - sigma * v
    return ((x0 - latents) ** 2 / sigma**2).mean()


def autoencoder_loss(net, given, spec):
    """Reconstruction, gradients of the error and KL divergence."""
    stage, patch, frames = spec['stage'], spec['patch'], given['frames']
    batch, count, height, width, channels = frames.shape
    split = frames.view(batch, count, height // patch, patch, width // patch, patch, channels)
    split = split.permute(0, 3, 5, 6, 1, 2, 4).reshape(
        batch, patch**2 * channels, count, height // patch, width // patch
    )
    mean, logvar = net.encoder(split)[0].chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * logvar) * given['noise'].permute(0, 4, 1, 2, 3)
    made = pixels(net.decoder(latents)[0], patch)
    error = made - frames[:, -made.shape[1] :]
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (
        stage['absolute'] * error.abs().mean()
        + stage['square'] * (error**2).mean()
        + stage['edges'] * edges
        + stage['kl'] * kl
    )


def main(folder):
    spec, before = json.loads((folder / 'spec.json').read_text()), status('VmRSS')
    torch.set_num_threads(spec['threads'])
    with np.load(folder / 'given.npz') as arrays:
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if spec['kind'] == 'dit':
        net = network(folder / 'transformer', torch.float32, 'cpu')
        loss = lambda: denoiser_loss(net, given)  # noqa: E731
    else:
        net = autoencoder(folder / 'vae', spec['patch'])
        loss = lambda: autoencoder_loss(net, given, spec)  # noqa: E731
    net.train()
    cfg, weights = spec['optimizer'], list(net.parameters())
    optimizer = torch.optim.AdamW(
        weights,
        lr=cfg['learning_rate'],
        betas=(cfg['b1'], cfg['b2']),
        eps=cfg['eps'],
        weight_decay=cfg['weight_decay'],
    )
    seconds, losses = [], []
    for index in range(spec['warmup'] + spec['steps']):
        if index == spec['warmup']:
            Path('/proc/self/clear_refs').write_text('5')
        began = time.perf_counter()
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg['clip'])
        optimizer.step()
        losses.append(value.item())
        seconds.append(time.perf_counter() - began)
    seconds = np.asarray(seconds[spec['warmup'] :])
    results = {
        'p50_ms': 1e3 * np.median(seconds),
        'p95_ms': 1e3 * np.quantile(seconds, 0.95),
        'mean_ms': 1e3 * seconds.mean(),
        'memory': status('VmHWM') - before,
        'losses': losses[: spec['compared']],
        'about': {
            'torch': torch.__version__,
            'diffusers': diffusers.__version__,
            'threads': torch.get_num_threads(),
        },
    }
    (folder / 'results.json').write_text(json.dumps(results))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
