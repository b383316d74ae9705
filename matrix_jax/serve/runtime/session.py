"""One player's stay: what is on its way to the socket, and what was counted.

Frames wait in a short queue from which the oldest fall out, so that a slow reader sees fewer
frames, in time, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import secrets
import struct
import time

from matrix_jax.serve.runtime.engine import Picture, Seat
from matrix_jax.serve.web.protocol import Bucket

QUEUE_SECONDS = 1.0  # frames that wait for a socket
WINDOW_SECONDS = 2.0  # frames on their way that the player has not seen yet
STALL_SECONDS = 30.0  # without a sign that frames arrive
RECORD_SECONDS, RECORD_BYTES = 120, 64 * 2**20  # whichever comes first
TRANSFERS, TRANSFERS_AT_ONCE = 2, 20  # files a second
HEADER = struct.Struct('<II')  # number of the frame, id of the key that it shows first


class Stalled(Exception):
    """The player takes no frames any more."""


class Session:
    """All of it belongs to the event loop, but `deliver` and `broken`, which any thread calls.

    Attributes:
      token: proves on reconnecting that it is the same player; a name of nothing else.
      seat: its place in the engine; set when it has one.
      lost: what to call after a while without a socket.
      met: whether a player was here before.
      transfers, transferring: how many files may still come and go, and whether one does now.
      over, reason: set when it has ended, and why it has.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fps: float, meters, token: str | None = None
    ):
        self.loop, self.fps, self.meters = loop, fps, meters
        self.token, self.began = token or secrets.token_urlsafe(16), time.monotonic()
        self.seat: Seat | None = None
        self.socket = self.lost = None
        self.paused, self.greeting, self.met = False, '', False
        self.over, self.reason = asyncio.Event(), ''
        self.pictures: collections.deque[Picture] = collections.deque()
        self.notes: collections.deque[str] = collections.deque(maxlen=64)
        self.room = max(2, round(QUEUE_SECONDS * fps))
        self.last: Picture | None = None
        self.recording: list[bytes] | None = None
        self.recorded: list[bytes] = []
        self._record_bytes = 0
        self.transfers, self.transferring = Bucket(TRANSFERS, TRANSFERS_AT_ONCE), False
        self.sent = self.dropped = self.waiting = 0
        self.pressed: collections.OrderedDict[int, float] = collections.OrderedDict()
        self.busy = asyncio.Lock()  # one change of the world at a time
        self._wake = asyncio.Event()
        self._unseen: collections.deque[int] = collections.deque()

    # --- from the engine -------------------------------------------------------------------------

    def deliver(self, pictures: list[Picture]):
        """Frames of a shift, from any thread."""
        self.loop.call_soon_threadsafe(self._take, pictures)

    def broken(self, shift: int):
        """The world had to start again, from any thread."""
        text = f'the world broke at shift {shift} (not a number); it starts again'
        self.meters.broken.inc()
        self.loop.call_soon_threadsafe(self.note, 'error', {'message': text})

    def _take(self, pictures: list[Picture]):
        self.last = pictures[-1]
        if self.recording is not None:
            self._keep([picture.data for picture in pictures])
        if self.socket is None:
            return
        self.pictures.extend(pictures)
        over = len(self.pictures) - max(self.room, 2 * len(pictures))
        for _ in range(over):
            late = self.pictures.popleft()
            if late.key:  # the answer to a key is not lost with its frame
                self.pictures[0] = self.pictures[0]._replace(key=late.key)
        self.dropped += max(over, 0)
        self.meters.dropped.inc(max(over, 0))
        self._wake.set()

    def _keep(self, frames: list[bytes]):
        """Frames for the recording, as long as it may grow."""
        self._record_bytes += sum(map(len, frames))
        if self._record_bytes <= RECORD_BYTES:
            self.recording += frames
        if self._record_bytes > RECORD_BYTES or len(self.recording) >= RECORD_SECONDS * self.fps:
            self.record(False)
            self.note(
                'note',
                {
                    'message': 'The recording is full: at most '
                    f'{RECORD_SECONDS} s and {RECORD_BYTES // 2**20} MiB.'
                },
            )

    # --- from the player -------------------------------------------------------------------------

    def keys(self, identity: int, symbol: str):
        """The keys that are held now; the newest wins."""
        self.seat.symbol, self.seat.key = symbol, identity
        self.pressed[identity] = time.monotonic()
        while len(self.pressed) > 64:
            self.pressed.popitem(last=False)

    def seen(self, frame: int):
        """The player shows all frames up to this one."""
        while self._unseen and self._unseen[0] <= frame:
            self._unseen.popleft()
        self._wake.set()

    def note(self, kind: str, fields: dict | None = None):
        """Something to tell the player, in order, before the next frame."""
        self.notes.append(json.dumps({'type': kind, **(fields or {})}))
        self._wake.set()

    def record(self, on: bool):
        """Starts to keep frames, in place of those of before, or ends it."""
        if on:
            self.recording, self.recorded, self._record_bytes = [], [], 0
        elif self.recording is not None:
            self.recorded, self.recording = self.recording, None
        self.state(recorded=len(self.recorded))

    def state(self, **more):
        """Tells the player how things are."""
        self.note(
            'state',
            {
                'paused': self.paused,
                'recording': self.recording is not None,
                'kept': self.seat.kept is not None,
                'prompt': self.seat.log.last_prompt,
                **more,
            },
        )

    # --- to the player ---------------------------------------------------------------------------

    def attach(self, socket):
        """A socket takes over; key ids and counts of an earlier one are void."""
        if self.lost:
            self.lost.cancel()
        self.socket, self.lost, self.met = socket, None, True
        self.seat.key, self.seat.echoed, self.seat.echoes = 0, 0, {}
        self.pictures.clear()
        self.notes.clear()
        self.pressed.clear()
        self._unseen.clear()
        if self.last:  # a page that comes back shows at once where it was
            self.pictures.append(self.last._replace(due=0.0, key=0))

    async def send(self, socket):
        """Sends until the socket is lost or another one took over.

        Raises:
          Stalled: nothing arrives at the other end.
        """
        window, moved = max(2, round(WINDOW_SECONDS * self.fps)), time.monotonic()
        while self.socket is socket:
            while self.notes:
                await socket.send_text(self.notes.popleft())
            now = time.monotonic()
            full = len(self._unseen) >= window
            if not full:
                moved = now
            elif now - moved > STALL_SECONDS:
                raise Stalled
            wait = 5.0 if full or not self.pictures else self.pictures[0].due - now
            if wait > 0:
                self._wake.clear()
                # Not `wait_for`, which before Python 3.12 loses a cancellation that comes with the
                # event: the task would go on, and who waits for its end with it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, 5.0)):
                        await self._wake.wait()
                continue
            picture = self.pictures.popleft()
            self._unseen.append(picture.index)
            await socket.send_bytes(
                HEADER.pack(picture.index & 0xFFFFFFFF, picture.key) + picture.data
            )
            self.sent += 1
            self.meters.frames.inc()
            if picture.key in self.pressed:
                self.meters.latency.observe(time.monotonic() - self.pressed[picture.key])
                while self.pressed and next(iter(self.pressed)) <= picture.key:
                    self.pressed.popitem(last=False)
