"""An update in JAX and in PyTorch: what can be compared, and the page."""

import importlib.util
import json

import numpy as np
import pytest

from matrix_jax import recipes
from matrix_jax.benchmark import measure, torch_training
from tests.cli.command import run

TORCH = all(map(importlib.util.find_spec, ('torch', 'diffusers')))


@pytest.mark.parametrize(
    'argv, said',
    [
        (['carracing:SWIN', '--train'], '--train: expected --vs torch with it'),
        (['carracing:SWIN', '--train', '--sweep', 'mesh'], '--train: expected --vs torch with it'),
        (['carracing', '--train', '--vs', 'torch'], 'got carracing:PLAY, expected a recipe whose'),
        (['doom:VAE', '--train', '--vs', 'torch'], 'got doom:VAE, expected a '),
    ],
)
def test_the_door_refuses(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run('benchmark', *argv) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_page_compares_samples_memory_and_losses():
    side = {'p50_ms': 10.0, 'mean_ms': 10.0, 'memory': 2**30, 'losses': [1.0, 2.0, 3.0]}
    results = {
        'recipe': 'a:B',
        'kind': 'dit',
        'samples': 2,
        'flops': 1e9,
        'ceiling': 2e11,
        'about': {'torch': '2', 'diffusers': '1', 'threads': 2},
        'ours': side,
        'torch': side | {'mean_ms': 20.0, 'losses': [1.0, 2.0, 3.003]},
    }
    text = torch_training.page(results)
    assert '| samples/s | 200.000 | 100.000 | 2.00 |' in text
    assert '| memory, MiB | 1024 | 1024 | 1.00 |' in text
    assert 'ours reaches 50.0% of the fastest product' in text
    assert 'first 3 losses: 1.0e-03' in text


@pytest.mark.skipif(not TORCH, reason='needs torch and diffusers')
@pytest.mark.parametrize('recipe', ['the_matrix:TINY_SWIN', 'the_matrix:TINY_VAE'])
def test_both_sides_lose_the_same(recipe):
    settings = measure.Settings(steps=1, warmup=1)
    found = torch_training.run(recipes.load(recipe), settings)
    np.testing.assert_allclose(found['ours']['losses'], found['torch']['losses'], rtol=1e-4)
    assert min(found['ours']['memory'], found['torch']['memory'], found['flops']) > 0
    assert json.loads(json.dumps(found))
