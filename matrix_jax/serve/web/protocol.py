"""The JSON messages that a player may send, and the checks of every field."""

from __future__ import annotations

import json

from matrix_jax.serve.runtime import session_log

MAX_CHARACTERS = 4096  # of a message
MAX_NAME = 64  # characters of a token, a control or the name of a start clip


class MessageError(ValueError):
    """A message that is not part of the protocol."""


def _integer(low, high):
    return lambda value: type(value) is int and low <= value <= high, f'{low} to {high}'


def _text(longest):
    return (
        lambda value: session_log.is_text(value, longest),
        f'a string of at most {longest} characters',
    )


def _or_null(check):
    return lambda value: value is None or check[0](value), f'{check[1]}, or null'


FLAG = (lambda value: type(value) is bool, 'true or false')
START = {
    'start': _or_null(_text(MAX_NAME)),
    'prompt': _or_null(_text(session_log.MAX_PROMPT)),
    'seed': _or_null(_integer(0, session_log.MAX_SEED)),
}
# Message type -> field -> (check, what the field must be).
FIELDS = {
    'join': {'session': _or_null(_text(MAX_NAME)), **START},
    'keys': {'id': _integer(1, 2**31 - 1), 'symbol': _text(MAX_NAME)},  # the world checks `symbol`
    'seen': {'frame': _integer(0, 2**53)},
    'prompt': {'text': _text(session_log.MAX_PROMPT)},
    'restart': START,
    'pause': {'on': FLAG},
    'rewind': {'seconds': _integer(1, 60)},
    'keep': {},
    'recall': {},
    'leave': {},
    'record': {'on': FLAG},
}


def parse(text: str) -> dict:
    """Parses a message.

    Raises:
      MessageError: what is wrong with it, in one line that may be shown.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise MessageError(f'expected text of at most {MAX_CHARACTERS} characters')
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError('not JSON') from None
    return check(message)


def check(message) -> dict:
    """Returns a message if it is part of the protocol.

    Raises:
      MessageError: what is wrong with it, in one line that may be shown.
    """
    kind = message.get('type') if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise MessageError(f'expected an object with a type of {", ".join(FIELDS)}')
    fields = FIELDS[kind]
    if set(message) - {'type'} != set(fields):
        raise MessageError(f'{kind}: expected the fields {", ".join(fields) or "(none)"}')
    for name, (check, expected) in fields.items():
        if not check(message[name]):
            raise MessageError(f'{kind}.{name}: expected {expected}')
    return message


def parse_join(text: str) -> dict:
    """Parses the first message of a player.

    Raises:
      MessageError: it is not a 'join'.
    """
    message = parse(text)
    if message['type'] != 'join':
        raise MessageError('expected join first')
    return message
