"""Writes adapters with peft and diffusers, and the weights that these make of them.

    python tests/goldens/lora/record.py      # needs torch, peft and diffusers; the tests do not

The adapted weights are zero, so what is recorded is the update alone: scale * B A.
"""

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
TARGETS = ['to_q', 'to_k', 'to_v', 'to_out.0']
SETTINGS = dict(
    r=2, lora_alpha=5, target_modules=TARGETS, alpha_pattern={'transformer_blocks.2.attn1.to_v': 3}
)


def base():
    """The network of `dit.PRESETS['tiny']` without control, its attention zero."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        time_embed_dim=24,
        text_embed_dim=20,
        max_text_seq_length=7,
        sample_width=12,
        sample_height=8,
        sample_frames=17,
    )
    for name, weight in model.named_parameters():
        if '.attn1.to_' in name:
            torch.nn.init.zeros_(weight)
    return model


def drawn(model):
    """The model with random B, which starts as zero."""
    for name, weight in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight)
    return model


def record(folder, model):
    """The updated weights, under the names of the network."""
    weights = {
        name.replace('base_layer.', ''): weight.contiguous()
        for name, weight in model.state_dict().items()
        if '.attn1.to_' in name and name.endswith('weight') and 'lora_' not in name
    }
    save_file(weights, folder / 'merged.safetensors')


def main():
    torch.manual_seed(0)
    model = drawn(get_peft_model(base(), LoraConfig(use_rslora=True, **SETTINGS)))
    model.save_pretrained(HERE / 'peft')
    (HERE / 'peft' / 'README.md').unlink()
    record(HERE / 'peft', model.merge_and_unload())

    model = base()
    model.add_adapter(LoraConfig(rank_pattern={'transformer_blocks.1.attn1.to_q': 1}, **SETTINGS))
    drawn(model).save_lora_adapter(HERE / 'diffusers')
    model.fuse_lora()
    record(HERE / 'diffusers', model)


if __name__ == '__main__':
    main()
