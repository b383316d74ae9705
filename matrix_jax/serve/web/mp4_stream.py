"""`GET /stream.mp4`: a world as fragmented MP4, for any `<video>` element."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls.vocabulary import ControlError
from matrix_jax.serve.runtime.session import HEADER, Session, Stalled
from matrix_jax.serve.runtime.session_manager import Refused
from matrix_jax.serve.web import connections, protocol
from matrix_jax.serve.web.hosted_world import HostedWorld
from matrix_jax.serve.web.protocol import MessageError
from matrix_jax.serve.web.transfers import error_response

FIELDS = {'world', 'start', 'prompt', 'seed', 'control', 'token'}
MAX_CHUNKS = 4  # parts of the video that wait for a slow reader


class FragmentEncoder:
    """Turns the JPEGs of a session into fragmented MP4, a fragment per quarter of a second."""

    def __init__(self, fps: float):
        self._written, self._closed = _Buffer(), False
        self._lock = threading.Lock()  # a cancelled `send_bytes` leaves its thread running
        self._encoder = video.Mp4Encoder(
            self._written,
            fps,
            {'preset': 'veryfast', 'tune': 'zerolatency', 'g': str(max(1, round(fps)))},
            {
                'movflags': 'frag_keyframe+empty_moov+default_base_moof',
                'frag_duration': '250000',
                'flush_packets': '1',
            },
        )

    def encode(self, jpeg: bytes) -> bytes:
        """Returns the part of the video that the frame completes, or nothing."""
        from PIL import Image

        picture = np.asarray(Image.open(io.BytesIO(jpeg)))
        with self._lock:
            if self._closed:
                return b''
            self._encoder.add(video.enlarge(picture, min_width=1))
            return self._written.take()

    def close(self) -> None:
        """Frees the encoder; later frames give nothing."""
        with self._lock:
            self._closed = True
            self._encoder.close()


class _Buffer:
    """A file that cannot seek."""

    def __init__(self):
        self._data = bytearray()

    def write(self, data) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        """Returns and removes what was written."""
        data = bytes(self._data)
        self._data.clear()
        return data


class FrameSink:
    """Takes the frames of a session as a socket does, and puts their video into a queue."""

    def __init__(self, session: Session, encoder: FragmentEncoder, chunks: asyncio.Queue):
        self.session, self.encoder, self.chunks = session, encoder, chunks

    async def send_text(self, data: str) -> None:
        """Drops a message, which a video has no place for."""

    async def send_bytes(self, data: bytes) -> None:
        """Encodes one frame in a thread."""
        frame, _ = HEADER.unpack_from(data)
        chunk = await asyncio.to_thread(self.encoder.encode, data[HEADER.size :])
        if chunk:
            await self.chunks.put(chunk)
        self.session.acknowledge(frame)


async def respond(world: HostedWorld, request):
    """The response to a request: a new session that lasts as long as the connection.

    Args:
      world: the world.
      request: its query may have start, prompt and seed, as of a `join` message, and control, which
        is held during the whole session.
    """
    from starlette.responses import StreamingResponse

    try:
        join, control = parse(request.query_params.multi_items(), world)
        session, _ = await world.manager.join(join)
    except (Refused, UsageError) as error:
        return error_response(str(error), 503 if isinstance(error, Refused) else 400)
    except (MessageError, ControlError) as error:
        return error_response(str(error), 400)
    body = frames(world, session, control, request.scope)
    headers = {'Cache-Control': 'no-store'}
    return StreamingResponse(body, media_type='video/mp4', headers=headers)


def parse(items: list[tuple[str, str]], world: HostedWorld) -> tuple[dict, str]:
    """Returns the 'join' message of a query, and the control to hold.

    Raises:
      MessageError, ControlError: a field is unknown, given twice, or not as it must be.
    """
    given = dict(items)
    if set(given) - FIELDS or len(given) < len(items):
        raise MessageError(f'stream.mp4: expected each of {", ".join(sorted(FIELDS))} at most once')
    seed = given.get('seed')
    join = {
        'type': 'join',
        'session': None,
        'start': given.get('start'),
        'prompt': given.get('prompt'),
        'seed': int(seed) if seed and seed.isascii() and seed.isdigit() else seed,
    }
    vocabulary = world.manager.world.vocabulary
    return protocol.check(join), vocabulary.canonical(given.get('control', vocabulary.idle))


async def frames(world: HostedWorld, session: Session, control: str, scope) -> AsyncIterator[bytes]:
    """Yields the video of a session, and ends the session at the end."""
    manager, chunks = world.manager, asyncio.Queue(MAX_CHUNKS)
    encoder, sending = FragmentEncoder(session.fps), None
    try:
        with connections.in_use(scope):
            sink = FrameSink(session, encoder, chunks)
            await manager.attach(session, sink)
            session.press(1, control)
            sending = asyncio.create_task(_send(session, sink))
            while chunk := await chunks.get():
                yield chunk
    finally:
        manager.end(session, 'left')
        if sending:
            sending.cancel()
        encoder.close()


async def _send(session: Session, sink: FrameSink) -> None:
    """Sends frames until the session or the encoder ends, then an empty chunk."""
    import av

    with contextlib.suppress(Stalled, av.FFmpegError):
        await session.send(sink)
    await sink.chunks.put(b'')
