"""Checks that two processes, each reading half of every batch, train as one process does.

    python -m matrix_jax.benchmark.scripts.two_processes

Trains the_matrix:TINY_SWIN for ten steps on the CPU, in one process and in two that communicate
over gloo. Then one process resumes from what the two saved half-way. Compares every loss and every
exported weight; exit code 0 only if all agree.
"""

import argparse
import glob
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from matrix_jax.benchmark.scripts import small_training

STEPS = 10
TOLERANCE = 1e-5  # relative: two devices sum in another order


def train(data, out, steps, mesh, processes=1, timeout=600):
    """Trains on a mesh of emulated devices.

    Args:
      data, out: folders of the clips and of the run.
      steps: updates.
      mesh: axis -> size.
      processes: how many processes share the mesh.
      timeout: seconds.

    Returns:
      (seconds it took, standard error of process 0).
    """
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    devices = math.prod(mesh.values()) // processes
    environment = small_training.environment(
        JAX_DEFAULT_MATMUL_PRECISION='highest',
        XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
        '--xla_backend_optimization_level=0',
    )
    options = {
        'train.batch': 8,
        'train.steps': steps,
        'train.save_every': 5,
        'stage.optimizer.learning_rate': 3e-3,
        'stage.export': 'float32',
        **{f'mesh.{axis}': size for axis, size in mesh.items()},
    }
    if processes > 1:
        options |= {'coordinator': f'localhost:{port}', 'processes': processes}
    began = time.time()
    started = [
        subprocess.Popen(
            small_training.command(
                data, out, **options | ({'process': index} if processes > 1 else {})
            ),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    said = []
    try:
        for index, one in enumerate(started):
            printed, errors = one.communicate(timeout=timeout)
            said.append(errors)
            if one.returncode:
                sys.exit(f'process {index} of {processes}: exit code {one.returncode}\n{errors}')
            if (f'step {steps} loss' in printed) != (index == 0):
                sys.exit(f'process {index} of {processes} printed {printed!r}')
    finally:
        for one in started:
            one.kill()
    return time.time() - began, said[0]


def losses(out):
    """Step -> loss, from the event files of a run."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(glob.glob(f'{out}/events*')):
        content = Path(path).read_bytes()
        while content:  # each record: length, its checksum, the event, its checksum
            size = int.from_bytes(content[:8], 'little')
            event = Event.FromString(content[12 : 12 + size])
            found.update(
                (event.step, value.simple_value)
                for value in event.summary.value
                if value.tag == 'loss'
            )
            content = content[16 + size :]
    return found


def weights(out):
    from matrix_jax.weights.diffusers_layout import read_component

    return dict(read_component(Path(out) / 'weights', 'transformer')[1])


def compare(name, one, two):
    """Prints the largest difference of two runs; returns whether it is within the tolerance."""
    first, second = losses(one), losses(two)
    if first.keys() != second.keys():
        sys.exit(f'{name}: steps {sorted(first)} and {sorted(second)}')
    loss = max(abs(second[step] / first[step] - 1) for step in first)
    mine, other = weights(one), weights(two)
    scale = max(np.abs(leaf).max() for leaf in mine.values())
    weight = max(np.abs(other[key] - leaf).max() for key, leaf in mine.items()) / scale
    print(
        f'{name:32}{first[max(first)]:12.7f}{second[max(second)]:12.7f}{loss:12.1e}{weight:12.1e}',
        flush=True,
    )
    return loss <= TOLERANCE and weight <= 10 * TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--timeout', type=float, default=600, help='seconds of a run')
    timeout = parser.parse_args().timeout
    with tempfile.TemporaryDirectory() as folder:
        data, one, two, moved = (Path(folder) / name for name in ('data', 'one', 'two', 'moved'))
        small_training.make_clips(data)
        alone, _ = train(data, one, STEPS, {'fsdp': 1}, 1, timeout)
        together, _ = train(data, two, STEPS, {'fsdp': 2}, 2, timeout)
        shutil.copytree(two, moved)
        shutil.rmtree(moved / 'state' / str(STEPS))
        _, said = train(data, moved, STEPS, {'fsdp': 1}, 1, timeout)
        if 'resumes from step 5' not in said:
            sys.exit(f'the third run did not resume from step 5:\n{said}')
        print(f'{"":32}{"one":>12}{"two":>12}{"losses":>12}{"weights":>12}')
        good = all(
            [
                compare(f'{STEPS} steps', one, two),
                compare('5 steps as two, then 5 as one', one, moved),
            ]
        )
        print(
            f'one process {alone:.0f} s, two processes {together:.0f} s; '
            f'{"equal" if good else "NOT equal"} within {TOLERANCE:g}'
        )
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
