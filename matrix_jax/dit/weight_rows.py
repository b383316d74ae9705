"""Weight table rows of layers that several transformers share.

`torch` is the module name in the released state dict, `path` the path in the parameter tree and
`layers` the range of stacked layers.
"""

from __future__ import annotations

from matrix_jax.weights.conversion import Row


def attention_rows(torch, path, layers):
    """A modulated norm and an attention with head norms."""
    rows = adaln_rows(f'{torch}.norm1', f'{path}/norm1', layers)
    for theirs, ours in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value')):
        rows += linear_rows(f'{torch}.attn1.{theirs}', f'{path}/attention/{ours}', 'd', 'k', layers)
    rows += linear_rows(f'{torch}.attn1.to_out.0', f'{path}/attention/out', 'k', 'd', layers)
    rows += norm_rows(f'{torch}.attn1.norm_q', f'{path}/attention/query_norm', 'e', layers)
    rows += norm_rows(f'{torch}.attn1.norm_k', f'{path}/attention/key_norm', 'e', layers)
    return rows


def adaln_rows(torch, path, layers):
    """A norm and the linear layer that modulates it."""
    return linear_rows(f'{torch}.linear', f'{path}/linear', 'p', 'd', layers) + norm_rows(
        f'{torch}.norm', f'{path}/norm', 'd', layers
    )


def linear_rows(torch, path, inner, outer, layers=None):
    """Kernel and bias of a linear layer from axis letter `inner` to `outer`."""
    return [
        Row(f'{torch}.weight', f'{path}/kernel', f'{outer} {inner} -> {inner} {outer}', layers),
        Row(f'{torch}.bias', f'{path}/bias', f'{outer} -> {outer}', layers),
    ]


def norm_rows(torch, path, letter, layers=None):
    """Scale and bias of a norm over the axis letter `letter`."""
    return [
        Row(f'{torch}.weight', f'{path}/scale', f'{letter} -> {letter}', layers),
        Row(f'{torch}.bias', f'{path}/bias', f'{letter} -> {letter}', layers),
    ]
