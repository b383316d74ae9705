"""`GET /stream.mp4`: a world as fragmented MP4, for any `<video>` element."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from matrix_jax.config import UsageError
from matrix_jax.controls.vocabulary import ControlError
from matrix_jax.serve.runtime.session import HEADER, Session
from matrix_jax.serve.runtime.session_manager import Refused
from matrix_jax.serve.web import connections, protocol
from matrix_jax.serve.web.hosted_world import HostedWorld
from matrix_jax.serve.web.protocol import MessageError
from matrix_jax.serve.web.transfers import error_response

CHUNK_BYTES = 64 * 2**10  # read from the encoder at once
FIELDS = {'world', 'start', 'prompt', 'seed', 'control', 'token'}


class FrameSink:
    """Takes the frames of a session as a socket does, and writes them to an encoder."""

    def __init__(self, session: Session, encoder: asyncio.subprocess.Process):
        self.session, self.encoder = session, encoder

    async def send_text(self, data: str) -> None:
        """Drops a message, which a video has no place for."""

    async def send_bytes(self, data: bytes) -> None:
        """Writes one frame."""
        frame, _ = HEADER.unpack_from(data)
        self.encoder.stdin.write(data[HEADER.size :])
        await self.encoder.stdin.drain()
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
    manager, encoder, sending = world.manager, None, None
    try:
        encoder = await start_encoder(session.fps)
        sink = FrameSink(session, encoder)
        with connections.in_use(scope):
            await manager.attach(session, sink)
            session.press(1, control)
            sending = asyncio.create_task(session.send(sink))
            while chunk := await encoder.stdout.read(CHUNK_BYTES):
                yield chunk
    finally:
        manager.end(session, 'left')
        if sending:
            sending.cancel()
        if encoder:
            with contextlib.suppress(ProcessLookupError):
                encoder.kill()


async def start_encoder(fps: float) -> asyncio.subprocess.Process:
    """Starts ffmpeg, which turns JPEGs into fragments of a quarter of a second."""
    import imageio_ffmpeg

    # Without the first two options ffmpeg reads seconds of frames before it makes one.
    source = '-v error -probesize 32 -analyzeduration 0 -threads 1 -f mjpeg '
    source += f'-framerate {fps} -i -'
    picture = '-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -pix_fmt yuv420p'
    encode = f'-c:v libx264 -preset veryfast -tune zerolatency -g {max(1, round(fps))}'
    fragments = '-movflags frag_keyframe+empty_moov+default_base_moof -frag_duration 250000'
    return await asyncio.create_subprocess_exec(
        imageio_ffmpeg.get_ffmpeg_exe(),
        *f'{source} {picture} {encode} -f mp4 {fragments} pipe:1'.split(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
