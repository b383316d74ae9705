"""Weights folders of a world, in the diffusers layout: described, read and written.

The config of each component comes from the config.json of its folder, so a weights folder decides
the sizes, and the recipe decides how the networks run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from matrix_jax.weights import conversion, diffusers_layout, model_card, schema, stored_programs
from matrix_jax.worlds.networks import Networks, Params, component_shapes


class WeightsFolders(Networks):
    """Base of `BaseWorld`: how the networks of a world lie in folders.

    Attributes:
      extras: folders without weights, such as tokenizers.
      reads_text: whether the world reads a prompt.
    """

    extras: tuple[str, ...] = ()
    reads_text = False

    def locate(self, folder: str | Path, name: str) -> tuple[str, str]:
        """Returns (folder, name) from which a component of a weights folder is read."""
        return str(folder), name

    def external_parts(self, folder: str | Path) -> tuple[str, ...]:
        """Returns names of what a weights folder leaves to another folder, given by `locate`."""
        return ()

    def has_part(self, folder: str | Path, name: str) -> bool:
        """Returns whether a weights folder itself holds a component."""
        return (Path(folder) / name).is_dir()

    def can_load(self, folder: str | Path, name: str) -> bool:
        """Returns whether training starts from a component in, or next to, a weights folder."""
        return self.has_part(folder, name)

    def needs(self, name: str) -> bool:
        """Returns whether the networks of this config use a component or an extra folder."""
        return True

    def described_by(self, folder: str | Path, whole: bool = False) -> Self:
        """Returns this world with the sizes that a weights folder describes.

        Args:
          folder: weights folder in the diffusers layout.
          whole: whether all components are read from it; else those that it lacks keep the
            sizes of this world.

        Raises:
          CheckpointError: a component is missing, or a config.json describes another network.
        """
        return self.replace(**self._read_configs(folder, whole))

    def _check_whole(self, folder: Path, without: tuple[str, ...]) -> None:
        """Raises CheckpointError if a folder is a component, or lacks some but those `without`."""
        names = [one.folder for one in self.components if one.folder not in without]
        there = [name for name in names if self.has_part(folder, name)]
        missing = [
            name for name in names if name not in there and name not in self.external_parts(folder)
        ]
        if there and missing:
            raise diffusers_layout.CheckpointError(
                f'{folder}: no component {", ".join(missing)}; it has only {", ".join(there)}, '
                'from which matrix-jax train can start'
            )
        if missing and (folder / 'config.json').is_file():
            raise diffusers_layout.CheckpointError(
                f'{folder}: is a single component, expected a folder with {", ".join(names)}'
            )

    def _read_configs(
        self, folder: str | Path, whole: bool, without: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Config of each component as a weights folder has it, by field, but those `without`."""
        if whole:
            self._check_whole(Path(folder), without)
        found: dict[str, Any] = {}
        for component in self.components:
            if component.folder in without:
                continue
            if whole or self.has_part(folder, component.folder):
                recipe = getattr(self.cfg, component.field)
                read = read_config(type(recipe), *self.locate(folder, component.folder))
                kept = {name: getattr(recipe, name) for name in component.run_fields}
                cfg = dataclasses.replace(read, **kept)
                if found.setdefault(component.field, cfg) != cfg:
                    raise diffusers_layout.CheckpointError(
                        f'{folder}: {component.folder} has another config than the network '
                        'before it, expected the same'
                    )
        return found

    def load(
        self,
        folder: str | Path,
        only: tuple[str, ...] | None = None,
        allow_non_finite: bool = False,
    ) -> Params:
        """Returns parameters of a folder that fits this world exactly; numpy, dtype as stored.

        Args:
          folder: weights folder in the diffusers layout.
          only: folder names of the components to read; all by default.
          allow_non_finite: whether values may be infinite or not a number.

        Raises:
          CheckpointError: a file is missing, damaged or not safetensors.
          ConversionError: names, shapes or values do not fit; lists all faults.
        """
        params = {}
        known = stored_programs.parameter_shapes(self.programs_folder, repr(self.cfg)) or {}
        for component in self.components:
            if self.needs(component.folder) if only is None else component.folder in only:
                place = self.locate(folder, component.folder)
                _, tensors = diffusers_layout.read_component(*place)
                cfg = getattr(self.cfg, component.field)
                table = component.weights(cfg)
                shapes = known.get(component.folder) or component_shapes(component, cfg)
                try:
                    params[component.folder] = conversion.to_jax(
                        table, tensors, shapes, allow_non_finite
                    )
                except conversion.ConversionError as error:
                    raise conversion.ConversionError(f'{"/".join(place)}: {error}') from error
        return params

    def save(
        self,
        folder: str | Path,
        params: Mapping[str, Any],
        start: str | None = None,
        dtype: str | None = 'bfloat16',
    ) -> None:
        """Writes a folder in the diffusers layout.

        Args:
          folder: where to write.
          params: parameters by component.
          start: weights that training started from. Components that `params` lacks are copied from
            there, and what it leaves to another folder is left there again.
          dtype: stored type; None = as in `params`.
        """
        origin = Path(diffusers_layout.resolve(start)) if start else None
        external = self.external_parts(origin) if origin else ()
        for component in self.components:
            name, cfg = component.folder, getattr(self.cfg, component.field)
            if name in params and name not in external:
                tensors = conversion.to_torch(component.weights(cfg), params[name])
                diffusers_layout.write_component(
                    folder, name, cfg.to_released(), tensors, dtype=dtype
                )
            elif origin and (origin / name).is_dir():
                _copy(origin / name, Path(folder) / name)
        extras = [name for name in self.extras if name not in external and self.needs(name)]
        for name in extras:
            if origin and (origin / name).is_dir():
                _copy(origin / name, Path(folder) / name)
            else:
                self.write_extra(name, os.path.join(folder, name))
        present = [one.folder for one in self.components if (Path(folder) / one.folder).is_dir()]
        index = self.pipeline_index(Path(folder), (*present, *extras))
        diffusers_layout.write_json(folder, 'model_index.json', index)
        model_card.write(Path(folder), self.cfg.name, index, self.reads_text)

    def pipeline_index(self, folder: Path, parts: tuple[str, ...]) -> dict[str, Any]:
        """Returns the model_index.json of a folder with some parts."""
        return {'_class_name': self.cfg.name, **{name: ['matrix_jax', name] for name in parts}}

    def write_extra(self, name: str, folder: str) -> None:
        """Writes one of `extras` anew."""
        raise NotImplementedError(name)


# What operations on values of wrong types and sizes raise.
WRONG_VALUES = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError)


def read_config(kind: Any, folder: str, name: str) -> Any:
    """Returns the config of a component, `kind.from_released` of its config.json.

    Raises:
      CheckpointError: the file is missing, or describes no such network; names the file.
    """
    released = diffusers_layout.read_config(folder, name)
    try:
        schema.check_values(released)
        cfg = kind.from_released(released)
    except WRONG_VALUES as error:
        found, expected = (one.get('_class_name') for one in (released, kind().to_released()))
        found = found.removeprefix('Matrix') if isinstance(found, str) else None
        message = str(error)
        if found not in (None, expected):
            message = f'got a {found}, expected a {expected} by the recipe' + (
                f': {message}' if isinstance(error, ValueError) else ''
            )
        elif not isinstance(error, ValueError):  # an operation on a value of another type
            message = f'a value has another type than expected ({message})'
        raise diffusers_layout.CheckpointError(f'{folder}/{name}/config.json: {message}') from error
    return cfg


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        diffusers_layout.replace_folder(
            target, lambda part: shutil.copytree(source, part, dirs_exist_ok=True)
        )
