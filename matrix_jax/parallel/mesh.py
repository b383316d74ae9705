"""The shape of a mesh as a user gives it; `sharding` makes meshes of devices from it."""

from __future__ import annotations

import dataclasses
import math
import re

AXES = ('data', 'fsdp', 'tensor', 'seq')
PIPELINE = r'([1-9]\d{0,3})dit_([1-9]\d{0,3})vae'


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis; their product is the number of devices used.

    `pipeline` is for streams, in place of the axes: '5dit_3vae' gives five devices to the network
    and three more to its decoder, which then work at the same time; '1' has all devices do both.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    seq: int = 1
    pipeline: str = '1'

    def __post_init__(self):
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
                'them: a pipeline says what all of its devices do'
            )

    @property
    def axes(self) -> dict[str, int]:
        """Devices of each axis."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def parts(self) -> tuple[Mesh, ...]:
        """The meshes of a pipeline, of the network and of its decoder; none without one."""
        sizes = re.fullmatch(PIPELINE, self.pipeline)
        return tuple(Mesh(seq=int(size)) for size in sizes.groups()) if sizes else ()

    @property
    def devices(self) -> int:
        """How many devices are used."""
        return sum(part.devices for part in self.parts) or math.prod(self.axes.values())
