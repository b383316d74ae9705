"""What the rest of the package asks of a vocabulary: the words that a player can press."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from matrix_jax.video import Held


class Vocabulary(Protocol):
    """The controls of a world. A control is a text, such as 'DL' or 'W+right'.

    Attributes:
      choices: controls to offer where only a few can be chosen from, as in a discrete action space.
      frames: pixel frames that one control steers.
      idle: the control while no key is pressed.
    """

    @property
    def choices(self) -> tuple[str, ...]: ...
    @property
    def frames(self) -> int: ...
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

    def overlay(self, control: str) -> Held:
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
