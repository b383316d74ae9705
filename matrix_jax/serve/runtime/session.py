"""One player's session: the frames and messages on their way to its socket.

Frames wait in a short queue that drops the oldest ones. A slow reader sees fewer frames, but on
time, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import secrets
import struct
import time
from typing import Any, Protocol

from matrix_jax.serve.runtime.engine import MAX_BREAKS
from matrix_jax.serve.runtime.slot_state import EncodedFrame, SlotState
from matrix_jax.serve.runtime.token_bucket import TokenBucket

QUEUE_SECONDS = 1.0  # of frames that wait for the socket
UNSEEN_SECONDS = 2.0  # of frames sent that the player has not acknowledged
STALL_SECONDS = 30.0  # without an acknowledgement
RECORD_SECONDS, RECORD_BYTES = 120, 64 * 2**20  # whichever comes first
MESSAGE_RATE, MESSAGE_BURST = 60, 120  # messages of a player per second, and at once
REQUEST_RATE, REQUEST_BURST = 2, 40  # units of `COSTS` per second, and at once
# What a request of a player costs; one that is not listed costs 1. The others wait for a start.
COSTS = {'restart': 4, 'picture': 4, 'world': 4, 'pause': 0.25, 'record': 0.25}
HEADER = struct.Struct('<II')  # frame number, id of the key that the frame shows first


class Stalled(Exception):
    """The player no longer receives frames."""


class Socket(Protocol):
    """Where messages and frames go; a starlette WebSocket is one."""

    async def send_text(self, data: str) -> None: ...
    async def send_bytes(self, data: bytes) -> None: ...


class SessionMetrics(Protocol):
    """The Prometheus-style counters that sessions update; `web.metrics.Metrics` has them."""

    frames: Any
    dropped: Any
    broken: Any
    refused: Any
    latency: Any
    sessions: Any
    slots: Any


class Session:
    """Belongs to the event loop, except `deliver` and `report_broken`, which any thread may call.

    Args:
      loop: the event loop.
      fps: frames per second of the world.
      metrics: the counters.
      token: of an earlier session that this one continues.
      step_frames: frames that a step of the world makes.

    Attributes:
      token: secret that a returning player proves itself with.
      slot: the player's slot in the engine; None until it has one.
      socket: the player's socket, or None while it is away.
      expiry: timer that ends the session while it has no socket.
      was_attached: whether the player had a socket before.
      last: the newest frame, for a player who returns.
      recording: frames recorded so far, or None while nothing is recorded.
      recorded: frames of the last recording.
      lock: held while the world changes.
      ended, end_reason: set when the session is over, and why.
      messages: limits the messages of the player.
      requests: limits what takes time from others: new starts, prompts, files; see `COSTS`.
      loaded: digest of the world file that the session continues, or ''.
      broke_twice: whether the world rests because it broke again and again.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fps: float,
        metrics: SessionMetrics,
        token: str | None = None,
        step_frames: int = 1,
    ):
        self.loop, self.fps, self.metrics = loop, fps, metrics
        self.token, self.began = token or secrets.token_urlsafe(16), time.monotonic()
        self.slot: SlotState | None = None
        self.socket: Socket | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.paused, self.greeting, self.was_attached = False, '', False
        self.lock = asyncio.Lock()
        self.ended, self.end_reason = asyncio.Event(), ''
        self.last: EncodedFrame | None = None
        self.recording: list[bytes] | None = None
        self.recorded: list[bytes] = []
        self.messages = TokenBucket(MESSAGE_RATE, MESSAGE_BURST)
        self.requests = TokenBucket(REQUEST_RATE, REQUEST_BURST)
        self.loaded, self.broke_twice = '', False
        self.sent = self.dropped = 0
        self._record_bytes = 0
        self._frames: collections.deque[EncodedFrame] = collections.deque()
        self._messages: collections.deque[str] = collections.deque(maxlen=64)
        self._max_frames = max(2, round(QUEUE_SECONDS * fps), 2 * step_frames)
        self._pressed: collections.OrderedDict[int, float] = collections.OrderedDict()
        self._unseen: collections.deque[int] = collections.deque()
        self._wake = asyncio.Event()

    # --- from the engine -----------------------------------------------------------------------

    def deliver(self, frames: list[EncodedFrame]):
        """Takes frames; any thread may call it."""
        self.loop.call_soon_threadsafe(self._enqueue, frames)

    def hurry(self, now: float, left: float):
        """Shows the frames that wait in the part `left` of their time; any thread may call it."""
        self.loop.call_soon_threadsafe(self._hurry, now, left)

    def _hurry(self, now: float, left: float):
        for index, frame in enumerate(self._frames):
            if frame.due > now:
                self._frames[index] = frame._replace(due=now + left * (frame.due - now))
        self._wake.set()

    def report_broken(self, step: int, breaks: int):
        """Tells the player that the world was restarted; any thread may call it."""
        self.metrics.broken.inc()
        self.loop.call_soon_threadsafe(self._tell_broken, step, breaks)

    def _tell_broken(self, step: int, breaks: int):
        text = f'the world broke at step {step} (a number is not finite); '
        if breaks < MAX_BREAKS:
            text += 'it starts again'
        else:
            text += f'it broke {breaks} times and rests: start a new session, or load another world'
            self.paused, self.broke_twice = True, True
            self.notify_state()
        self.notify('error', {'message': text})

    def _enqueue(self, frames: list[EncodedFrame]):
        self.last = frames[-1]
        if self.recording is not None:
            self._record_frames([frame.data for frame in frames])
        if self.socket is None:
            return
        self._frames.extend(frames)
        excess = max(0, len(self._frames) - self._max_frames)
        for _ in range(excess):
            late = self._frames.popleft()
            if late.key:  # a dropped frame must not lose the answer to a key
                self._frames[0] = self._frames[0]._replace(key=late.key)
        self.dropped += excess
        self.metrics.dropped.inc(excess)
        self._wake.set()

    def _record_frames(self, frames: list[bytes]):
        self._record_bytes += sum(map(len, frames))
        if self._record_bytes <= RECORD_BYTES:
            self.recording += frames
        if self._record_bytes > RECORD_BYTES or len(self.recording) >= RECORD_SECONDS * self.fps:
            self.record(False)
            limit = f'{RECORD_SECONDS} s and {RECORD_BYTES // 2**20} MiB'
            self.notify('note', {'message': f'The recording is full: at most {limit}.'})

    # --- from the player -----------------------------------------------------------------------

    def press(self, key: int, control: str):
        """Sets the control that the player holds now; the newest counts."""
        self.slot.press(key, control)
        self._pressed[key] = time.monotonic()
        while len(self._pressed) > 64:
            self._pressed.popitem(last=False)

    def acknowledge(self, frame: int):
        """Notes that the player has shown all frames up to this one."""
        while self._unseen and self._unseen[0] <= frame:
            self._unseen.popleft()
        self._wake.set()

    def record(self, on: bool):
        """Starts a new recording, or ends it."""
        if on:
            self.recording, self.recorded, self._record_bytes = [], [], 0
        elif self.recording is not None:
            self.recorded, self.recording = self.recording, None
        self.notify_state(recorded=len(self.recorded))

    # --- to the player -------------------------------------------------------------------------

    def notify(self, kind: str, fields: dict | None = None):
        """Queues a message; messages keep their order and go before the next frame."""
        self._messages.append(json.dumps({'type': kind, **(fields or {})}))
        self._wake.set()

    def notify_state(self, **more):
        """Sends the state of the session, with some more fields."""
        self.notify(
            'state',
            {
                'paused': self.paused,
                'recording': self.recording is not None,
                'kept': self.slot.saved is not None,
                'prompt': self.slot.log.last_prompt,
                **more,
            },
        )

    def attach(self, socket: Socket):
        """Hands the session to a socket and forgets what belonged to an earlier one."""
        if self.expiry:
            self.expiry.cancel()
        self.socket, self.expiry, self.was_attached = socket, None, True
        self.slot.reset_keys()
        for queue in (self._frames, self._messages, self._pressed, self._unseen):
            queue.clear()
        self._wake.set()  # for the task of the earlier socket, which ends
        if self.last:  # a returning player sees at once where it was
            self._frames.append(self.last._replace(due=0.0, key=0))

    def end(self, reason: str):
        """Marks the session as over and frees its frames."""
        if self.expiry:
            self.expiry.cancel()
        self.socket, self.recording, self.recorded = None, None, []
        self._frames.clear()
        self.end_reason = reason
        self.ended.set()

    async def send(self, socket: Socket):
        """Sends messages and frames until the socket is lost or replaced.

        Raises:
          Stalled: the player acknowledged no frame for `STALL_SECONDS`.
        """
        max_unseen, moved = max(2, round(UNSEEN_SECONDS * self.fps)), time.monotonic()
        while self.socket is socket:
            while self._messages:
                await socket.send_text(self._messages.popleft())
            now = time.monotonic()
            full = len(self._unseen) >= max_unseen
            if not full:
                moved = now
            elif now - moved > STALL_SECONDS:
                raise Stalled
            wait = 5.0 if full or not self._frames else self._frames[0].due - now
            if wait > 0:
                self._wake.clear()
                # Before Python 3.12 `asyncio.wait_for` can lose a cancellation that arrives
                # together with the event; the task would then never end.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, 5.0)):
                        await self._wake.wait()
                continue
            frame = self._frames.popleft()
            self._unseen.append(frame.index)
            await socket.send_bytes(HEADER.pack(frame.index & 0xFFFFFFFF, frame.key) + frame.data)
            self.sent += 1
            self.metrics.frames.inc()
            if frame.key in self._pressed:
                self.metrics.latency.observe(time.monotonic() - self._pressed[frame.key])
                while self._pressed and next(iter(self._pressed)) <= frame.key:
                    self._pressed.popitem(last=False)
