"""The Wan DiT of diffusers, `WanTransformer3DModel`: keys of its config.

Folders of FastVideo have the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matrix_jax.weights.conversion import config_faults

# Key in diffusers -> key of the published config.
KEYS = {
    'num_layers': 'num_layers',
    'ffn_dim': 'ffn_dim',
    'freq_dim': 'freq_dim',
    'in_channels': 'in_dim',
    'out_channels': 'out_dim',
    'text_dim': 'text_dim',
    'eps': 'eps',
    'num_attention_heads': 'num_heads',
    'patch_size': 'patch_size',
    'cross_attn_norm': 'cross_attn_norm',
    'image_dim': 'image_dim',
    # Not in diffusers: of FastVideo.
    'local_attn_size': 'local_attn_size',
    'sink_size': 'sink_size',
    'action_config': 'action_config',
    'text_len': 'text_len',
}
FIXED = {'qk_norm': 'rms_norm_across_heads'}
IGNORED = ('attention_head_dim', 'added_kv_proj_dim', 'rope_max_seq_len', 'pos_embed_seq_len')


def published(released: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with the keys of the published networks; others are left alone.

    Raises:
      ValueError: a key asks for an operation that the network does not have.
    """
    if 'attention_head_dim' not in released:
        return dict(released)
    if faults := config_faults(released, FIXED, (*KEYS, *IGNORED)):
        raise ValueError('transformer config: ' + '; '.join(faults))
    found = {ours: released[theirs] for theirs, ours in KEYS.items() if theirs in released}
    heads = released.get('num_attention_heads', 40)
    width = heads * released['attention_head_dim']
    kept = {key: value for key, value in released.items() if key.startswith('_')}
    return kept | found | {'dim': width, 'num_heads': heads}
