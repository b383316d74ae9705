"""Bounds, counters and frame statistics of `live`."""

import collections
import io
import logging
import os

import numpy as np

STORM, COUNTED = b'storm', '/counted'  # as in `live_clients`


class Bounds:
    """Prints figures and counts broken bounds."""

    def __init__(self):
        self.broken = 0

    def hold(self, fine: bool, name: str, figures: str):
        """Prints one line."""
        self.broken += not fine
        print(f'{"ok" if fine else "BROKEN":7}{name}: {figures}', flush=True)


class Counted(logging.Handler):
    """ASGI wrapper that counts messages of the faulty clients, HTTP answers and logged errors.

    Clients read the number of messages received at COUNTED.
    """

    def __init__(self, served):
        super().__init__(logging.ERROR)
        self.served, self.found, self.errors = served, collections.Counter(), []

    def emit(self, record):
        self.errors.append(record.getMessage())

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'http' and scope['path'] == COUNTED:
            from starlette.responses import JSONResponse

            return await JSONResponse({'taken': self.found['taken']})(scope, receive, send)
        storm = scope['type'] == 'websocket' and scope['query_string'] == STORM

        async def heard():
            message = await receive()
            if storm and message['type'] == 'websocket.receive':
                self.found['taken'] += 1
            return message

        async def told(message):
            if storm and message['type'] == 'websocket.close':
                self.found[f'closed with {message.get("code")}'] += 1
            elif storm and message.get('text', '').startswith('{"type": "error"'):
                self.found['answered as wrong'] += 1
            elif message['type'] == 'http.response.start':
                self.found[f'HTTP {message["status"]}'] += 1
            await send(message)

        try:
            await self.served(scope, heard, told)
        except Exception as error:
            self.errors.append(repr(error))
            raise


def decode(data: bytes) -> np.ndarray:
    """JPEG -> uint8 [H W 3]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def statistics(frame: np.ndarray) -> tuple[float, float, float]:
    """Mean, deviation and edge strength of a frame; a degenerate frame lacks the last two."""
    frame = frame.astype(float)
    return frame.mean(), frame.std(), np.abs(np.diff(frame, axis=1)).mean()


def spelt(found: tuple) -> str:
    return 'mean {:.0f}, deviation {:.0f}, edges {:.1f}'.format(*found)


def memory() -> int:
    """Anonymous memory of this process in bytes: RssAnon + VmSwap."""
    with open(f'/proc/{os.getpid()}/status', encoding='utf-8') as file:
        lines = dict(line.split(':', 1) for line in file)
    return sum(int(lines[name].split()[0]) for name in ('RssAnon', 'VmSwap')) * 1024
