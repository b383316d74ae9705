"""One player's frames and keys, without a server around them."""

import asyncio
import json
import types

import pytest

from matrix_jax.serve.runtime import session
from matrix_jax.serve.runtime.session import Session
from matrix_jax.serve.runtime.slot_state import EncodedFrame
from matrix_jax.serve.web.metrics import Metrics


def test_sending_ends_even_if_something_to_send_comes_with_the_end():
    async def drive():
        player, socket = Session(asyncio.get_running_loop(), 16, Metrics(), 'token'), object()
        player.socket = socket
        task = asyncio.create_task(player.send(socket))
        await asyncio.sleep(0.01)  # it waits for frames
        player.acknowledge(0)  # wakes it
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 5)

    asyncio.run(drive())


def test_a_recording_has_a_limit_and_replaces_the_one_before(monkeypatch):
    monkeypatch.setattr(session, 'RECORD_BYTES', 250)
    messages, counts = [], []

    async def drive():
        player = Session(asyncio.get_running_loop(), 16, Metrics(), 'token')
        player.slot = types.SimpleNamespace(saved=None, log=types.SimpleNamespace(last_prompt=''))

        def arrive(data):
            player._enqueue([EncodedFrame(0, 0, 0, data)] * 2)
            counts.append((player.recording and len(player.recording), len(player.recorded)))

        player.record(True)
        for _ in range(3):
            arrive(bytes(60))
        player.record(True)
        arrive(b'')
        messages.extend(map(json.loads, player._messages))

    asyncio.run(drive())
    assert counts == [(2, 0), (4, 0), (None, 4), (2, 0)]
    assert [one['message'] for one in messages if one['type'] == 'note'] == [
        'The recording is full: at most 120 s and 0 MiB.'
    ]
