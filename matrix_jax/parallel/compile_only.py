"""GPUs that programs are compiled for on a machine without one.

XLA compiles for a GPU by its description, down to machine code. `devices` makes compile-only
devices of one host, and programs for them are traced and compiled within `tracing`. Nothing is
autotuned, so layouts, fusions, collectives, memory and the order of kernels are those of a real
GPU, but a time is not to be had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from matrix_jax.parallel import compilation
from matrix_jax.parallel.mesh import Mesh as MeshShape

PLUGIN = 'jax_cuda12_plugin'
NAMES = 'h200, or h200x2 to h200x8 for several'
CUDNN = 91002  # version that the attention kernel is asked for
BANDWIDTH = 4.8e12  # bytes per second of an H200's memory

# NVIDIA's data sheet of the H200 and the limits of compute capability 9.0, in XLA's names.
SIZES = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 48 * 2**10,
    'shared_memory_per_block_optin': 227 * 2**10,
    'shared_memory_per_core': 228 * 2**10,
    'threads_per_core_limit': 2048,
    'core_count': 132,
    'fpus_per_core': 128,
    'block_dim_limit_x': 2**31 - 1,
    'block_dim_limit_y': 2**16 - 1,
    'block_dim_limit_z': 2**16 - 1,
    'thread_dim_limit_x': 1024,
    'thread_dim_limit_y': 1024,
    'thread_dim_limit_z': 64,
    'registers_per_core_limit': 2**16,
    'registers_per_block_limit': 2**16,
    'memory_bandwidth': int(BANDWIDTH),
    'l2_cache_size': 50 * 2**20,
    'clock_rate_ghz': 1.98,
    'device_memory_size': 151_397_597_184,
    'pcie_bandwidth': 32 * 2**30,
    'device_address_bits': 64,
}
H200 = 'NVIDIA H200 141GB HBM3e'
VERSIONS = {'driver': '13.0.0', 'runtime': '12.8.0', 'compile_time_toolkit': '12.8.0'}


def parse(name: str) -> int:
    """Returns the number of GPUs that a name such as 'h200' or 'h200x8' asks for.

    Raises:
      ValueError: the name is none of `NAMES`.
    """
    found = re.fullmatch(r'h200(?:x([2-8]))?', name)
    if not found:
        raise ValueError(f'--compile-for: got {name}, expected {NAMES}')
    return int(found[1] or 1)


def fit_mesh(shape: MeshShape, count: int, axis: str) -> MeshShape:
    """Returns the mesh shape for that many GPUs.

    Args:
      shape: the mesh that the user asks for.
      count: number of GPUs.
      axis: the axis that takes all of them if the user asks for one device.

    Raises:
      ValueError: the shape has another number of devices.
    """
    if shape.devices == 1:
        sizes: Any = {axis: count}
        return dataclasses.replace(shape, **sizes)
    if shape.devices != count:
        raise ValueError(
            f'--compile-for: got {count} GPU(s), expected {shape.devices}, as many as the mesh has'
        )
    return shape


def installed() -> bool:
    """Whether the compiler for GPUs is installed."""
    return importlib.util.find_spec(PLUGIN) is not None


@functools.cache
def devices(count: int) -> tuple[jax.Device, ...]:
    """Returns compile-only H200s of one host.

    Raises:
      ValueError: the compiler for GPUs is not installed, or of another version than jax.
    """
    from jax.experimental import topologies

    if not installed():
        raise ValueError(
            f"--compile-for: needs {PLUGIN}, which is not installed: pip install -e '.[compile]'"
        )
    try:
        found = topologies.get_topology_desc(
            platform='cuda', target_config=description(), topology=f'1x{count}x1'
        )
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'--compile-for: {PLUGIN} does not work with jax {jax.__version__} ({reason})'
        ) from error
    return tuple(found.devices)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """The context in which programs for `devices` are traced and compiled."""
    from jax._src.cudnn import fused_attention_stablehlo

    with (
        compilation.compile_for('gpu'),
        mock.patch.multiple(fused_attention_stablehlo, **CUDNN_CHECKS),
    ):
        yield


def _at_least(capability: str) -> bool:
    return tuple(map(int, capability.split('.'))) <= (9, 0)


# jax's attention asks the GPU at hand what it can do, by functions that are private to jax.
CUDNN_CHECKS: dict[str, Any] = {
    'check_cudnn_version': lambda: CUDNN,
    'check_compute_capability': _at_least,
    'is_cuda_compute_capability_equal': lambda capability: capability == '9.0',
}


def description() -> str:
    """Returns XLA's description of an H200 (a GpuTargetConfigProto as text)."""
    sizes = '\n'.join(f'  {name}: {value}' for name, value in SIZES.items())
    versions = '\n'.join(f'  {name}_version: "{value}"' for name, value in VERSIONS.items())
    return f"""gpu_device_info {{
{sizes}
{versions}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  name: "{H200}"
  dnn_version: "9.10.0"
  ecc_enabled: true
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{H200}"
"""
