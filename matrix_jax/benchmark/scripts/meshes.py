"""Compares loss curves of training on several meshes with that of one device.

    python -m matrix_jax.benchmark.scripts.meshes
    python -m matrix_jax.benchmark.scripts.meshes data=2,fsdp=2,seq=2 fsdp=4

Trains the_matrix:TINY_SWIN for twenty steps of batch 8 on one CPU device and on meshes of eight
emulated ones. Exit code 0 only if every loss agrees within the tolerance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from matrix_jax.benchmark.scripts.small_training import make_clips
from matrix_jax.benchmark.scripts.two_processes import TOLERANCE, compare, train

STEPS = 20
MESHES = ('data=8', 'fsdp=8', 'data=2,fsdp=2,seq=2', 'fsdp=2,tensor=2,seq=2')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('meshes', nargs='*', default=MESHES, metavar='AXIS=SIZE,...')
    meshes, good = parser.parse_args().meshes, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_clips(folder / 'data')
        train(folder / 'data', folder / 'one', STEPS, {'data': 1})
        print(
            f'{"last loss; greatest difference":32}{"one":>12}{"mesh":>12}{"losses":>12}'
            f'{"weights":>12}'
        )
        for mesh in meshes:
            sizes = {
                axis: int(size) for axis, size in (part.split('=') for part in mesh.split(','))
            }
            train(folder / 'data', folder / mesh, STEPS, sizes)
            good.append(compare(mesh, folder / 'one', folder / mesh))
    print(f'{sum(good)} of {len(good)} equal within {TOLERANCE:g}')
    return 0 if all(good) else 1


if __name__ == '__main__':
    sys.exit(main())
