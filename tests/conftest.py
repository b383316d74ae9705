"""Every test runs on the CPU with 8 forced devices, so that the sharding tests always run."""

import os

# Before the first import of jax, which reads them once.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
os.environ['XLA_FLAGS'] = ' '.join(
    flag for flag in os.environ.get('XLA_FLAGS', '').split()
    if not flag.startswith('--xla_force_host_platform_device_count')
) + ' --xla_force_host_platform_device_count=8'
# The suite needs no network: a forgotten download fails at once in place of hanging.
os.environ['HF_HUB_OFFLINE'] = '1'
