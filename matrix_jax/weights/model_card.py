"""The README.md of a weights folder, a model card with the metadata that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(folder: Path, name: str, index: Mapping[str, Any], reads_text: bool) -> None:
    """Writes a model card, unless the folder has one.

    Args:
      folder: weights folder.
      name: name of the world.
      index: its model_index.json.
      reads_text: whether the world reads a prompt.
    """
    path = folder / 'README.md'
    if path.exists():
        return
    in_diffusers = index['_class_name'] != name
    task = 'text-to-video' if reads_text else 'image-to-video'
    use = (
        f'from diffusers import {index["_class_name"]}\n\n'
        f"pipeline = {index['_class_name']}.from_pretrained('.')"
        if in_diffusers
        else "from matrix_jax import load\n\nworld, params = load(RECIPE, weights='.')"
    )
    parts = '\n'.join(
        f'- `{part}`: {value[1]}' for part, value in index.items() if isinstance(value, list)
    )
    path.write_text(
        f"""---
library_name: {'diffusers' if in_diffusers else 'matrix_jax'}
pipeline_tag: {task}
tags:
- jax
- world-model
- {name}
---

# {name}

Weights of an interactive world model, written by matrix_jax.

{parts}

```python
{use}
```
""",
        encoding='utf-8',
    )
