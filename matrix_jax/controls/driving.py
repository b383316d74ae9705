"""The nine controls of The Matrix (arXiv 2412.03568): symbols, prompts, padding, random signals.

A control signal is a comma-separated string, one symbol per latent frame (a quarter of a second).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from matrix_jax.controls.vocabulary import (
    ControlError,
    button,
    content,
    fill,
    json_entries,
    repeated,
)
from matrix_jax.video import KeyOverlay, arrows

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
FRAMES_PER_CONTROL = 4
BASE_SECONDS, FPS = 4, 16  # longest clip of the base stage


def parse(signal: str) -> list[str]:
    """Returns the symbols of a comma-separated signal.

    Raises:
      ControlError: a symbol is unknown; names the first few and their positions, counted from 1.
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


def read_sequence(text: str) -> list[str]:
    """Returns the symbols of a user's sequence.

    Args:
      text: such as 'D,D,DL' or 'D*12,DL*3', a JSON list of these, or the name of a file with
        either.

    Raises:
      ControlError: the sequence cannot be read.
    """
    text = content(text)
    if text.lstrip()[:1] in ('[', '{'):
        entries = json_entries(text)
        wrong = [
            place
            for place, entry in enumerate(entries, 1)
            if not isinstance(entry, str) or ',' in entry
        ]
        if wrong:
            raise ControlError(f'control: entry {wrong[0]}: expected text such as D or D*12')
    else:
        entries = text.replace('\n', ',').strip(' ,').split(',')
    parts = [entry.partition('*') for entry in entries]
    found: list[str] = []
    symbols = parse(','.join(symbol for symbol, _, _ in parts))
    for place, (symbol, (_, star, count)) in enumerate(zip(symbols, parts, strict=True), 1):
        found += repeated(symbol, count.strip() if star else '1', place, len(found))
    return found


def fit(
    symbols: Sequence[str], needed: int, pad: str | None = None, seed: int = 42
) -> tuple[list[str], str | None]:
    """Returns exactly `needed` symbols, and a note for the user or None.

    Args:
      symbols: from `parse`.
      needed: number of symbols.
      pad: how to continue a signal that is too short: 'random' (as the published call does), 'hold'
        (repeats the last symbol), or None (an error).
      seed: seed of 'random'.

    Raises:
      ControlError: there are too few symbols and no `pad`.
    """
    return fill(
        symbols, needed, pad, lambda more: parse(generate_random_control_signal(more, seed))
    )


def encode(symbols: Sequence[str]) -> np.ndarray:
    """Returns vocabulary indices int32 [N]."""
    return np.array([SYMBOLS.index(symbol) for symbol in symbols], np.int32)


def decode(indices) -> list[str]:
    """Returns the symbols of vocabulary indices; the null control is ''."""
    return [(*SYMBOLS, NULL_PROMPT)[index] for index in np.asarray(indices).ravel()]


def generate_random_control_signal(
    length: int,
    seed: int,
    repeat_lens: Sequence[int] = (2, 2, 2),
    signal_choices: Sequence[str] = ('D', 'DR', 'DL'),
    change_prob_increment: float = 0.2,
) -> str:
    """Returns a random signal: the first choice, interrupted by runs of one of the other choices.

    Args:
      length: number of symbols.
      seed: seed of numpy's default generator; gives the same signal as the published function.
      repeat_lens: shortest run of each choice.
      signal_choices: symbols; every other run is of the first one.
      change_prob_increment: how much the probability of a change grows with each repeat.

    Raises:
      ControlError: `length` is below 1, or `repeat_lens` does not fit `signal_choices`.
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
    """Returns the frames of the published call's base clip for a video of `length` seconds."""
    if length < 1:
        raise ControlError(f'length: got {length}, expected at least 1 second')
    return FPS * min(length, BASE_SECONDS) + 1


def base_signal(length: int, signal: str | None = None, seed: int = 42) -> str:
    """Returns the signal as the published call pads it, unused symbols included.

    PARITY: the padding starts again from the seed, and only reaches the end of the base clip.
    """
    needed = (base_frames(length) - 1) // FRAMES_PER_CONTROL + 1
    return _padded(signal, needed, seed)


def streaming_signal(
    signal: str, window_frames: int, groups: int, shifts: int, seed: int = 42
) -> str:
    """Returns a signal padded for `shifts` shifts of a window of `window_frames` pixel frames.

    PARITY: longer than what the shifts take.
    """
    latents = (window_frames - 1) / FRAMES_PER_CONTROL
    return _padded(signal, math.ceil(latents * (shifts / groups + 1)) + 1, seed)


def one_per_latent(symbols: Sequence[str]) -> list[str]:
    """Returns the symbols of latent frames, given those of pixel frames."""
    return list(symbols[::FRAMES_PER_CONTROL])


def _padded(signal, needed, seed):
    got = len(signal.split(',')) if signal else 0
    if got >= needed:
        return signal
    more = generate_random_control_signal(needed - got, seed)
    return f'{signal},{more}' if signal else more


# --- as a vocabulary -----------------------------------------------------------------------------


class DrivingVocabulary:
    """The nine controls as a `Vocabulary`, which has the docstrings of the methods."""

    choices = SYMBOLS
    frames_per_control = FRAMES_PER_CONTROL
    idle = 'N'

    def canonical(self, text: str) -> str:
        if text not in PROMPTS:
            raise ControlError(
                f'control: unknown symbol {text[:40]!r}; expected {", ".join(SYMBOLS)}'
            )
        return text

    def count(self, text: str) -> int | None:
        return len(read_sequence(text))

    def read(
        self, text: str | None, needed: int, pad: str | None = None, seed: int = 42
    ) -> tuple[list[str], list[str]]:
        if text is None:
            return self.random(needed, seed), []
        symbols, note = fit(read_sequence(text), needed, pad, seed)
        return symbols, [note] if note else []

    def random(self, needed: int, seed: int) -> list[str]:
        return generate_random_control_signal(needed, seed).split(',')

    def encode(self, controls: Sequence[str]) -> np.ndarray:
        return encode(controls)

    def overlay(self, control: str) -> KeyOverlay:
        return arrows(control)

    def key_layout(self) -> dict[str, Any]:
        keys = (
            ('up', '\u25b2', 'Ahead', 0, 1, 'KeyW', 'ArrowUp'),
            ('left', '\u25c0', 'Left', 1, 0, 'KeyA', 'ArrowLeft'),
            ('down', '\u25bc', 'Back', 1, 1, 'KeyS', 'ArrowDown'),
            ('right', '\u25b6', 'Right', 1, 2, 'KeyD', 'ArrowRight'),
        )
        return {
            'buttons': [button(*key) for key in keys],
            'axes': [
                {'none': 'N', 'keys': {'up': 'D', 'down': 'B'}},
                {'none': '', 'keys': {'left': 'L', 'right': 'R'}},
            ],
            'join': '',
            'idle': 'N',
            'hint': 'Hold W A S D or the arrows.',
            'mouse': None,
        }
