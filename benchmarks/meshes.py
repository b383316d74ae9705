"""A mesh changes where numbers lie, not what they are: loss curves against that of one device.

    python benchmarks/meshes.py
    python benchmarks/meshes.py data=2,fsdp=2,seq=2 fsdp=4

Runs tools/train.py on the_matrix:TINY_SWIN for twenty steps of batch 8, on one device of the CPU
and on meshes of eight imitated ones. Exit code 0 only if every loss agrees within the tolerance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from two_processes import TOLERANCE, compare, record, train

STEPS = 20
MESHES = ('data=8', 'fsdp=8', 'data=2,fsdp=2,seq=2', 'fsdp=2,tensor=2,seq=2')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('meshes', nargs='*', default=MESHES, metavar='AXIS=SIZE,...')
    good = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        record(folder / 'data')
        train(folder / 'data', folder / 'one', STEPS, {'data': 1})
        print(
            f'{"last loss; greatest difference":32}{"one":>12}{"mesh":>12}{"losses":>12}'
            f'{"weights":>12}'
        )
        for mesh in parser.parse_args().meshes:
            sizes = {
                axis: int(size) for axis, size in (part.split('=') for part in mesh.split(','))
            }
            train(folder / 'data', folder / mesh, STEPS, sizes)
            good.append(compare(mesh, folder / 'one', folder / mesh))
    print(f'{sum(good)} of {len(good)} equal within {TOLERANCE:g}')
    return 0 if all(good) else 1


if __name__ == '__main__':
    sys.exit(main())
