"""What an update costs, counted without running it."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.cli.parser import main_guard
from matrix_jax.dit.cogvideox import CogVideoXTransformer, ControlConfig, shapes
from matrix_jax.train import dry_run
from matrix_jax.weights import conversion

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('remat', [False, True])
def test_a_loop_counts_as_often_as_it_runs(remat):
    """XLA's own count has one turn of it; here are five times seven, forward and backward."""

    def layer(x, w):
        return jnp.sin(x @ w), None

    def looped(x, w):
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)

    def nested(x, w):
        return jax.lax.scan(lambda x, _: looped(x, w), x, length=5)[0].sum()

    x, w = np.ones((32, 32), np.float32), np.ones((7, 32, 32), np.float32)
    products = (4 if remat else 3) * 5 * 7 * 2 * 32**3
    assert products < dry_run.flops(jax.grad(nested, (0, 1)), x, w) < 1.2 * products


def test_rematerialisation_costs_what_it_recomputes():
    def work(remat):
        cfg = recipes.load('the_matrix:TINY', ['--world.dit.remat', remat]).world.dit
        cond = cfg.control.dim
        latents, text, level, control = (
            jax.ShapeDtypeStruct(shape, 'float32')
            for shape in (
                (1, 3, 4, 6, cfg.channels),
                (1, cfg.text_length, cfg.text_dim),
                (1, 3),
                (1, 3, cond),
            )
        )

        def loss(params, *given):
            return CogVideoXTransformer(cfg).apply({'params': params}, *given).sum()

        return dry_run.flops(jax.grad(loss), shapes(cfg), latents, text, level, control)

    none, dots, block = map(work, ('none', 'dots', 'block'))
    assert none < dots < 1.1 * none and 1.2 * none < block < 1.4 * none


def test_the_report_says_what_a_device_holds(monkeypatch):
    run = recipes.load('the_matrix:TINY_CONTROL', ['--train.batch', '8', '--mesh.fsdp', '8'])
    net = dataclasses.replace(
        run.world.dit, layers=2, control=ControlConfig(dim=16, start=0, end=2)
    )
    run = dataclasses.replace(run, world=dataclasses.replace(run.world, dit=net))
    monkeypatch.setattr(dry_run, 'MIB', 1)
    lines = dry_run.report(run).splitlines()
    found = {
        line[2:42].strip(): float(line[42:].split()[0].replace(',', ''))
        for line in lines
        if line.endswith('MiB')
    }
    world = worlds.build(run.world)
    letters = conversion.flatten(conversion.axes(world.tables['transformer']))
    mine = 4 * sum(
        math.prod(leaf.shape) // (8 if 'd' in letters[path] else 1)
        for path, leaf in conversion.flatten(world.shapes()['transformer']).items()
        if 'control' in path
    )
    assert found['parameters'] == found['average of them'] == mine
    assert found['optimizer'] == 2 * mine + 8  # two moments, two counters
    assert found['frozen weights'] > 0 and found['activations, gradients and work space'] > 0
    *parts, whole = found.values()
    assert whole == pytest.approx(sum(parts), rel=0.2)  # the batch, and what is not aligned
    assert lines[0].startswith('the_matrix:TINY_CONTROL: ControlSFT on fsdp=8, 8 examples')
    assert 'FLOPs per update: ' in lines[-2]


@pytest.mark.parametrize(
    'argv, said',
    [
        (
            ['--mesh.fsdp', '3', '--dry-run'],
            'train.batch: got 2, expected a multiple of mesh.data x mesh.fsdp = 1 x 3 = 3',
        ),
        (['--mesh.seq', '16', '--dry-run'], 'seq=16 = 16 devices, expected at most 8'),
        (['--data', '.', '--processes', '2'], '--coordinator: got None, expected HOST:PORT'),
        (['--data', '.', '--coordinator', 'here'], '--coordinator: got here, expected HOST:PORT'),
        (['--data', '.', '--coordinator', 'here:1'], '--processes: got None, expected at least 1'),
        (
            ['--data', '.', '--coordinator', 'here:1', '--processes', '2', '--process', '2'],
            '--process: got 2, expected 0 to 1',
        ),
    ],
    ids=lambda value: ' '.join(value[-2:]) if isinstance(value, list) else '',
)
def test_the_door_refuses(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location('tools_train', ROOT / 'tools/train.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(SystemExit) as stop:
        main_guard(tool.main, ['the_matrix:TINY_SWIN', *argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert said in printed.err
    assert list(tmp_path.iterdir()) == []
