"""Weights in 16 or 8 bits, which a program turns into float32 once, when it is loaded.

A kernel in 8 bits has one scale per output channel and, in front of the input channels, per layer
and tap. Small parameters stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from matrix_jax.browser.graph import Graph, Value, element_type

BITS = (32, 16, 8)
SMALL = 1024  # elements of a parameter that stays in float32
MAX = 127


def pack(array: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Returns the tensors that hold a parameter: 'values', and 'scale' for 8 bits.

    16 bits are those of bfloat16 or of float16, whichever is nearer to the parameter: bundled
    weights are bfloat16, and lose nothing.
    """
    array = np.asarray(array, np.float32)
    if bits == 32 or array.ndim < 2 or array.size < SMALL:
        return {'values': array}
    if bits == 16:
        forms = [array.astype(ml_dtypes.bfloat16), array.astype(np.float16)]
        return {'values': min(forms, key=lambda one: np.abs(one.astype(np.float32) - array).max())}
    scale = np.abs(array).max(axis=-2, keepdims=True) / MAX
    safe = np.where(scale > 0, scale, 1)
    return {'values': np.round(array / safe).astype(np.int8), 'scale': scale.astype(np.float32)}


def unpack(packed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the float32 parameter that a program computes with."""
    values = packed['values'].astype(np.float32)
    return values * packed['scale'] if 'scale' in packed else values


def read(graph: Graph, name: str, packed: Mapping[str, np.ndarray]) -> Value:
    """Adds a packed parameter to a graph; returns it in float32."""
    tensors = {}
    for part, array in packed.items():
        tensors[part] = graph.parameter(f'{name}/{part}', array)
    value = tensors['values']
    if value.dtype != np.float32:
        value = graph.node(
            'Cast', [value.name], value, dtype=np.float32, to=element_type(np.float32)
        )
    if 'scale' in tensors:
        value = graph.node('Mul', [value.name, tensors['scale'].name], value)
    return value


class Store:
    """A file of weights that several programs read, each tensor once.

    Attributes:
      places: tensor name -> (offset, bytes) in the file.
    """

    ALIGN = 64

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self._data = bytearray()

    def add(self, name: str, array: np.ndarray) -> tuple[int, int]:
        """Adds a tensor, unless it is there; returns its place."""
        if name not in self.places:
            self._data += bytes(-len(self._data) % self.ALIGN)
            data = np.ascontiguousarray(array).tobytes()
            self.places[name] = len(self._data), len(data)
            self._data += data
        return self.places[name]

    def data(self) -> bytes:
        """Returns the file."""
        return bytes(self._data)


def tensor(name: str, array: np.ndarray, file: str, place: tuple[int, int]) -> Any:
    """Returns the `onnx.TensorProto` of a tensor that lies in a file."""
    from onnx import TensorProto

    made = TensorProto(name=name, dims=array.shape, data_type=element_type(array.dtype))
    made.data_location = TensorProto.EXTERNAL
    for key, value in (('location', file), ('offset', place[0]), ('length', place[1])):
        made.external_data.add(key=key, value=str(value))
    return made
