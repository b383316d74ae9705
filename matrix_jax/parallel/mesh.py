"""The mesh shape that a user asks for; `sharding.make_mesh` makes a mesh of devices from it."""

from __future__ import annotations

import dataclasses
import math
import re

AXES = ('data', 'fsdp', 'tensor', 'seq')
PIPELINE = r'([1-9]\d{0,3})dit_([1-9]\d{0,3})vae'


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis; their product is the number of devices used.

    Attributes:
      data, fsdp, tensor, seq: devices of each axis.
      pipeline: for streams, instead of the axes. '5dit_3vae' gives five devices to the network and
        three others to its decoder, which then run at the same time; '1' means no pipeline.

    Raises:
      ValueError: an axis is below 1, or `pipeline` is malformed or combined with axes.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    seq: int = 1
    pipeline: str = '1'

    def __post_init__(self) -> None:
        for name, size in self.axes.items():
            if not size >= 1:
                raise ValueError(f'mesh.{name}: got {size}, expected at least 1')
        if self.pipeline == '1':
            return
        if not self.parts:
            raise ValueError(
                f'mesh.pipeline: got {self.pipeline!r}, expected the devices of both '
                "parts, such as '5dit_3vae' or '6dit_2vae', or '1'"
            )
        if set(self.axes.values()) != {1}:
            sizes = ', '.join(f'mesh.{name} {size}' for name, size in self.axes.items() if size > 1)
            raise ValueError(
                f'mesh.pipeline: got {self.pipeline} with {sizes}, expected one of '
                'them: a pipeline assigns all of its devices itself'
            )

    @property
    def axes(self) -> dict[str, int]:
        """Devices of each axis."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def parts(self) -> tuple[Mesh, ...]:
        """The meshes of a pipeline's network and decoder; empty without a pipeline."""
        sizes = re.fullmatch(PIPELINE, self.pipeline)
        return tuple(Mesh(seq=int(size)) for size in sizes.groups()) if sizes else ()

    @property
    def devices(self) -> int:
        """Number of devices used."""
        return sum(part.devices for part in self.parts) or math.prod(self.axes.values())
