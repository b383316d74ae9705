"""Names of the weights of the Wan autoencoders in diffusers, `AutoencoderKLWan`.

Files of pruned decoders (`MG-LightVAE.pth`) have the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

from matrix_jax.vae.wan_config import Config
from matrix_jax.weights.conversion import Drop, Rename

COMMON = {
    'quant_conv': 'conv1',
    'post_quant_conv': 'conv2',
    '{half}.conv_in': '{half}.conv1',
    '{half}.norm_out': '{half}.head.0',
    '{half}.conv_out': '{half}.head.2',
    '{half}.mid_block.attentions.0.norm': '{half}.middle.1.norm',
    '{half}.mid_block.attentions.0.to_qkv': '{half}.middle.1.to_qkv',
    '{half}.mid_block.attentions.0.proj': '{half}.middle.1.proj',
}
RESNET = {
    'norm1': 'residual.0',
    'conv1': 'residual.2',
    'norm2': 'residual.3',
    'conv2': 'residual.6',
    'conv_shortcut': 'shortcut',
}


def names(cfg: Config) -> tuple[Rename | Drop, ...]:
    """Returns the names of a network of either version."""
    return (
        *(Rename(f'{theirs}.{{leaf}}', f'{ours}.{{leaf}}') for theirs, ours in _pairs(cfg)),
        Drop('dynamic_feature_projection_heads.*', why='heads that only training used'),
    )


def _pairs(cfg: Config) -> Iterator[tuple[str, str]]:
    yield from COMMON.items()
    yield from _resnet('{half}.mid_block.resnets.0', '{half}.middle.0')
    yield from _resnet('{half}.mid_block.resnets.1', '{half}.middle.2')
    if cfg.residual:  # 2.2
        down, up = 'encoder.downsamples.{i}.downsamples', 'decoder.upsamples.{i}.upsamples'
        yield from _resnet('encoder.down_blocks.{i}.resnets.{j}', f'{down}.{{j}}')
        yield from _resnet('decoder.up_blocks.{i}.resnets.{j}', f'{up}.{{j}}')
        yield from _resample('encoder.down_blocks.{i}.downsampler', f'{down}.{cfg.layers}')
        yield from _resample('decoder.up_blocks.{i}.upsampler', f'{up}.{cfg.layers + 1}')
        return
    yield from _resnet('encoder.down_blocks.{i}', 'encoder.downsamples.{i}')
    yield from _resample('encoder.down_blocks.{i}', 'encoder.downsamples.{i}')
    for level in range(cfg.levels):
        theirs, first = f'decoder.up_blocks.{level}', level * (cfg.layers + 2)
        for layer in range(cfg.layers + 1):
            ours = f'decoder.upsamples.{first + layer}'
            yield from _resnet(f'{theirs}.resnets.{layer}', ours)
        ours = f'decoder.upsamples.{first + cfg.layers + 1}'
        yield from _resample(f'{theirs}.upsamplers.0', ours)


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for part, own in RESNET.items():
        yield f'{theirs}.{part}', f'{ours}.{own}'


def _resample(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for part in ('resample.1', 'time_conv'):
        yield f'{theirs}.{part}', f'{ours}.{part}'
