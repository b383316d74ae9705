"""What a player may say: a closed list of JSON messages, every field checked."""

from __future__ import annotations

import dataclasses
import json
import time

from matrix_jax.serve.runtime import session_log

MAX_BYTES = 4096
NAME = 64  # characters of a token or of a start clip's name


class MessageError(ValueError):
    """A message that is none of ours."""


def _whole(low, high):
    return lambda value: type(value) is int and low <= value <= high, f'{low} to {high}'


def _text(longest):
    # Half a surrogate pair is valid JSON, but no text that a tokenizer takes.
    return (
        lambda value: (
            isinstance(value, str)
            and len(value) <= longest
            and not any('\ud800' <= letter <= '\udfff' for letter in value)
        ),
        f'a string of at most {longest} characters',
    )


def _or_null(check):
    return lambda value: value is None or check[0](value), f'{check[1]}, or null'


FLAG = (lambda value: type(value) is bool, 'true or false')
KINDS = {
    'join': {
        'session': _or_null(_text(NAME)),
        'start': _or_null(_text(NAME)),
        'prompt': _or_null(_text(session_log.MAX_PROMPT)),
        'seed': _or_null(_whole(0, session_log.MAX_SEED)),
    },
    'keys': {'id': _whole(1, 2**31 - 1), 'symbol': _text(NAME)},  # which there are, the world says
    'seen': {'frame': _whole(0, 2**53)},
    'prompt': {'text': _text(session_log.MAX_PROMPT)},
    'restart': {
        'start': _or_null(_text(NAME)),
        'prompt': _or_null(_text(session_log.MAX_PROMPT)),
        'seed': _or_null(_whole(0, session_log.MAX_SEED)),
    },
    'pause': {'on': FLAG},
    'rewind': {'seconds': _whole(1, 60)},
    'keep': {},
    'recall': {},
    'leave': {},
    'record': {'on': FLAG},
}


def parse(text: str) -> dict:
    """The message that `text` spells.

    Raises:
      MessageError: what is wrong with it, in one line that may be shown.
    """
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise MessageError(f'expected text of at most {MAX_BYTES} characters')
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError('not JSON') from None
    kind = found.get('type') if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise MessageError(f'expected an object with a type of {", ".join(KINDS)}')
    fields = KINDS[kind]
    if set(found) - {'type'} != set(fields):
        raise MessageError(f'{kind}: expected the fields {", ".join(fields) or "(none)"}')
    for name, (check, wanted) in fields.items():
        if not check(found[name]):
            raise MessageError(f'{kind}.{name}: expected {wanted}')
    return found


@dataclasses.dataclass
class Bucket:
    """Lets `rate` messages a second pass, and `burst` at once."""

    rate: float
    burst: float

    def __post_init__(self):
        self.level, self.at = self.burst, time.monotonic()

    def take(self) -> bool:
        """Whether one more may pass now."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def pay(self, cost: float):
        """Takes more, afterwards; the next ones wait until that is filled up."""
        self.level -= cost

    @property
    def wait(self) -> float:
        """Seconds until one may pass, as of the last `take`."""
        return max(0.0, (1 - self.level) / self.rate)
