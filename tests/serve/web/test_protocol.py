"""What a player may say, and nothing else."""

import json

import pytest

from matrix_jax.serve.runtime import token_bucket
from matrix_jax.serve.web import protocol
from matrix_jax.serve.web.protocol import MessageError


@pytest.mark.parametrize(
    'message',
    [
        {'type': 'keys', 'id': 3, 'symbol': 'BL'},
        {'type': 'join', 'session': None, 'start': 'snow', 'prompt': 'A car.', 'seed': 0},
        {'type': 'leave'},
    ],
)
def test_messages_pass(message):
    assert protocol.parse(json.dumps(message)) == message


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'not JSON'),
        ('[' * 4000, 'not JSON'),
        ('[]', 'an object with a type'),
        ('{"type": ["keys"]}', 'an object with a type'),
        ('x' * 5000, 'at most 4096'),
        ('{"type": "leave", "id": 1}', r'leave: expected the fields \(none\)'),
        ('{"type": "keys", "id": 1}', 'keys: expected the fields id, symbol'),
        ('{"type": "keys", "id": true, "symbol": "D"}', 'keys.id'),
        ('{"type": "keys", "id": 1, "symbol": ["D"]}', 'keys.symbol'),
        ('{"type": "keys", "id": 1e99, "symbol": "D"}', 'keys.id'),
        ('{"type": "seen", "frame": NaN}', 'seen.frame'),
        ('{"type": "prompt", "text": "\\ud800"}', 'prompt.text'),
        (json.dumps({'type': 'prompt', 'text': 'x' * 501}), 'at most 500'),
        ('{"type": "pause", "on": 1}', 'pause.on: expected true or false'),
    ],
)
def test_anything_else_does_not(text, message):
    with pytest.raises(MessageError, match=message):
        protocol.parse(text)


def test_a_bucket_runs_dry_and_fills(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(token_bucket.time, 'monotonic', lambda: now[0])
    bucket = token_bucket.TokenBucket(rate=2, burst=3)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.6
    assert [bucket.take() for _ in range(2)] == [True, False]
    bucket.charge(3)
    assert bucket.wait() == pytest.approx(1.9)
    now[0] += 2
    assert bucket.take()
