"""Weight table rows that the Wan transformers share, and the names of diffusers for them."""

from __future__ import annotations

from matrix_jax.dit.wan_actions import action_rows
from matrix_jax.dit.wan_config import ACTING
from matrix_jax.dit.weight_rows import linear_rows, norm_rows
from matrix_jax.weights.conversion import Prefix, Rename, Row


def trunk_rows(cfg, context: str) -> list[Row | Prefix]:
    """Rows of a network without the embedding of its context.

    Args:
      cfg: sizes, `wan.Config` or `wan_memory.Config`.
      context: what the second attention of a block reads, 'image' or 'text'.
    """
    patch = dict(t=1, p=cfg.patch, q=cfg.patch)
    rows = [
        Prefix('model.'),
        Row('patch_embedding.weight', 'patch/kernel', 'd c t p q -> (t p q c) d', sizes=patch),
        Row('patch_embedding.bias', 'patch/bias', 'd -> d'),
        *linear_rows('time_embedding.0', 'time_embedding/linear_1', 'i', 'o'),
        *linear_rows('time_embedding.2', 'time_embedding/linear_2', 'd', 'o'),
        *linear_rows('time_projection.1', 'time_projection', 'd', 'o'),
        Row('head.modulation', 'modulation_out', '1 c d -> c d'),
        *linear_rows('head.head', 'out', 'd', 'o'),
    ]
    for path, layers in cfg.segments.items():
        torch = 'blocks.{i}'
        rows += [Row(f'{torch}.modulation', f'{path}/modulation', '1 c d -> c d', layers)]
        rows += projection_rows(f'{torch}.self_attn', f'{path}/attention', layers)
        rows += norm_rows(f'{torch}.norm3', f'{path}/{context}_norm', 'd', layers)
        rows += projection_rows(f'{torch}.cross_attn', f'{path}/{context}_attention', layers)
        rows += linear_rows(f'{torch}.ffn.0', f'{path}/up', 'd', 'm', layers)
        rows += linear_rows(f'{torch}.ffn.2', f'{path}/down', 'm', 'd', layers)
        if path.startswith(ACTING):
            rows += action_rows(cfg.actions, f'{torch}.action_model', f'{path}/actions', layers)
    return rows


def projection_rows(torch, path, layers):
    """Rows of `wan_layers.Projections`."""
    rows = []
    for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value')):
        rows += linear_rows(f'{torch}.{theirs}', f'{path}/{ours}', 'd', 'k', layers)
    rows += linear_rows(f'{torch}.o', f'{path}/out', 'k', 'd', layers)
    return rows + [
        Row(f'{torch}.norm_{theirs}.weight', f'{path}/{ours}_norm/scale', 'k -> k', layers)
        for theirs, ours in (('q', 'query'), ('k', 'key'))
    ]


def diffusers_names() -> tuple[Rename, ...]:
    """Names of the same tensors in diffusers (`WanTransformer3DModel`)."""
    embedders, block = 'condition_embedder.{part}_embedder', 'blocks.{i}'
    names = {
        f'{embedders}.linear_1': '{part}_embedding.0',
        f'{embedders}.linear_2': '{part}_embedding.2',
        'condition_embedder.time_proj': 'time_projection.1',
        'condition_embedder.image_embedder.norm1': 'img_emb.proj.0',
        'condition_embedder.image_embedder.ff.net.0.proj': 'img_emb.proj.1',
        'condition_embedder.image_embedder.ff.net.2': 'img_emb.proj.3',
        'condition_embedder.image_embedder.norm2': 'img_emb.proj.4',
        'patch_embedding.proj': 'patch_embedding',  # in folders of FastVideo
        'proj_out': 'head.head',
        f'{block}.norm2': f'{block}.norm3',
        f'{block}.ffn.net.0.proj': f'{block}.ffn.0',
        f'{block}.ffn.net.2': f'{block}.ffn.2',
    }
    for theirs, ours in (('attn1', 'self_attn'), ('attn2', 'cross_attn')):
        names |= {f'{block}.{theirs}.to_{part}': f'{block}.{ours}.{part}' for part in 'qkv'}
        names |= {f'{block}.{theirs}.to_out.0': f'{block}.{ours}.o'}
        names |= {f'{block}.{theirs}.norm_{part}': f'{block}.{ours}.norm_{part}' for part in 'qk'}
    return (
        Rename('scale_shift_table', 'head.modulation'),
        Rename(f'{block}.scale_shift_table', f'{block}.modulation'),
        *(Rename(theirs + '.{leaf}', ours + '.{leaf}') for theirs, ours in names.items()),
    )
