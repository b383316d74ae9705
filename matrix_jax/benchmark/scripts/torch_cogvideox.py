"""The PyTorch side of `matrix-jax benchmark --vs torch`, which calls it: diffusers' CogVideoX.

    python -m matrix_jax.benchmark.scripts.torch_cogvideox FOLDER

FOLDER holds transformer/ and vae/ in the diffusers layout, spec.json (what to run) and given.npz
(inputs whose outputs are compared). Writes results.json and made.npz into it.
"""

import json
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

LACKS = [
    'control blocks: end to end it computes less than ours',
    'per-frame noise levels: it runs at one level per clip',
]
PAIRS = 'one-by-one decoding of latent frames: it decodes two of them every second shift'


def network(folder, dtype, device):
    """Transformer with strictly loaded weights."""
    config = json.loads((folder / 'config.json').read_text())
    net = diffusers.CogVideoXTransformer3DModel.from_config(config)
    net.load_state_dict(tensors(folder))
    return net.to(device, dtype).eval()


def decoder(folder, patch, dtype, device):
    """Decoder of the autoencoder, for `patch` x `patch` pixels per output."""
    config = json.loads((folder / 'config.json').read_text())
    config = {
        name: value
        for name, value in config.items()
        if name not in ('patch_size', 'single_latent_frames')
    }
    channels = config['out_channels'] * patch**2
    net = diffusers.AutoencoderKLCogVideoX.from_config(
        config | {'in_channels': channels, 'out_channels': channels}
    ).decoder
    net.load_state_dict(
        {name.removeprefix('decoder.'): value for name, value in tensors(folder).items()}
    )
    return net.to(device, dtype).eval()


def tensors(folder):
    return {
        name: value
        for path in sorted(folder.glob('*.safetensors'))
        for name, value in load_file(path).items()
    }


def pixels(frames, patch):
    """[B C F H W] -> [B F H W 3]."""
    batch, channels, count, height, width = frames.shape
    split = frames.view(batch, patch, patch, channels // patch**2, count, height, width)
    return split.permute(0, 4, 5, 1, 6, 2, 3).reshape(
        batch, count, height * patch, width * patch, -1
    )


class TorchNetworks:
    """The networks, called on the schedule of our stream with equally cheap arithmetic between."""

    def __init__(self, folder, spec):
        self.spec, self.device = spec, torch.device(spec['device'])
        kinds = [getattr(torch, spec[name]) for name in ('dit_dtype', 'vae_dtype')]
        self.net = network(folder / 'transformer', kinds[0], self.device)
        self.decoder = decoder(folder / 'vae', spec['patch'], kinds[1], self.device)
        self.kinds = kinds

    def tensor(self, array, kind):
        """Array -> tensor on the device."""
        return torch.from_numpy(array).to(self.device, kind)

    def denoise(self, x, text, level):
        """Prediction for latents [B T C H W]."""
        levels = torch.full([len(x)], level, device=self.device)
        return self.net(x, text, levels, return_dict=False)[0]

    def shift(self, x, text):
        """Makes one shift of the window -> (window, popped latents)."""
        context, size, level = (self.spec[n] for n in ('context', 'group_frames', 'level'))
        windows = self.spec['windows']  # of each call, those of the guidance included
        for _ in range(self.spec['calls']):
            v, *others = self.denoise(
                torch.cat([x] * windows), torch.cat([text] * windows), level
            ).chunk(windows)
            for other in others:
                v = v + 6 * (other - v)
            graded = 0.9 * x[:, context:] - 0.1 * v[:, context:]
            x = torch.cat([x[:, :context], graded], dim=1)
        popped, rest = graded[:, :size], graded[:, size:]
        condition = torch.cat([x[:, :context], popped], dim=1)[:, -context:]
        return torch.cat([condition, rest, torch.randn_like(popped)], dim=1), popped

    def decode(self, latents, cache):
        """Decodes latents [B T C H W] -> (uint8 frames on the host, cache)."""
        made, cache = self.decoder(latents.transpose(1, 2).to(self.kinds[1]), conv_cache=cache)
        frames = pixels(made.float(), self.spec['patch'])
        return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8), cache


def stream(nets, x, text, decode=True, denoise=True):
    """Seconds between shifts [steps]; the decoder waits for an even number of latents."""
    spec, stamps, pending, cache, waiting = nets.spec, [], [], None, None
    popped = x[:, : spec['group_frames']]
    for _ in range(spec['warmup'] + spec['steps'] + 1):
        if denoise:
            x, popped = nets.shift(x, text)
        if decode:
            pending.append(popped)
            if sum(part.shape[1] for part in pending) % 2 == 0:
                waiting, cache = nets.decode(torch.cat(pending, dim=1), cache)
                pending = []
                waiting = waiting.cpu().numpy()
        elif spec['device'] == 'cuda':
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    return np.diff(stamps)[-spec['steps'] :]


def main(folder):
    spec = json.loads((folder / 'spec.json').read_text())
    if spec['group_frames'] % 2:
        spec['steps'] += spec['steps'] % 2  # whole pairs
    torch.set_num_threads(spec['threads'])
    torch.manual_seed(0)
    nets, given = TorchNetworks(folder, spec), np.load(folder / 'given.npz')
    with torch.inference_mode():
        x = nets.tensor(given['latents'], nets.kinds[0]).permute(0, 1, 4, 2, 3).contiguous()
        text = nets.tensor(given['text'], nets.kinds[0])
        clip = nets.tensor(given['clip'], nets.kinds[1]).permute(0, 4, 1, 2, 3)
        made = {
            'dit': nets.denoise(x, text, spec['level']).permute(0, 1, 3, 4, 2),
            'vae': pixels(nets.decoder(clip)[0].float(), spec['patch']),
        }
        np.savez(folder / 'made.npz', **{n: one.float().cpu().numpy() for n, one in made.items()})
        calls = []
        for _ in range(spec['warmup'] + spec['steps']):
            began = time.perf_counter()
            nets.denoise(x, text, spec['level']).cpu()
            calls.append(time.perf_counter() - began)
        calls = np.asarray(calls[spec['warmup'] :])
        found = {
            'end_to_end': stream(nets, x, text),
            'dit': stream(nets, x, text, decode=False),
            'vae': stream(nets, x, text, denoise=False),
        }
    frames = spec['group_frames'] * spec['frames_per_latent']
    results = {
        name: {
            'fps': frames / seconds.mean(),
            'mean_ms': 1e3 * seconds.mean(),
            'p50_ms': 1e3 * np.median(seconds),
            'p95_ms': 1e3 * np.quantile(seconds, 0.95),
        }
        for name, seconds in found.items()
    }
    results |= {
        'dit_call': {'p50_ms': 1e3 * np.median(calls), 'mean_ms': 1e3 * calls.mean()},
        'torch': torch.__version__,
        'diffusers': diffusers.__version__,
        'threads': torch.get_num_threads(),
        'device': spec['device'],
        'lacks': LACKS + [PAIRS] * (spec['group_frames'] % 2),
    }
    (folder / 'results.json').write_text(json.dumps(results))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
