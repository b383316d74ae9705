"""The protocol of all vocabularies, the words that a player can press; and what they share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from matrix_jax.video import KeyOverlay

PADS = ('random', 'hold')
MAX_FRAMES = 10**7  # controls of a sequence
FILE_BYTES = 2**24  # of a file with a sequence


class ControlError(ValueError):
    """A control, or a sequence of controls, cannot be used."""


class Vocabulary(Protocol):
    """The controls of a world. A control is a text, such as 'DL' or 'W+right'.

    Attributes:
      choices: controls to offer where only a few can be chosen from, as in a discrete action space.
      frames_per_control: pixel frames that one control steers.
      idle: the control while no key is pressed.
    """

    @property
    def choices(self) -> tuple[str, ...]: ...
    @property
    def frames_per_control(self) -> int: ...
    @property
    def idle(self) -> str: ...

    def canonical(self, text: str) -> str:
        """Returns the one spelling of a control.

        Raises:
          ControlError: the text is no control.
        """
        ...

    def count(self, text: str) -> int | None:
        """Returns how many controls a sequence has; None if it is as long as it needs to be.

        Raises:
          ControlError: the sequence cannot be read.
        """
        ...

    def read(
        self, text: str | None, needed: int, pad: str | None = None, seed: int = 42
    ) -> tuple[list[str], list[str]]:
        """Returns exactly `needed` controls, and notes for the user.

        Args:
          text: a sequence of controls; None = random controls.
          needed: number of controls.
          pad: how to continue a sequence that is too short: 'random', 'hold' (repeats the last
            control), or None (an error).
          seed: seed of random controls.

        Raises:
          ControlError: the sequence cannot be read, or is too short without `pad`.
        """
        ...

    def random(self, needed: int, seed: int) -> list[str]:
        """Returns `needed` random controls."""
        ...

    def encode(self, controls: Sequence[str]) -> np.ndarray[Any, Any]:
        """Returns what the stream takes for each control, stacked on axis 0."""
        ...

    def overlay(self, control: str) -> KeyOverlay:
        """Returns the keys to draw on a frame of this control."""
        ...

    def key_layout(self) -> dict[str, Any]:
        """Returns the controls of the web page, as JSON.

        `buttons`: name, label, description (`about`), row and column, key codes. `axes`: each adds
        the word of the one button that is pressed, or its `none`. `join`: text between the words.
        `idle`: the control if there are no words. `hint`: help for the player. `mouse`: speed and
        limit of the mouse, or None.
        """
        ...


def fill(
    given: Sequence[str],
    needed: int,
    pad: str | None,
    random: Callable[[int], list[str]],
    what: str = 'control',
    noun: str = 'symbols',
) -> tuple[list[str], str | None]:
    """Returns exactly `needed` controls, and a note for the user or None.

    Args:
      given: controls of the user.
      needed: number of controls.
      pad: see `Vocabulary.read`.
      random: `n -> n random controls`.
      what, noun: names of a sequence and of its controls, for messages.

    Raises:
      ControlError: there are too few controls and no `pad`.
    """
    if pad is not None and pad not in PADS:
        raise ControlError(f'pad: got {pad!r}, expected one of {", ".join(PADS)}')
    given, got = list(given), len(given)
    if got >= needed:
        note = f'{what}: {got} {noun}, {needed} needed; the last {got - needed} are not used'
        return given[:needed], note if got > needed else None
    missing = needed - got
    if pad is None:
        raise ControlError(
            f'{what}: got {got} {noun}, expected {needed}; positions {got + 1} to '
            f'{needed} are missing (pad with {" or ".join(PADS)} if that is meant)'
        )
    if pad == 'hold' and not given:
        raise ControlError(f"{what}: got no {noun}, 'hold' needs at least one")
    more = given[-1:] * missing if pad == 'hold' else random(missing)
    return given + more, f'{what}: {got} {noun}, {needed} needed; {missing} added by pad={pad}'


def content(text: str) -> str:
    """Returns the content of the file that `text` names, or `text` if it names none.

    Raises:
      ControlError: the file is not readable, or too large.
    """
    looks = text.strip().lower().endswith(('.json', '.txt'))
    try:
        path = Path(text.strip()).expanduser()
        if not (looks or path.is_file()):
            return text
        if path.stat().st_size > FILE_BYTES:
            raise ControlError(f'{path}: larger than {FILE_BYTES >> 20} MiB')
        return path.read_text(encoding='utf-8-sig')
    except ControlError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if looks:
            raise ControlError(f'{text.strip()}: not readable ({error})') from None
        return text


def json_entries(text: str, what: str = 'control') -> list[Any]:
    """Returns the entries of a sequence in JSON: a list, or an object with a list "actions".

    Raises:
      ControlError: it is neither, or has no entries.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlError(f'{what}: not readable JSON ({error})') from None
    entries = entries.get('actions') if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries:
        raise ControlError(f'{what}: expected a JSON list, or an object with a list "actions"')
    return entries


def repeated(control: str, count: str, place: int, before: int, what: str = 'control') -> list[str]:
    """Returns a control `count` times.

    Args:
      control: the control.
      count: digits, as the user wrote them.
      place: number of the entry, for messages.
      before: controls of the sequence so far.
      what: name of the sequence, for messages.

    Raises:
      ControlError: `count` is no number, or the sequence gets too long.
    """
    if not re.fullmatch(r'[1-9]\d{0,7}', count) or before + int(count) > MAX_FRAMES:
        raise ControlError(
            f'{what}: got {control}*{count[:20]} (entry {place}), expected a '
            f'number of frames, at most {MAX_FRAMES} in all'
        )
    return [control] * int(count)


def button(
    name: str, label: str, about: str, row: int | None, column: int | None, *codes: str
) -> dict[str, Any]:
    """Returns a button of `Vocabulary.key_layout`; `codes` are those of browser key events."""
    return {
        'name': name,
        'label': label,
        'about': about,
        'row': row,
        'column': column,
        'codes': list(codes),
    }
