"""One run in several processes.

Every process runs the same program on its own devices and reads its own rows of each batch. All
share one file system, and process 0 writes. With one process these functions do nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import jax
import numpy as np

ENVIRONMENT = {
    'coordinator': 'JAX_COORDINATOR_ADDRESS',
    'processes': 'JAX_NUM_PROCESSES',
    'process': 'JAX_PROCESS_ID',
}


def settings(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> dict | None:
    """Arguments of `join`; None for a single process.

    Missing arguments come from the variables in `ENVIRONMENT`.

    Args:
      coordinator: 'HOST:PORT' of process 0; 'auto' asks the cluster (Slurm, MPI, Kubernetes).
      processes: number of processes.
      process: index of this process.

    Raises:
      ValueError: the arguments are incomplete or contradict each other.
    """
    coordinator = coordinator or os.environ.get(ENVIRONMENT['coordinator'])
    processes, process = _number('processes', processes), _number('process', process)
    if coordinator == 'auto':
        return {}
    if coordinator is None and (processes, process) in ((None, None), (1, None), (1, 0)):
        return None
    if not re.fullmatch(r'[^\s:]+:\d{1,5}', coordinator or ''):
        raise ValueError(f'--coordinator: got {coordinator}, expected HOST:PORT of process 0')
    if processes is None or processes < 1:
        raise ValueError(f'--processes: got {processes}, expected at least 1')
    if process is None or not 0 <= process < processes:
        raise ValueError(f'--process: got {process}, expected 0 to {processes - 1}')
    return {'coordinator_address': coordinator, 'num_processes': processes, 'process_id': process}


def join(given: dict | None):
    """Connects to the other processes; call it with `settings` before jax uses a device."""
    if given is not None:
        jax.distributed.initialize(**given)


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(ENVIRONMENT[name])
    if given is not None or text is None:
        return given
    if not re.fullmatch(r'-?\d+', text):
        raise ValueError(f'{ENVIRONMENT[name]}: got {text!r}, expected a number')
    return int(text)


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Context in which process 0 runs before the others, which find its files."""
    if not first():
        meet('first')
    yield
    if first():
        meet('first')


def meet(name: str):
    """Waits until all processes have called this."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def fetch(tree):
    """Tree as numpy arrays, gathered from the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda leaf: np.asarray(
            multihost_utils.process_allgather(leaf, tiled=True)
            if not leaf.is_fully_addressable
            else leaf
        ),
        tree,
    )
