"""Compiled programs as files beside the weights, so that a stream starts without compiling.

A folder of weights may hold `programs/KEY/`: one file per program of a stream, and `index.json`,
which says what they were compiled for. A file is a serialised executable, and to load one is to run
code. Each file is therefore signed with a secret of the user (`signing_key`), and no other file is
loaded: programs that come with downloaded weights are ignored.

Programs are found without tracing, so that the source of this package is part of what they were
compiled for, like versions, devices, processor and flags.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import os
import pickle
import secrets
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.experimental import serialize_executable

import matrix_jax
from matrix_jax.parallel import compilation, sharding
from matrix_jax.weights import diffusers_layout

FOLDER = 'programs'
INDEX = 'index.json'
SUFFIX = '.program'
SIGNATURE_BYTES = hashlib.sha256().digest_size
# Settings of jax that change a traced program.
SETTINGS = (
    'jax_default_matmul_precision',
    'jax_enable_x64',
    'jax_default_prng_impl',
    'jax_threefry_partitionable',
    'jax_numpy_dtype_promotion',
    'jax_debug_nans',
)
Key = dict[str, str]


def make_key(world: str, stream: str, params: Any, weights: Path | None) -> Key:
    """Returns what programs are compiled for, as text by name.

    Args:
      world: text of the world's config.
      stream: which programs of the world.
      params: parameters of the stream, on their devices.
      weights: folder of the weights. Programs hold the ids that its tokenizers give to fixed
        prompts.
    """
    settings = {name: getattr(jax.config, name, None) for name in SETTINGS}
    options = [_lasting(compilation.compiler_options(fast)) for fast in (False, True)]
    return {
        'stream': stream,
        'world': world,
        'tokenizer': _tokenizer_digest(weights),
        'source': source_digest(),
        'python': '.'.join(map(str, sys.version_info[:2])),
        **{name: _version(name) for name in ('jax', 'jaxlib', 'flax', 'numpy')},
        'devices': _devices(params),
        'processor': compilation.processor() if compilation.backend() == 'cpu' else '',
        'settings': json.dumps(settings, sort_keys=True),
        'options': json.dumps(options),
        'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
    }


def save(weights: Path, key: Key, programs: Mapping[str, Any], parameters: Any) -> int:
    """Writes programs to a folder of weights; returns their size in bytes.

    Args:
      weights: the folder.
      key: of `make_key`.
      programs: compiled programs by name. A program that came out of jax's own cache cannot be
        stored: compile with that cache off.
      parameters: tree of shapes of the parameters, which reading the weights then need not trace.
    """
    folder = weights / FOLDER / _digest(key)
    secret = signing_key(create=True)

    def fill(new: Path) -> None:
        for name, program in programs.items():
            data = pickle.dumps(serialize_executable.serialize(program))
            signed = _sign(secret, key, name, data) + data
            (new / f'{name}{SUFFIX}').write_bytes(signed)
        about = {'key': key, 'programs': sorted(programs), 'parameters': _describe(parameters)}
        (new / INDEX).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')

    diffusers_layout.replace_folder(folder, fill)
    return sum(path.stat().st_size for path in folder.iterdir())


def present(weights: str | Path) -> bool:
    """Returns whether a folder of weights has programs, be they for this machine or not."""
    return (Path(weights) / FOLDER).is_dir()


def find(weights: Path | None, key: Key, params: Any) -> tuple[dict[str, Any], str]:
    """Loads the programs that a folder of weights has for a key.

    Args:
      weights: the folder, or None.
      key: of `make_key`.
      params: parameters of the stream, on their devices.

    Returns:
      (programs by name, a line that says why there are none). The line is empty if the folder
      holds no programs for any key.
    """
    found = list(_indexes(weights))
    if weights is None or not found:
        return {}, ''
    place = weights / FOLDER / _digest(key)
    about = next((one for path, one in found if path == place and one['key'] == key), None)
    if about is None:
        return {}, f'stored programs: {_difference(key, [one["key"] for _, one in found])}'
    try:
        secret = signing_key()
        return {name: _read(place, name, key, secret, params) for name in about['programs']}, ''
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {}, f'stored programs: not loaded ({reason})'


def parameter_shapes(weights: Path | None, world: str) -> Any:
    """Returns the parameters of a world as `save` got them, or None if nothing is stored.

    Args:
      weights: folder of weights.
      world: text of the world's config.
    """
    source = source_digest()
    for _, one in _indexes(weights):
        if one['key'].get('world') == world and one['key'].get('source') == source:
            leaves = {
                tuple(path.split('/')): jax.ShapeDtypeStruct(shape, dtype)
                for path, (shape, dtype) in one['parameters'].items()
            }
            return traverse_util.unflatten_dict(leaves)
    return None


def signing_key(create: bool = False) -> bytes:
    """Returns the secret that the user's programs are signed with.

    Args:
      create: whether to make one if there is none.

    Raises:
      OSError: there is none, or it cannot be written or read.
      ValueError: other users can read or change it.
    """
    path = compilation.user_cache() / 'signing_key'
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(path, flags, 0o600), 'wb') as file:
                file.write(secrets.token_bytes(SIGNATURE_BYTES))
    if not path.exists():
        raise ValueError(f'no {path}: this user has stored none')
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise ValueError(f'{path}: other users can use it, expected mode 600')
    secret = path.read_bytes()
    if len(secret) != SIGNATURE_BYTES:
        raise ValueError(f'{path}: got {len(secret)} bytes, expected {SIGNATURE_BYTES}')
    return secret


@functools.cache
def source_digest() -> str:
    """Returns a digest of the source of this package."""
    root = Path(matrix_jax.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        found.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _tokenizer_digest(weights: Path | None) -> str:
    if weights is None:
        return ''
    found = hashlib.sha256()
    for path in sorted(weights.glob('*tokenizer*/*')):
        if path.is_file():
            found.update(f'{path.relative_to(weights)}\n'.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _read(place: Path, name: str, key: Key, secret: bytes, params: Any) -> Any:
    signed = (place / f'{name}{SUFFIX}').read_bytes()
    signature, data = signed[:SIGNATURE_BYTES], signed[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _sign(secret, key, name, data)):
        raise ValueError(f'{name} is not signed by this user')
    leaf = next(one for one in jax.tree.leaves(params) if isinstance(one, jax.Array))
    place_on: Any = leaf.sharding
    if isinstance(place_on, jax.sharding.NamedSharding):
        devices = list(place_on.mesh.devices.flat)
    else:
        devices = list(leaf.devices())
    executable, in_tree, out_tree = pickle.loads(data)  # it is signed
    return serialize_executable.deserialize_and_load(
        executable, in_tree, out_tree, execution_devices=devices
    )


def _sign(secret: bytes, key: Key, name: str, data: bytes) -> bytes:
    about = json.dumps([key, name], sort_keys=True).encode()
    return hmac.digest(secret, hashlib.sha256(about).digest() + data, 'sha256')


def _digest(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _indexes(weights: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields (folder, index) of everything stored in a folder of weights."""
    for path in sorted((weights / FOLDER).glob(f'*/{INDEX}')) if weights else ():
        try:
            about = json.loads(path.read_text(encoding='utf-8'))
            if isinstance(about['key'], dict) and isinstance(about['programs'], list):
                yield path.parent, about
        except (OSError, ValueError, KeyError, TypeError):
            continue  # as if it were not there


def _difference(key: Key, others: list[Key]) -> str:
    """Says in what the stored programs that differ least differ from what is wanted."""
    nearest = min(others, key=lambda one: sum(one.get(name) != key[name] for name in key))
    for name, wanted in key.items():
        stored = nearest.get(name)
        if stored != wanted:
            if name in ('world', 'tokenizer', 'source', 'processor', 'settings', 'options'):
                return f'made for another {name.removesuffix("s")}'
            return f'made for {name} {stored!r}, this is {wanted!r}'
    return 'damaged'


def _describe(parameters: Any) -> dict[str, Any]:
    """Path -> (shape, type) of each leaf."""
    flat = traverse_util.flatten_dict(parameters, sep='/')
    return {path: (list(leaf.shape), str(leaf.dtype)) for path, leaf in flat.items()}


def _lasting(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options but those that stand in for what only a GPU can find out."""
    return {
        name: value
        for name, value in (options or {}).items()
        if name not in compilation.NO_AUTOTUNING
    }


def _devices(params: Any) -> str:
    """The devices of parameters. A GPU has a longer name where it is compiled for but not there."""
    kind, *axes = sharding.device_names(params).partition(' 141GB HBM3e')
    return kind + axes[-1]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ''
