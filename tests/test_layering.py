"""Imports go one way, torch stays out, and starting up costs nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'matrix_jax'
SCRIPTS = PACKAGE / 'benchmark' / 'scripts'
FILES = sorted(PACKAGE.rglob('*.py'))
# Imported by envs/__init__.py on first use.
LAZY = {PACKAGE / 'envs' / name for name in ('world_env.py', 'vector_env.py')}
# What each room of the package may import besides itself. A stream is given its network and never
# imports one; what drives a world sees `worlds`, never a network. A longer name wins.
BASE = {'config', 'recipes', 'video', 'parallel', 'weights', 'controls'}
NETWORKS = {'vae', 'encoders', 'dit'}
WORLDS = BASE | NETWORKS | {'nn', 'diffusion', 'stream', 'worlds'}
UPPER = {'weights.converter'}  # lies above the rest of its folder
DRIVERS = WORLDS | UPPER | {'data', 'rewards', 'train', 'serve', 'evals', 'pipelines'}
ALLOWED = {
    'parallel': {'parallel.mesh'},
    'parallel.mesh': set(),
    'config': {'parallel.mesh'},
    'recipes': {'config'},
    'video_reader': {'config'},
    'video': {'config', 'video_reader'},
    'controls': {'config', 'video'},
    'weights': {'config', 'parallel', 'parallel.mesh'},
    'nn': BASE,
    'diffusion': BASE | {'nn'},
    **dict.fromkeys(NETWORKS, BASE | {'nn'}),
    'stream': BASE | {'nn', 'diffusion'},
    'data': BASE,
    'rewards': BASE | {'data'},
    'worlds': WORLDS,
    'weights.converter': WORLDS,
    'parity': DRIVERS,
    'train': DRIVERS,
    'evals': DRIVERS,
    'pipelines': DRIVERS,
    'serve': WORLDS,
    'serve.runtime': WORLDS | {'data'},  # sessions and engine; no HTTP
    'serve.web': DRIVERS | {'serve.runtime'},
    'serve.cluster': DRIVERS | {'serve.runtime', 'serve.web'},
    'envs': DRIVERS,
    'browser': DRIVERS | {'serve.runtime', 'serve.web'},
    'benchmark': DRIVERS | {'parity'},
    'cli': DRIVERS | {'parity', 'benchmark', 'browser', 'envs'},
    '__main__': {'cli'},
}
HEAVY = {
    'transformers',
    'av',
    'pyarrow',
    'yaml',
    'gymnasium',
    'vizdoom',
    'orbax',
    'huggingface_hub',
    'tensorboardX',
    'ray',
}
HTTP = {'starlette', 'uvicorn', 'websockets', 'httpx', 'prometheus_client'}
HEAVY |= HTTP - {'websockets'}  # benchmark clients import it


def room(module: str) -> str:
    """The longest name in ALLOWED that a module of the package lies in; else its first part."""
    parts = module.split('.')[1:]
    names = ['.'.join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), parts[0] if parts else '')


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-1]
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            module = '.'.join(base)
            # `from matrix_jax import video` names a module by its alias.
            found |= (
                {f'{module}.{alias.name}' for alias in node.names}
                if module == 'matrix_jax'
                else {module}
            )
    return found


def faults(module: str, names: set[str]) -> list[str]:
    """Imports of a package module that its room does not allow."""
    mine = room(module)
    if mine not in ALLOWED:
        return [f'{module}: give {mine!r} a place in ALLOWED']
    allowed = ALLOWED[mine] | {mine, ''}

    def fits(name: str) -> bool:
        its, top = room(name), name.split('.')[1] if '.' in name else ''
        explicit = its in UPPER or top == mine.split('.')[0]
        return its in allowed or not explicit and top in allowed

    return [
        f'{module} imports {name}'
        for name in sorted(names)
        if name.split('.')[0] == 'matrix_jax' and not fits(name)
    ]


@pytest.mark.parametrize(
    'path',
    [path for path in FILES if path.parent != PACKAGE or path.name != '__init__.py'],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_go_one_way(path):
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    names = imports(path)
    assert faults(module, names) == []
    if path.parent != SCRIPTS:  # benchmark scripts compare with PyTorch
        assert not {name for name in names if name.split('.')[0] in ('torch', 'diffusers')}
    heavy = HEAVY - {'gymnasium'} if path in LAZY else HEAVY
    assert not {name for name in imports(path, top_level_only=True) if name.split('.')[0] in heavy}
    if module.startswith('matrix_jax.serve.runtime'):
        assert not {name for name in names if name.split('.')[0] in HTTP}


@pytest.mark.parametrize(
    'module, names, count',
    [
        ('matrix_jax.nn.rope', {'matrix_jax.parallel.sharding', 'jax'}, 0),
        ('matrix_jax.nn.rope', {'matrix_jax.dit.cogvideox'}, 1),
        ('matrix_jax.stream.swin', {'matrix_jax.dit'}, 1),
        ('matrix_jax.dit.actions', {'matrix_jax.dit.cogvideox', 'matrix_jax.vae'}, 1),
        ('matrix_jax.worlds.base', {'matrix_jax.train.loop', 'matrix_jax.stream.base'}, 1),
        ('matrix_jax.weights.converter', {'matrix_jax.worlds'}, 0),
        ('matrix_jax.weights.conversion', {'matrix_jax.worlds'}, 1),
        ('matrix_jax.worlds.base', {'matrix_jax.weights.converter'}, 1),
        ('matrix_jax.serve.runtime.engine', {'matrix_jax.serve.web.app'}, 1),
        ('matrix_jax.newcomer', set(), 1),
    ],
)
def test_the_rule_itself(module, names, count):
    assert len(faults(module, names)) == count


def test_importing_the_package_imports_nothing_heavy():
    code = (
        'import sys, matrix_jax\n'
        f'print(sorted({HEAVY | {"jax", "flax", "numpy", "torch"}!r} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stderr


@pytest.mark.parametrize('tool', sorted((ROOT / 'tools').glob('*.py')), ids=lambda path: path.name)
def test_every_tool_has_help(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, tool, '--help'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage:') and not done.stderr
    assert list(tmp_path.iterdir()) == []
