"""The programs of one stream, compiled at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from matrix_jax.parallel import compilation, sharding

Compiled = Any  # jax.stages.Compiled


class ProgramSet:
    """Collects programs by `add` and compiles them in `finish`.

    On one device a program is traced when it is added, and all are compiled side by side. On a mesh
    it is compiled when it is added, because where its outputs lie is known only then, and the next
    program is compiled for that.

    Args:
      mesh: mesh of the programs, or None on one device.
      stored: programs by name that need not be compiled, such as those that
        `weights.stored_programs.find` returns.

    Attributes:
      compiled: programs by name; complete after `finish`.
    """

    def __init__(self, mesh: Mesh | None, stored: Mapping[str, Compiled] | None = None) -> None:
        self._mesh = mesh
        self._traced: dict[str, Any] = {}
        self.compiled: dict[str, Compiled] = dict(stored or {})

    def add(
        self,
        name: str,
        function: Callable,
        *args: Any,
        donate: int | tuple[int, ...] = (),
        out_like: Any = None,
        fast_compile: bool = False,
        mesh: Mesh | None = None,
    ) -> Any:
        """Adds the program of `function` for arguments like `args`.

        Args:
          name: name of the program.
          function: what to compile.
          *args: arrays or ShapeDtypeStructs.
          donate: arguments that are donated.
          out_like: tree like the output, whose outputs stay where the leaves of this tree lie; None
            leaves the choice to the compiler.
          fast_compile: see `compilation.jit`.
          mesh: mesh of this program, if it has its own.

        Returns:
          ShapeDtypeStructs of what the program returns.
        """
        if name in self.compiled:
            return sharding.output_shapes(self.compiled[name])
        mesh, places = mesh or self._mesh, None
        if all(isinstance(one.sharding, NamedSharding) for one in jax.tree.leaves(out_like)):
            places = jax.tree.map(lambda leaf: leaf.sharding, out_like)
        with sharding.use_mesh(mesh):
            jitted = compilation.jit(
                function, fast_compile, donate_argnums=donate, out_shardings=places
            )
            traced = jitted.trace(*args)
            if mesh is not None:
                self.compiled[name] = traced.lower().compile()
                return sharding.output_shapes(self.compiled[name])
        self._traced[name] = traced
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info
        )

    def finish(self) -> dict[str, Compiled]:
        """Returns all programs, compiled."""
        lowered = {name: traced.lower() for name, traced in self._traced.items()}
        self._traced.clear()
        if lowered:
            with ThreadPoolExecutor(len(lowered)) as pool:
                made = pool.map(lambda one: one.compile(), lowered.values())
                self.compiled.update(zip(lowered, made, strict=True))
        return self.compiled
