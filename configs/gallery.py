"""Gallery, coloured rooms to walk in, with the networks of `doom`: 96x160 at 16 fps.

    matrix-jax collect vizdoom --out data/gallery --hours 10 --themes gallery
    matrix-jax train gallery:VAE        --out runs/vae
    matrix-jax train gallery:VAE_LONG   --out runs/long --weights runs/vae/weights
    matrix-jax train gallery:FOUNDATION --out runs/base --weights runs/long/weights
    matrix-jax train gallery:CAUSAL     --out runs/causal --weights runs/base/weights
    matrix-jax train gallery:FOUNDATION --out runs/teacher --weights runs/causal/weights
    matrix-jax train gallery:DMD        --out runs/dmd --weights runs/causal/weights \\
        --stage.teacher runs/teacher/weights
    matrix-jax generate gallery:DMD     --weights runs/dmd/weights --prompt gallery-unseen

No world has been trained with these recipes yet, so the package brings no weights for them.
"""

from matrix_jax.config import Run
from matrix_jax.recipes import change, load

DEFAULT = 'DMD'


def _recipe(name: str) -> Run:
    return change(load(f'doom:{name}'), {'data': 'data/gallery', 'world.name': 'Gallery'})


VAE = _recipe('VAE')
VAE_LONG = _recipe('VAE_LONG')
FOUNDATION = _recipe('FOUNDATION')
CAUSAL = _recipe('CAUSAL')
DMD = _recipe('DMD')
