"""Writes recordings of Wan 2.2 in diffusers: transformer and autoencoder, with random weights.

python tests/goldens/wan_2_2/record.py      # needs torch and diffusers; the tests do not
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
TRANSFORMER = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
AUTOENCODER = dict(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.5, 0.5, 1.0, 2.0],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
)


def drawn(model):
    """The model with every parameter random, so that each one matters."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.endswith('gamma'):
            torch.nn.init.normal_(weight, std=(weight[0].numel() + 1) ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=float('norm' in name), std=0.2)
    return model.eval()


def write(name, kind, model, inputs, outputs, **config):
    tensors = {f'weights/{key}': value for key, value in model.state_dict().items()}
    tensors |= {f'inputs/{key}': value for key, value in inputs.items()}
    tensors |= {f'outputs/{key}': value for key, value in outputs.items()}
    config['model'] = json.loads(model.to_json_string())
    save_file(
        {key: value.detach().contiguous() for key, value in tensors.items()},
        HERE / f'{name}.safetensors',
        metadata={
            'system': 'matrix_game_3',
            'kind': kind,
            'case': name,
            'config': json.dumps(config),
            'rtol': '1e-4',
            'atol': '1e-4',
        },
    )


@torch.no_grad()
def transformer():
    """A clip whose first frame is clean: each token has its own level."""
    model = drawn(WanTransformer3DModel(**TRANSFORMER))
    x, text = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 512, 10)
    text[:, 5:] = 0
    level = torch.tensor([[0.0] * 6 + [713.0] * 12])  # frames of 2 x 3 tokens
    v = model(x, level, text, return_dict=False)[0]
    inputs = {'x': x, 't': level, 'context': text[0, :5]}
    write('transformer', 'dit', model, inputs, {'out': v})


@torch.no_grad()
def autoencoder():
    """Scaled latents of a clip, and frames of other latents."""
    model = drawn(AutoencoderKLWan(**AUTOENCODER))
    video, z = torch.rand(1, 3, 9, 16, 24) * 2 - 1, torch.randn(1, 4, 3, 2, 3)
    means, stds = (
        torch.tensor(AUTOENCODER[f'latents_{name}']).view(1, -1, 1, 1, 1)
        for name in ('mean', 'std')
    )
    latent = (model.encode(video).latent_dist.mode() - means) / stds
    frames = model.decode(z * stds + means, return_dict=False)[0]
    write(
        'autoencoder',
        'autoencoder_kl_wan',
        model,
        {'video': video, 'z': z},
        {'latent': latent, 'frames': frames},
    )


if __name__ == '__main__':
    torch.manual_seed(0)
    transformer()
    autoencoder()
