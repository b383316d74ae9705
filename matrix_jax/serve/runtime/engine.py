"""The thread that owns the device: it shifts all active slots, forever, at the pace of the world.

Nobody else touches the slots. A player's keys are plain attributes of its `Seat`, the newest wins;
everything else that is wanted of a slot is a function that the thread calls between two shifts. A
shift starts as late as its frames still come in time, so that it takes the newest keys along. Where
the slots are a pipeline (`slots.ahead`), that may be before the shift before it has its frames.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.runtime.batched_stream import Slots

log = logging.getLogger(__name__)
PAST_BYTES = 128 * 2**20  # of one player's past
PAST_SECONDS = 12
MARGIN = 0.02  # seconds between the end of a shift and its first frame
POLL = 0.001  # seconds between two looks at a shift that is under way


class Picture(NamedTuple):
    """One frame on its way to a player.

    Attributes:
      due: when to show it, in `time.monotonic`.
      index: number of the frame in this stay.
      key: id of the key whose first frame this is, or 0.
      data: the encoded frame.
    """

    due: float
    index: int
    key: int
    data: bytes


class Flight(NamedTuple):
    """A shift whose frames are still to come.

    Attributes:
      began: when it was handed in, in `time.monotonic`.
      rows: (seat, its log, id of the key that its frames show first, the moment behind it if that
        is one to keep).
      frames, finite: what the slots give.
    """

    began: float
    rows: list
    frames: object
    finite: object


class Moment(NamedTuple):
    """A slot's carry after `shifts` shifts and with these prompts in its log."""

    shifts: int
    prompts: list
    carry: object


class Seat:
    """A player at a slot, as the engine sees it.

    Attributes:
      symbol, key: newest control, None for nothing held, and the id that its sender gave it.
      paused: whether the slot rests.
      log: the timeline so far.
      past: moments to go back to, oldest first.
      kept: (log, carry) that the player keeps, or None.
    """

    def __init__(self, index: int, log: session_log.Log, deliver: Callable, broken: Callable):
        self.index, self.log, self.deliver, self.broken = index, log, deliver, broken
        self.symbol, self.key, self.paused = None, 0, False
        self.frames = self.echoed = 0
        self.echoes: dict[int, int] = {}  # shift -> id of the key that its frames show first
        self.kept: tuple[session_log.Log, object] | None = None

    def begin(self, log: session_log.Log, carry):
        """Another timeline; `carry` is where it returns to if it breaks."""
        self.log, self.echoes = log, {}
        self.origin = log.copy(), carry
        self.past = collections.deque([Moment(len(log.symbols), list(log.prompts), carry)])

    def release(self):
        """Forgets what takes memory."""
        self.origin, self.kept = None, None
        self.past.clear()


class Engine:
    """Runs `slots`; `encode` turns a frame uint8 [H W 3] into bytes.

    Args:
      slots: compiled.
      encode: frame -> bytes.
      observe: called after each shift with (seconds, active slots); for meters.
    """

    def __init__(self, slots: Slots, encode: Callable, observe: Callable = lambda *_: None):
        self.slots, self.encode, self.observe = slots, encode, observe
        self.period = slots.frames / slots.world.cfg.fps
        self.seats: list[Seat | None] = [None] * slots.count
        self.seconds = 0.0  # of a shift until its frames are there, smoothed
        self.shifts = 0
        self._busy = 0.0  # from one shift's frames to the next ones, smoothed
        self._flying: collections.deque[Flight] = collections.deque()
        self._landed = 0.0  # when the last frames were there
        self.beat = time.monotonic()  # when the thread was last seen alive
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._encoder = ThreadPoolExecutor(1, 'encode')
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._encoding: Future | None = None
        self._stopping = False

    # --- from any thread -----------------------------------------------------------------------

    def start(self):
        self._thread.start()

    def stop(self):
        """Ends the thread after the shift that runs."""
        self._stopping = True
        self.do(lambda: None)
        self._thread.join(60)
        self._encoder.shutdown()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def spacing(self) -> float:
        """Seconds from one shift's frames to the next ones, as the world or the device has it."""
        return max(self.period, self._busy)

    def do(self, function: Callable, *given) -> Future:
        """Calls `function(*given)` between two shifts."""
        done: Future = Future()
        if self._stopping:
            done.cancel()
        self._wanted.put((done, function, given))
        return done

    def seat(self, seat: Seat, carry) -> Future:
        """Puts a new player at its slot."""
        return self.do(self._seat, seat, carry)

    def leave(self, seat: Seat) -> Future:
        """Frees a slot; its memory stays for the next player."""
        return self.do(self._leave, seat)

    def pause(self, seat: Seat, paused: bool) -> Future:
        """Lets a slot rest, which costs nothing, or go on."""
        return self.do(setattr, seat, 'paused', paused)

    def restart(self, seat: Seat, log: session_log.Log, carry) -> Future:
        """Another timeline for a player: a new start, or a loaded world."""
        return self.do(self._restart, seat, log, carry)

    def retext(self, seat: Seat, prompt: str, text) -> Future:
        """Another prompt from the next shift on."""
        return self.do(self._retext, seat, prompt, text)

    def moment(self, seat: Seat) -> Future:
        """(log, carry on the host) of now."""
        return self.do(self._moment, seat)

    def rewind(self, seat: Seat, seconds: float) -> Future:
        """Goes back, at most to the oldest moment that is kept -> seconds gone back."""
        return self.do(self._rewind, seat, seconds)

    def keep(self, seat: Seat) -> Future:
        """Keeps the moment on this machine, for `recall`."""
        return self.do(self._keep, seat)

    def recall(self, seat: Seat) -> Future:
        """Returns to the moment of `keep` -> whether there is one."""
        return self.do(self._recall, seat)

    # --- in the thread -------------------------------------------------------------------------

    def _run(self):
        due = time.monotonic()
        try:
            while not self._stopping:
                self.beat = time.monotonic()
                active = [seat for seat in self.seats if seat and not seat.paused]
                lead = min(self.seconds * 1.15 + MARGIN, (1 + self.slots.ahead) * self.spacing)
                lead -= len(self._flying) * self.spacing
                wait = due - lead - self.beat if active else 1
                if wait <= 0 and self._wanted.empty():
                    self._shift(active)
                    if len(self._flying) > self.slots.ahead:
                        due = self._land(due)
                elif not self._flying:
                    self._answer(max(wait, 0))
                elif not self._wanted.empty() or self._flying[0].frames.is_ready():
                    due = self._land(due)  # nobody changes a slot while a shift is under way
                else:
                    time.sleep(min(wait, POLL))
        except Exception:
            log.exception('the engine has stopped')
        self._stopping = True
        while not self._wanted.empty():
            self._wanted.get()[0].cancel()

    def _answer(self, wait: float):
        """Does one wanted thing, if one comes in time."""
        try:
            done, function, given = (
                self._wanted.get(timeout=wait) if wait else (self._wanted.get_nowait())
            )
        except queue.Empty:
            return
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(function(*given))
            except Exception as error:  # belongs to who asked; the others play on
                done.set_exception(error)

    def _shift(self, active: list[Seat]):
        """Hands in one shift."""
        began, keys = time.monotonic(), []
        rest = self.slots.world.vocabulary.rest
        symbols = np.repeat(self.slots.rest[None], self.slots.count, axis=0)
        mask = np.zeros(self.slots.count, bool)
        for seat in active:
            key, symbol = seat.key, seat.symbol or rest
            symbols[seat.index] = self.slots.encode(symbol)
            mask[seat.index] = True
            shift = len(seat.log.symbols)
            if key > seat.echoed:
                seat.echoed = seat.echoes[shift + self.slots.lag] = key
            seat.log.symbols.append(symbol)
            keys.append(seat.echoes.pop(shift, 0))
        made = self.slots.step(symbols, mask)
        rows = [(seat, seat.log, key, self._mark(seat)) for seat, key in zip(active, keys)]
        self._flying.append(Flight(began, rows, *made))

    def _land(self, due: float) -> float:
        """Sends the frames of the oldest shift on their way -> when the next ones are due."""
        flight = self._flying.popleft()
        frames, finite = np.asarray(flight.frames), np.asarray(flight.finite)
        now = time.monotonic()
        taken = now - flight.began
        # Shifts that overlap come faster than each of them is made.
        busy, self._landed = now - max(flight.began, self._landed), now
        old = 0.8 if self.shifts else 0.0
        self.seconds = old * self.seconds + (1 - old) * taken
        self._busy = old * self._busy + (1 - old) * busy
        self.shifts += 1
        due = max(due, now)
        pace = self.spacing / self.slots.frames
        rows, moments = [], []
        for seat, timeline, key, moment in flight.rows:
            if self.seats[seat.index] is not seat or seat.log is not timeline:
                continue
            if not finite[seat.index]:
                self._broken(seat)
                continue
            moments.append((seat, moment))
            rows.append((seat, seat.frames, key, frames[seat.index]))
            seat.frames += self.slots.frames
        # The encoder may be one shift behind, not more.
        if self._encoding:
            self._encoding.result()
        self._encoding = self._encoder.submit(self._send, rows, due, pace)
        for seat, moment in moments:
            self._remember(seat, moment)
        self.observe(taken, len(flight.rows))
        return due + pace * self.slots.frames

    def _send(self, rows, due: float, pace: float):
        for seat, first, key, frames in rows:
            try:
                seat.deliver(
                    [
                        Picture(due + i * pace, first + i, 0 if i else key, self.encode(frame))
                        for i, frame in enumerate(frames)
                    ]
                )
            except Exception:  # one player's trouble; the others play on
                log.exception('a player could not be served')

    def _strides(self, seat: Seat) -> tuple[int, int]:
        """(how many moments of a slot are kept, shifts from one to the next)."""
        count = max(2, round(PAST_SECONDS / self.period))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(seat.past[0].carry))
        stride = max(1, -(-count * size // PAST_BYTES))
        return max(2, count // stride), stride

    def _mark(self, seat: Seat) -> Moment | None:
        """The moment behind the shift just handed in, still to come; not after every shift where
        moments are large."""
        shifts = len(seat.log.symbols)
        if shifts - seat.past[-1].shifts < self._strides(seat)[1]:
            return None
        return Moment(shifts, list(seat.log.prompts), self.slots.peek(seat.index))

    def _remember(self, seat: Seat, moment: Moment | None):
        """Keeps a moment, on the host."""
        if moment:
            seat.past.append(moment._replace(carry=jax.tree.map(np.array, moment.carry)))
            if len(seat.past) > self._strides(seat)[0]:
                seat.past.popleft()

    def _broken(self, seat: Seat):
        """A world that is no longer made of numbers starts again; the others do not notice."""
        shift, (origin, carry) = len(seat.log.symbols) - 1, seat.origin
        self._restart(seat, origin.copy(), carry)
        seat.broken(shift)

    def _seat(self, seat: Seat, carry):
        if self.seats[seat.index] is not None:
            raise RuntimeError(f'slot {seat.index} is taken')
        self.seats[seat.index] = seat
        self._restart(seat, seat.log, carry)

    def _leave(self, seat: Seat):
        if self.seats[seat.index] is seat:
            self.seats[seat.index] = None
        seat.release()

    def _restart(self, seat: Seat, log: session_log.Log, carry):
        self._check(seat)
        self.slots.write(seat.index, carry)
        seat.begin(log, self.slots.read(seat.index))

    def _retext(self, seat: Seat, prompt: str, text):
        self._check(seat)
        self.slots.retext(seat.index, text)
        shift = len(seat.log.symbols)
        seat.log.prompts = [one for one in seat.log.prompts if one[0] != shift] + [[shift, prompt]]

    def _moment(self, seat: Seat):
        self._check(seat)
        return seat.log.copy(), self.slots.read(seat.index)

    def _rewind(self, seat: Seat, seconds: float) -> float:
        self._check(seat)
        shifts = len(seat.log.symbols)
        goal = shifts - round(seconds / self.period)
        while len(seat.past) > 1 and seat.past[-1].shifts > goal:
            seat.past.pop()
        moment = seat.past[-1]
        self.slots.write(seat.index, moment.carry)
        del seat.log.symbols[moment.shifts :]
        seat.log.prompts, seat.echoes = list(moment.prompts), {}
        return (shifts - moment.shifts) * self.period

    def _keep(self, seat: Seat):
        seat.kept = self._moment(seat)

    def _recall(self, seat: Seat) -> bool:
        self._check(seat)
        if seat.kept is None:
            return False
        self._restart(seat, seat.kept[0].copy(), seat.kept[1])
        return True

    def _check(self, seat: Seat):
        if self.seats[seat.index] is not seat:
            raise RuntimeError('this player has left')
