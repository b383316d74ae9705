"""Which columns of a LeRobot data set press which keys: a file in YAML.

    camera: observation.images.front   # if there are several
    offset: 1                          # frames from a row to the frame that its action makes
    keyboard:                          # keys of Matrix-Game; one that is left out is not pressed
      W: action[0] > 0.5
      S: action[0] < -0.5
    mouse:                             # turn of the view, up and to the right
      pitch: action[look_up] * -1
      yaw: action[look_right]
      unit: degrees                    # per frame; or radians, or mouse (a record's own unit)
    driving:                           # controls of The Matrix
      forward: action[gas] > 0.1
      left: action[steering] < -0.2
      right: action[steering] > 0.2
    pose: observation.pose             # six numbers: x y z yaw pitch roll, as in records

A term is COLUMN, COLUMN[NUMBER] or COLUMN[NAME]. A key compares it with a number; the mouse may
multiply it by one.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matrix_jax.data import files, frame_actions, records
from matrix_jax.data.ingest import IngestError

UNITS = {'degrees': 1.0, 'radians': 180 / np.pi, 'mouse': records.MOUSE_RATE}
COMPARISONS: dict[str, Callable] = {
    '>': operator.gt,
    '>=': operator.ge,
    '<': operator.lt,
    '<=': operator.le,
    '==': operator.eq,
    '!=': operator.ne,
}
DRIVING = ('forward', 'back', 'left', 'right')
MOUSE = ('pitch', 'yaw')
SECTIONS = ('camera', 'offset', 'keyboard', 'mouse', 'driving', 'pose')
LARGEST_OFFSET = 10
BYTES = 2**16  # of a file
TERM = re.compile(
    r'\s*(?P<column>[^\[\]<>=!*\s]+)\s*(\[\s*(?P<part>[^\[\]]+?)\s*\])?\s*'
    r'((?P<sign>>=|<=|==|!=|>|<|\*)\s*(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*)?'
)


@dataclass(frozen=True)
class Term:
    """A number of each row, compared with or multiplied by a constant.

    Attributes:
      column: name of the feature.
      part: number or name of one of its values; None = it has only one.
      sign: a key of COMPARISONS, or '*'.
      number: the constant.
    """

    column: str
    part: str | None = None
    sign: str = '*'
    number: float = 1.0

    def __call__(self, columns: Mapping[str, np.ndarray], names: Mapping[str, list]) -> np.ndarray:
        """Values [N] of the columns [N D]: bool if it compares, else float64."""
        index = part_index(self, names[self.column])
        values = columns[self.column][:, index].astype(np.float64)
        return COMPARISONS.get(self.sign, operator.mul)(values, self.number)


@dataclass(frozen=True)
class ActionsMap:
    """What the columns of a data set mean; see the module.

    Attributes:
      camera: name of the feature with the pictures; None = the only one.
      offset: frames from a row to the frame that its action makes.
      keyboard: (key, term) of keys; None = the data set has no keys.
      mouse: terms of pitch and yaw, or None.
      unit: unit of the mouse, a key of UNITS.
      driving: (name of DRIVING, term), or None.
      pose: column with poses, or None.
    """

    camera: str | None = None
    offset: int = 1
    keyboard: tuple[tuple[str, Term], ...] | None = None
    mouse: tuple[tuple[str, Term], ...] | None = None
    unit: str = 'mouse'
    driving: tuple[tuple[str, Term], ...] | None = None
    pose: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The features that the map reads, without pictures."""
        terms = [term for group in self._groups() for _, term in group]
        named = [term.column for term in terms] + [self.pose] * (self.pose is not None)
        return tuple(dict.fromkeys(named))

    def _groups(self) -> Iterator[tuple[tuple[str, Term], ...]]:
        return (one for one in (self.keyboard, self.mouse, self.driving) if one is not None)

    def check(self, names: Mapping[str, list]):
        """Checks the map against a data set.

        Args:
          names: feature -> names of its values.

        Raises:
          IngestError: a column or a part is missing; says what there is.
        """
        for column in self.columns:
            if column not in names:
                there = ', '.join(f'{name}[{len(parts)}]' for name, parts in names.items())[:200]
                raise IngestError(
                    f'column {column}: the data set has none of this name, only {there}'
                )
        for group in self._groups():
            for _, term in group:
                part_index(term, names[term.column])
        if self.pose is not None and len(names[self.pose]) != len(records.POSE):
            raise IngestError(
                f'pose: {self.pose} has {len(names[self.pose])} values, '
                f'expected {" ".join(records.POSE)}'
            )

    def read(
        self, columns: Mapping[str, np.ndarray], names: Mapping[str, list], fps: float
    ) -> dict[str, np.ndarray]:
        """Returns fields of `FrameActions` for rows of a data set, by the frame that they make.

        Args:
          columns: feature -> values [N D].
          names: feature -> names of its D values.
          fps: rows per second.

        Raises:
          IngestError: a value that is needed is not finite.
        """
        for name in self.columns:
            if not np.isfinite(columns[name]).all():
                raise IngestError(f'{name}: expected finite numbers')
        count = len(next(iter(columns.values()))) if columns else 0
        found: dict[str, np.ndarray] = {}

        def values(group, order, dtype) -> np.ndarray:
            terms = dict(group)
            none = np.zeros(count, dtype)
            return np.stack(
                [terms[one](columns, names) if one in terms else none for one in order], axis=-1
            )

        if self.keyboard is not None:
            found['keyboard'] = values(self.keyboard, records.KEYS, bool)
        if self.mouse is not None:
            scale = UNITS[self.unit] / (fps if self.unit == 'mouse' else 1)
            found['turns'] = values(self.mouse, MOUSE, float) * scale
        if self.driving is not None:
            held = values(self.driving, DRIVING, bool)
            found['controls'] = frame_actions.driving_controls(*held.T)
        if found:
            found = {name: frame_actions.delayed(one, self.offset) for name, one in found.items()}
            found['usable'] = np.arange(count) >= self.offset
        if self.pose is not None:
            found['pose'] = columns[self.pose].astype(np.float32)
        return found


def part_index(term: Term, parts: list) -> int:
    """Returns the position of the part that a term names.

    Args:
      term: the term.
      parts: names of the values of its column.

    Raises:
      IngestError: there is no such part, or the column has several and the term names none.
    """
    if term.part is None and len(parts) == 1:
        return 0
    if term.part in parts:
        return parts.index(term.part)
    if term.part is not None and re.fullmatch(r'\d{1,9}', term.part):
        if int(term.part) < len(parts):
            return int(term.part)
    raise IngestError(
        f'{term.column}: got {"no part" if term.part is None else f"part {term.part}"}, '
        f'expected {term.column}[0] to [{len(parts) - 1}], or one of {", ".join(parts)[:200]}'
    )


def read(path: Path) -> ActionsMap:
    """Reads a map.

    Raises:
      IngestError: the file is no map; says what is wrong.
    """
    import yaml

    text = files.read_text(path)
    if len(text) > BYTES:
        raise IngestError(f'{path}: larger than {BYTES >> 10} KiB')
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = ' '.join(str(error).split())
        raise IngestError(f'{path}: not YAML ({said[:200]})') from error
    try:
        return parse(content)
    except IngestError as error:
        raise IngestError(f'{path}: {error}') from error


def parse(content: Any) -> ActionsMap:
    """Returns the map of the content of a file.

    Raises:
      IngestError: it is no map; says what is wrong.
    """
    content = {} if content is None else content
    _known('the file', content, SECTIONS)
    given: dict[str, Any] = {}
    for name in ('camera', 'pose'):
        if name in content:
            if not isinstance(content[name], str) or not content[name]:
                raise IngestError(f'{name}: got {shown(content[name])}, expected a column')
            given[name] = content[name]
    if 'offset' in content:
        offset = content['offset']
        if type(offset) is not int or not 0 <= offset <= LARGEST_OFFSET:
            raise IngestError(
                f'offset: got {shown(offset)}, expected a whole number of frames, 0 to '
                f'{LARGEST_OFFSET}'
            )
        given['offset'] = offset
    for section, names in (('keyboard', records.KEYS), ('driving', DRIVING)):
        if section in content:
            given[section] = _terms(section, content[section], names, COMPARISONS)
    if 'mouse' in content:
        mouse = content['mouse']
        _known('mouse', mouse, (*MOUSE, 'unit'))
        unit = mouse.get('unit', 'mouse')
        if not isinstance(unit, str) or unit not in UNITS:
            raise IngestError(f'mouse: unit: got {shown(unit)}, expected one of {", ".join(UNITS)}')
        given['unit'] = unit
        turns = {name: term for name, term in mouse.items() if name != 'unit'}
        given['mouse'] = _terms('mouse', turns, MOUSE, ('*',))
    return ActionsMap(**given)


def _terms(section: str, content: Any, names, signs) -> tuple[tuple[str, Term], ...]:
    _known(section, content, names)
    if not content:
        raise IngestError(f'{section}: got nothing, expected some of {", ".join(names)}')
    found = []
    for name, text in content.items():
        term = TERM.fullmatch(text) if isinstance(text, str) else None
        compares = '*' not in signs
        if not term or (term['sign'] or '*') not in signs:
            wanted = 'such as action[0] > 0.5' if compares else 'such as action[0] * -1'
            raise IngestError(f'{section}: {name}: got {shown(text)}, expected a term {wanted}')
        number = float(term['number'] or 1)
        found.append((name, Term(term['column'], term['part'], term['sign'] or '*', number)))
    return tuple(found)


def _known(where: str, content: Any, names):
    """Raises IngestError unless the content is a mapping with some of the names."""
    if not isinstance(content, dict):
        raise IngestError(f'{where}: got {shown(content)}, expected some of {", ".join(names)}')
    for name in content:
        if name not in names:
            raise IngestError(f'{where}: got {shown(name)}, expected some of {", ".join(names)}')


def shown(value: Any) -> str:
    """Returns a short text of a value of a file; of a container its type alone."""
    return type(value).__name__ if isinstance(value, (dict, list, tuple)) else repr(value)[:60]
