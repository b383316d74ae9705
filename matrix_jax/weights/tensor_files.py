"""Safetensors files, also with 8-bit floating-point weights and their scales.

Every file is checked before it is read: it is a file, it is whole, and it is no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from matrix_jax.config import UsageError

FLOAT8 = {'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2}
# Names of the factor of an 8-bit weight NAME.weight; those that end in _inv are factors as well.
SCALES = ('{name}.scale_weight', '{name}.weight_scale', '{name}.weight_scale_inv')
# Tensors that say how activations were scaled in 8-bit products, which are not used here.
ACTIVATION_SCALES = ('{name}.input_scale', '{name}.scale_input')
MARKER = 'scaled_fp8'  # an empty tensor of files whose weights have scales


class CheckpointError(UsageError):
    """A folder of weights or of training state cannot be used."""


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file by name, read on access; 8-bit floats become bfloat16.

    Raises:
      CheckpointError: it is no whole safetensors file.
    """

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path = check_file(path)
        try:
            self._file = safe_open(self.path, 'numpy')
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f'{self.path}: {_diagnose(self.path) or error}') from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self._names = dict.fromkeys(self._file.keys())

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor as safetensors calls it."""
        return str(self._file.get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> np.ndarray:
        kind = self.dtype(name)
        if kind in FLOAT8:
            return self._float8(name, kind)
        try:
            return self._file.get_tensor(name)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f'{self.path}: {name} has the type {kind}, expected F32, F16, BF16, '
                f'{", ".join(FLOAT8)} or integers'
            ) from error

    def _float8(self, name: str, kind: str) -> np.ndarray:
        with self.path.open('rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            entry = json.loads(file.read(length))[name]
            start, end = entry['data_offsets']
            file.seek(8 + length + start)
            data = np.frombuffer(file.read(end - start), FLOAT8[kind])
        return data.reshape(entry['shape']).astype(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ScaledTensors(Mapping[str, np.ndarray]):
    """Tensors whose 8-bit weights are multiplied by their scales; the scales have no names here.

    A scale is one number, one per output channel, or one per block of the weight.
    """

    def __init__(self, files: Mapping[str, TensorFile]):
        self._files = files
        self._scales: dict[str, str] = {}
        hidden = set()
        for key in files:
            if not key.endswith('.weight') or files[key].dtype(key) not in FLOAT8:
                continue
            name = key.removesuffix('.weight')
            found = [one for text in SCALES if (one := text.format(name=name)) in files]
            if found:
                self._scales[key] = found[0]
            hidden |= {*found, *(text.format(name=name) for text in ACTIVATION_SCALES)}
        self._names = [key for key in files if key not in hidden and key != MARKER]

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._files[name][name]
        if name not in self._scales:
            return tensor
        place = self._scales[name]
        scale = np.asarray(self._files[place][place], np.float32)
        try:
            return tensor.astype(np.float32) * _expanded(scale, tensor.shape)
        except ValueError as error:
            raise CheckpointError(
                f'{self._files[place].path}: {place}: got shape {scale.shape}, expected one '
                f'number, or one per output channel or block of {tensor.shape}'
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _expanded(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale in a shape that multiplies a weight of the given shape."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.shape in ((shape[0],), (shape[0], 1)):
        return scale.reshape(shape[0], *(1,) * (len(shape) - 1))
    if scale.ndim != len(shape):
        raise ValueError('other axes')
    for axis, size in enumerate(shape):
        block = -(-size // scale.shape[axis])
        scale = np.repeat(scale, block, axis=axis).take(range(size), axis=axis)
    return scale


def read_file(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Returns (metadata, tensors) of one safetensors file."""
    file = TensorFile(path)
    return file.metadata, dict(ScaledTensors(dict.fromkeys(file, file)))


def check_file(path: str | Path) -> Path:
    """Returns the path of a file.

    Raises:
      CheckpointError: there is no such file, or it is a folder, a pipe or a device.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f'{path}: is a link to {path.readlink()}, which is missing')
    if path.exists():
        what = 'a folder' if path.is_dir() else 'a pipe or a device'
        raise CheckpointError(f'{path}: is {what}, expected a file')
    raise CheckpointError(f'{path}: no such file')


def _diagnose(path: Path) -> str | None:
    """Why a file is not safetensors, judged by its content."""
    size = path.stat().st_size
    with path.open('rb') as file:
        head = file.read(64)
    if head[:2] == b'PK' or (
        head[:1] == b'\x80' and head[1:2] in (b'\2', b'\3', b'\4', b'\5') and head[8:9] != b'{'
    ):
        return (
            'a PyTorch pickle under a .safetensors name; it can run code, so it is refused '
            '(matrix-jax convert makes safetensors of it)'
        )
    if head.startswith(b'version https://git-lfs'):
        return 'a git-lfs pointer, not the file itself; git lfs pull fetches it'
    header = int.from_bytes(head[:8], 'little')
    if size < 8 or (head[8:9] == b'{' and size < 8 + header):
        return f'truncated: {size} bytes end inside the header'
    if head[8:9] != b'{':
        return 'not a safetensors file'
    with path.open('rb') as file:
        file.seek(8)
        try:
            table = json.loads(file.read(header))
            ends = [one['data_offsets'][1] for name, one in table.items() if name != '__metadata__']
        except (ValueError, TypeError, KeyError, IndexError):
            return 'corrupt: its header is not valid JSON of tensors'
    wanted = 8 + header + max(ends, default=0)
    return f'truncated: {size} bytes of {wanted}' if size < wanted else None
