"""One player's frames and keys, without a server around them."""

import asyncio

import pytest

from matrix_jax.serve.meters import Meters
from matrix_jax.serve.session import Session


def test_sending_ends_even_if_something_to_send_comes_with_the_end():
    async def drive():
        session, socket = Session(asyncio.get_running_loop(), 16, Meters(), 'token'), object()
        session.socket = socket
        task = asyncio.create_task(session.send(socket))
        await asyncio.sleep(0.01)           # it waits for frames
        session.seen(0)                     # wakes it
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 5)

    asyncio.run(drive())
