"""Keyboard and mouse of Matrix-Game 2.0 (arXiv 2508.13009) and 3.0: words, sequences, benchmarks.

An action is a text of words joined by '+' ('W', 'W+right', 'idle'), one per pixel frame. A sequence
is a text such as 'W*12,W+right*24,idle*12', a JSON list, or the name of a file with either. The
network gets a vector of each action: the keys, then the mouse (pitch: up is positive; yaw: right is
positive).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from matrix_jax.controls.modes import IDLE, LIMIT, MODES, MOUSE, SPEED, Mode
from matrix_jax.controls.vocabulary import (
    ControlError,
    button,
    content,
    fill,
    json_entries,
    repeated,
)
from matrix_jax.video import KeyOverlay

BENCHMARK = 'benchmark'
BENCHMARK_FRAMES = 12  # how long a benchmark sequence holds an action


class KeyboardMouseVocabulary:
    """The actions of a mode as a `Vocabulary`, which has the docstrings of most methods.

    Args:
      mode: a key of `modes.MODES`.

    Raises:
      ValueError: there is no such mode.
    """

    frames_per_control = 1
    idle = IDLE

    def __init__(self, mode: str):
        if mode not in MODES:
            raise ValueError(f'mode: got {mode!r}, expected one of {", ".join(MODES)}')
        self.mode = MODES[mode]
        words = {word: word for word in self.mode.words} | dict(self.mode.letters)
        self._words = {spelled.lower(): word for spelled, word in words.items()}

    @property
    def choices(self) -> tuple[str, ...]:
        """The idle action, and those of benchmark sequences."""
        return tuple(dict.fromkeys([IDLE, *map(self.canonical, _choices(self.mode))]))

    # --- reading -------------------------------------------------------------------------------

    def canonical(self, text: str) -> str:
        return _canonical(self, text)

    def parse(self, text: str) -> list[str]:
        """Returns the actions of a sequence, one per frame.

        Args:
          text: a sequence as text or JSON, or the name of a file with either.

        Raises:
          ControlError: an entry cannot be read; says which one.
        """
        text = content(text)
        if text.lstrip()[:1] in ('[', '{'):
            return self._from_json(text)
        if not text.strip():
            raise ControlError('actions: got none, expected such as W*12,W+right*24,idle*12')
        actions = []
        for place, part in enumerate(text.replace('\n', ',').strip(' ,').split(','), 1):
            action, star, count = part.partition('*')
            self._add(actions, action, count.strip() if star else '1', place)
        return actions

    def _from_json(self, text: str) -> list[str]:
        actions: list[str] = []
        for place, entry in enumerate(json_entries(text, 'actions'), 1):
            if isinstance(entry, str):
                entry = {'keys': entry}
            if not isinstance(entry, dict) or set(entry) - {'keys', 'mouse', 'frames'}:
                raise ControlError(
                    f'actions: entry {place}: expected text, or an object of keys, '
                    'mouse [pitch, yaw] and frames'
                )
            keys, mouse = entry.get('keys', ''), entry.get('mouse', [0, 0])
            keys = '+'.join(map(str, keys)) if isinstance(keys, list) else keys
            if (
                not isinstance(keys, str)
                or not isinstance(mouse, list)
                or len(mouse) != 2
                or any(type(one) not in (int, float) for one in mouse)
            ):
                raise ControlError(
                    f'actions: entry {place}: expected keys as text or a list of '
                    'words, and mouse as [pitch, yaw]'
                )
            keys, star, count = keys.partition('*')
            words = [keys.strip(), *_mouse_words(mouse)]
            self._add(
                actions,
                '+'.join(filter(None, words)) or IDLE,
                str(entry.get('frames', count.strip() if star else 1)),
                place,
            )
        return actions

    def _add(self, actions: list[str], text: str, count: str, place: int):
        try:
            action = self.canonical(text)
        except ControlError as error:
            raise ControlError(f'{error} (entry {place})') from None
        actions += repeated(action, count, place, len(actions), 'actions')

    def count(self, text: str) -> int | None:
        return None if _benchmark(text) else len(self.parse(text))

    def read(
        self, text: str | None, needed: int, pad: str | None = None, seed: int = 42
    ) -> tuple[list[str], list[str]]:
        """See `Vocabulary.read`. 'benchmark' and 'benchmark:SEED' are sequences of the reference;
        random actions are those of a benchmark sequence."""
        if text is None:
            return self.random(needed, seed), []
        if _benchmark(text):
            _, colon, own = text.strip().partition(':')
            if colon and not own.isdecimal():
                raise ControlError(f'actions: got {text!r}, expected benchmark:SEED')
            return self.random(needed, int(own) if colon else seed), []
        actions, note = fill(
            self.parse(text), needed, pad, lambda more: self.random(more, seed), 'actions', 'frames'
        )
        return actions, [note] if note else []

    def random(self, needed: int, seed: int) -> list[str]:
        """Returns the reference's benchmark sequence of `needed` frames."""
        chance, choices = random.Random(seed), [self.canonical(one) for one in _choices(self.mode)]
        actions: list[str] = []
        while len(actions) < needed:
            # PARITY: the reference draws among one choice here; its first action lasts one frame.
            chance.randint(0, 0)
            action = choices[chance.randint(0, len(choices) - 1)]
            actions += [action] * min(BENCHMARK_FRAMES if actions else 1, needed - len(actions))
        return actions

    # --- what the network, the screen and the web page get ---------------------------------------

    def encode(self, controls: Sequence[str]) -> np.ndarray:
        """Returns float32 [N A]: the keys, then the mouse if there is one."""
        return np.stack([_vector(self, action) for action in controls])

    def decode(self, vectors) -> list[str]:
        """Returns the actions of vectors [N A], with mouse amounts to four digits."""
        keys = len(self.mode.keys)
        return [
            _spelled(
                self.mode,
                [word for word, down in zip(self.mode.keys, vector) if down],
                vector[keys:].tolist(),
            )
            for vector in np.asarray(vectors, np.float32)
        ]

    def overlay(self, control: str) -> KeyOverlay:
        names = {word: letter for letter, word in self.mode.letters}
        words = [word.partition(':')[0] for word in control.split('+')]
        lit = frozenset(names.get(word, word) for word in words)
        # If letters move the mouse, they show all of its movement.
        stick = None
        if self.mode.mouse and not self.mode.letters:
            stick = tuple(float(part) for part in _vector(self, control)[-2:])
        return KeyOverlay(self.mode.pad, lit, stick)

    def key_layout(self) -> dict[str, Any]:
        mode = self.mode
        means = {letter: letter for letter, *_ in mode.pad} | {
            letter: word for letter, word in mode.letters if word != IDLE
        }
        letters = [letter for letter, *_ in mode.pad]
        groups = [letters] if mode.alone else [['W', 'S'], ['A', 'D']]
        # Without a mouse to look around with, the arrows mean the same as the letters.
        look = mode.mouse and not mode.letters
        arrows = {'W': 'ArrowUp', 'A': 'ArrowLeft', 'S': 'ArrowDown', 'D': 'ArrowRight'}
        buttons = [
            button(
                letter,
                letter,
                means[letter],
                row,
                column,
                f'Key{letter}',
                *([arrows[letter]] if letter in arrows and not look else []),
            )
            for letter, row, column in mode.pad
        ]
        axes = [
            {'none': '', 'keys': {letter: means[letter] for letter in group}} for group in groups
        ]
        if look:
            axes += [
                {'none': '', 'keys': {'look up': 'up', 'look down': 'down'}},
                {'none': '', 'keys': {'look left': 'left', 'look right': 'right'}},
            ]
            buttons += [
                button(f'look {side.lower()}', '', f'look {side}', None, None, f'Arrow{side}')
                for side in ('Up', 'Down', 'Left', 'Right')
            ]
        hint = (
            '; the arrows look around, and so does the mouse: drag the picture, or click on it.'
            if look
            else ' or the arrows.'
        )
        return {
            'buttons': buttons,
            'axes': axes,
            'join': '+',
            'idle': IDLE,
            'hint': f'Hold {" ".join(letters)}{hint}',
            'mouse': {'speed': SPEED, 'limit': 4 * SPEED} if look else None,
        }


def _benchmark(text: str) -> bool:
    """Returns whether a text names a sequence of the reference."""
    return text.strip().partition(':')[0] == BENCHMARK


@functools.lru_cache(4096)
def _canonical(vocabulary: KeyboardMouseVocabulary, text: str) -> str:
    mode = vocabulary.mode
    found: dict[str, float] = {}
    for part in text.split('+'):
        spelled, colon, amount = (one.strip() for one in part.partition(':'))
        word = vocabulary._words.get(spelled.lower())
        if word is None:
            if spelled.lower() in MOUSE:
                raise ControlError(
                    f'actions: {spelled!r} moves the mouse, and {mode.name} has '
                    f'none; expected {_listed(vocabulary)}'
                )
            raise ControlError(
                f'actions: unknown action {spelled[:40]!r} of {mode.name}; expected '
                f'{_listed(vocabulary)}'
            )
        if word in found:
            raise ControlError(f'actions: got {word!r} twice in {text.strip()[:60]!r}')
        found[word] = SPEED if word in MOUSE and mode.mouse else 1.0
        if colon:
            found[word] = _amount(word, amount, mode)
    keys = [word for word in mode.keys if word in found]
    if (mode.alone and len(keys) > 1) or (IDLE in found and len(found) > 1):
        raise ControlError(f'actions: got {text.strip()[:60]!r}, expected one of them alone')
    return _spelled(
        mode,
        keys,
        [
            sum(MOUSE[word][axis] * found[word] for word in MOUSE if word in found)
            for axis in (0, 1)
        ],
    )


def _spelled(mode: Mode, keys: Sequence[str | None], mouse) -> str:
    """Returns the action of pressed keys and a mouse movement (pitch, yaw)."""
    return '+'.join([*filter(None, keys), *(_mouse_words(mouse) if mode.mouse else ())]) or IDLE


def _amount(word: str, amount: str, mode: Mode) -> float:
    if not (word in MOUSE and mode.mouse):
        raise ControlError(f'actions: got {word}:{amount[:20]}, expected no amount for a key')
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if not 0 < value <= LIMIT:
        raise ControlError(
            f'actions: got {word}:{amount[:20]}, expected an amount above 0, at most {LIMIT:g}'
        )
    return value


def _mouse_words(mouse) -> list[str]:
    """Returns the words of a mouse movement (pitch, yaw)."""
    words = []
    for value, names in zip(mouse, (('up', 'down'), ('right', 'left'))):
        if not abs(value) <= LIMIT:
            raise ControlError(
                f'actions: got a mouse movement of {value}, expected at most {LIMIT:g}'
            )
        if round(abs(value), 4):
            amount = f'{round(abs(value), 4):g}'
            name = names[0] if value > 0 else names[1]
            words.append(name if amount == f'{SPEED:g}' else f'{name}:{amount}')
    return words


@functools.lru_cache(4096)
def _vector(vocabulary: KeyboardMouseVocabulary, action: str) -> np.ndarray:
    mode = vocabulary.mode
    vector = np.zeros(mode.width, np.float32)
    for part in action.split('+'):
        word, _, amount = part.partition(':')
        if word == IDLE:
            if None in mode.keys:
                vector[mode.keys.index(None)] = 1
        elif word in mode.keys:
            vector[mode.keys.index(word)] = 1
        else:
            for axis, sign in enumerate(MOUSE[word]):
                if sign:
                    vector[len(mode.keys) + axis] = sign * float(amount or SPEED)
    vector.flags.writeable = False
    return vector


def _choices(mode: Mode) -> list[str]:
    """Returns the actions that a benchmark sequence draws from, in the order of the reference."""
    camera = ['left', 'right']
    if not mode.keys:
        return [IDLE]
    if mode.alone:
        return ['jump', 'slide', 'leftside', 'rightside', 'turnleft', 'turnright', IDLE]
    if mode.letters:
        moves = ['W', 'S']
        return camera * 2 + moves * 2 + [f'{move}+{look}' for move in moves for look in camera]
    moves = ['W', 'A', 'D', 'W+A', 'W+D']
    return (
        moves[3:] * 5
        + camera * 5
        + moves[:3] * 5
        + [f'{move}+{look}' for move in moves for look in camera]
    )


def _listed(vocabulary: KeyboardMouseVocabulary) -> str:
    letters = [letter for letter, word in vocabulary.mode.letters if word != IDLE]
    return ', '.join([*vocabulary.mode.words, *letters])
