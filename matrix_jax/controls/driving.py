"""The nine controls of The Matrix: symbols, prompts, reading, padding and random drives.

A control signal is a comma-separated string, one symbol per latent frame (a quarter of a second).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from matrix_jax.video import Held, arrows

PROMPTS = {
    'D': 'The car is moving straight ahead.',
    'DL': 'The car is turning left ahead.',
    'DR': 'The car is turning right ahead.',
    'B': 'The car is reversing backward.',
    'BL': 'The car is turning left while reversing.',
    'BR': 'The car is turning right while reversing.',
    'N': 'The car is in neutral gear.',
    'NL': 'The car is coasting in neutral and turning left.',
    'NR': 'The car is coasting in neutral and turning right.',
}
SYMBOLS = tuple(PROMPTS)
NULL = len(SYMBOLS)  # index of the null control: the empty prompt, last row of a table
NULL_PROMPT = ''
PADS = ('random', 'hold')
FRAMES_PER_CONTROL = 4
BASE_SECONDS, FPS = 4, 16  # longest clip of the base stage


class ControlError(ValueError):
    """A control signal that cannot be driven."""


def parse(signal: str) -> list[str]:
    """Symbols of a comma-separated signal.

    Raises:
      ControlError: names each unknown symbol (the first few) and its position, counted from 1.
    """
    if not signal.strip():
        raise ControlError(
            f'control: got no symbols, expected some of {", ".join(SYMBOLS)}, separated by commas'
        )
    symbols = [symbol.strip() for symbol in signal.split(',')]
    unknown = [(place, symbol) for place, symbol in enumerate(symbols, 1) if symbol not in PROMPTS]
    if unknown:
        shown = ', '.join(
            f'{symbol!r} at position {place} of {len(symbols)}' for place, symbol in unknown[:3]
        )
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise ControlError(f'control: unknown symbol {shown}{more}; expected {", ".join(SYMBOLS)}')
    return symbols


def fit(
    symbols: Sequence[str], needed: int, pad: str | None = None, seed: int = 42
) -> tuple[list[str], str | None]:
    """Exactly `needed` symbols.

    Args:
      symbols: from `parse`.
      pad: what follows a signal that is too short: 'random' (seeded, like the published call),
        'hold' (the last symbol), or None (an error).
      seed: of 'random'.

    Returns:
      (symbols, note for the user or None).

    Raises:
      ControlError: too few symbols and no padding.
    """
    return fill(
        symbols, needed, pad, lambda more: parse(generate_random_control_signal(more, seed))
    )


def fill(
    given: Sequence[str],
    needed: int,
    pad: str | None,
    random: Callable[[int], list[str]],
    what: str = 'control',
    noun: str = 'symbols',
) -> tuple[list[str], str | None]:
    """`fit` of any vocabulary: `random(n)` makes n more."""
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


def encode(symbols: Sequence[str]) -> np.ndarray:
    """Vocabulary indices int32 [N]."""
    return np.array([SYMBOLS.index(symbol) for symbol in symbols], np.int32)


def decode(indices) -> list[str]:
    """Symbols of vocabulary indices; the null control is ''."""
    return [(*SYMBOLS, NULL_PROMPT)[index] for index in np.asarray(indices).ravel()]


def generate_random_control_signal(
    length: int,
    seed: int,
    repeat_lens: Sequence[int] = (2, 2, 2),
    signal_choices: Sequence[str] = ('D', 'DR', 'DL'),
    change_prob_increment: float = 0.2,
) -> str:
    """A random drive: choice 0, and between two stretches of it one of the other choices.

    Args:
      length: symbols.
      seed: of numpy's default generator; the same seed gives the published signal.
      repeat_lens: shortest stretch of each choice.
      signal_choices: symbols; the first is the resting one.
      change_prob_increment: what each further repeat adds to the probability of a change.

    Returns:
      Comma-separated symbols.
    """
    if length < 1:
        raise ControlError(f'length: got {length}, expected at least 1')
    if len(repeat_lens) != len(signal_choices):
        raise ControlError(
            f'repeat_lens: got {len(repeat_lens)}, expected one for each of the '
            f'{len(signal_choices)} signal_choices'
        )
    random = np.random.default_rng(seed)
    index, repeats, chance = 0, 0, change_prob_increment
    symbols = []
    for _ in range(length):
        if repeats < repeat_lens[index]:
            repeats += 1
        # A draw is made only while the change is not certain: the sequence of draws is published.
        elif chance >= 1 or random.uniform(0, 1) < chance:
            index = int(random.choice(list(range(1, len(signal_choices))))) if index == 0 else 0
            repeats, chance = 1, change_prob_increment
        else:
            repeats, chance = repeats + 1, min(1, chance + change_prob_increment)
        symbols.append(signal_choices[index])
    return ','.join(symbols)


def base_frames(length: int) -> int:
    """Frames of the base clip of the published call for `length` seconds."""
    if length < 1:
        raise ControlError(f'length: got {length}, expected at least 1 second')
    return FPS * min(length, BASE_SECONDS) + 1


def base_signal(length: int, signal: str | None = None, seed: int = 42) -> str:
    """The signal of the published call after its own padding, unused symbols included.

    PARITY: the padding starts again from the seed, and only reaches the end of the base clip.
    """
    needed = (base_frames(length) - 1) // FRAMES_PER_CONTROL + 1
    return _padded(signal, needed, seed)


def streaming_signal(
    signal: str, window_frames: int, groups: int, shifts: int, seed: int = 42
) -> str:
    """A signal padded for `shifts` shifts of a window of `window_frames` pixel frames.

    PARITY: longer than what the shifts consume.
    """
    latents = (window_frames - 1) / FRAMES_PER_CONTROL
    return _padded(signal, math.ceil(latents * (shifts / groups + 1)) + 1, seed)


def one_per_latent(symbols: Sequence[str]) -> list[str]:
    """Symbols of latent frames from those of pixel frames."""
    return list(symbols[::FRAMES_PER_CONTROL])


def _padded(signal, needed, seed):
    got = len(signal.split(',')) if signal else 0
    if got >= needed:
        return signal
    more = generate_random_control_signal(needed - got, seed)
    return f'{signal},{more}' if signal else more


# --- as a vocabulary -----------------------------------------------------------------------------


class DrivingVocabulary:
    """The vocabulary of the nine controls. All vocabularies have what this one has, so that whoever
    generates and serves a world need not know which it is; a control is a text.

    Attributes:
      frames: pixel frames that one control steers.
      idle: the control of a player who holds no key.
      choices: controls for who can only choose among a few.
    """

    choices = SYMBOLS
    frames = FRAMES_PER_CONTROL
    idle = 'N'

    def canonical(self, text: str) -> str:
        """The one spelling of a control.

        Raises:
          ControlError: it is none.
        """
        if text not in PROMPTS:
            raise ControlError(
                f'control: unknown symbol {text[:40]!r}; expected {", ".join(SYMBOLS)}'
            )
        return text

    def count(self, text: str) -> int | None:
        """How many controls a text has; None for one that is as long as the video.

        Raises:
          ControlError: what is wrong with it.
        """
        return len(parse(text))

    def read(self, text: str | None, needed: int, pad: str | None = None, seed: int = 42):
        """(controls, notes for the user): exactly `needed` of what the user gave; None = random.

        Raises:
          ControlError: what is wrong with it.
        """
        if text is None:
            return self.random(needed, seed), []
        symbols, note = fit(parse(text), needed, pad, seed)
        return symbols, [note] if note else []

    def random(self, needed: int, seed: int) -> list[str]:
        """`needed` random controls."""
        return generate_random_control_signal(needed, seed).split(',')

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """What the stream takes of each control, stacked."""
        return encode(texts)

    def overlay(self, text: str) -> Held:
        """What the overlay shows."""
        return arrows(text)

    def key_layout(self) -> dict:
        """What a player's page offers.

        `buttons` of name, label, what they do, place and key codes; `axes` of which each adds the
        word of its only held button, or its 'none'; how to `join` the words, and what to say if
        there are none; `mouse`: speed and limit, or None.
        """
        sides = (
            ('up', '\u25b2', 'Ahead', 0, 1, 'KeyW', 'ArrowUp'),
            ('left', '\u25c0', 'Left', 1, 0, 'KeyA', 'ArrowLeft'),
            ('down', '\u25bc', 'Back', 1, 1, 'KeyS', 'ArrowDown'),
            ('right', '\u25b6', 'Right', 1, 2, 'KeyD', 'ArrowRight'),
        )
        return {
            'buttons': [
                {
                    'name': name,
                    'label': label,
                    'about': about,
                    'row': row,
                    'column': column,
                    'codes': codes,
                }
                for name, label, about, row, column, *codes in sides
            ],
            'axes': [
                {'none': 'N', 'keys': {'up': 'D', 'down': 'B'}},
                {'none': '', 'keys': {'left': 'L', 'right': 'R'}},
            ],
            'join': '',
            'idle': 'N',
            'hint': 'Hold W A S D or the arrows.',
            'mouse': None,
        }
