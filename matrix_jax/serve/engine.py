"""The thread that owns the device: it shifts all active slots, forever, at the pace of the world.

Nobody else touches the slots. A player's keys are plain attributes of its `Seat`, the newest wins;
everything else that is wanted of a slot is a function that the thread calls between two shifts. A
shift starts as late as its frames still come in time, so that it takes the newest keys along.
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

from matrix_jax import controls
from matrix_jax.serve import replay
from matrix_jax.serve.slots import Slots

log = logging.getLogger(__name__)
REST = controls.SYMBOLS.index('N')
PAST_BYTES = 128 * 2**20            # of one player's past
PAST_SECONDS = 12
MARGIN = 0.02                       # seconds between the end of a shift and its first frame


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


class Moment(NamedTuple):
    """A slot's carry on the host, after `shifts` shifts and with these prompts in its log."""
    shifts: int
    prompts: list
    carry: object


class Seat:
    """A player at a slot, as the engine sees it.

    Attributes:
      symbol, key: newest control symbol (an index) and the id that its sender gave it.
      paused: whether the slot rests.
      log: the timeline so far.
      past: moments to go back to, oldest first.
      kept: (log, carry) that the player keeps, or None.
    """

    def __init__(self, index: int, log: replay.Log, deliver: Callable, broken: Callable):
        self.index, self.log, self.deliver, self.broken = index, log, deliver, broken
        self.symbol, self.key, self.paused = REST, 0, False
        self.frames = self.echoed = 0
        self.echoes: dict[int, int] = {}       # shift -> id of the key that its frames show first
        self.kept: tuple[replay.Log, object] | None = None

    def begin(self, log: replay.Log, carry):
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
        self.seconds = 0.0                 # of a shift, smoothed
        self.shifts = 0
        self.beat = time.monotonic()       # when the thread was last seen alive
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

    def restart(self, seat: Seat, log: replay.Log, carry) -> Future:
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
                lead = min(self.seconds * 1.15 + MARGIN, self.period)
                wait = due - lead - self.beat if active else 1
                if wait > 0 or not self._wanted.empty():
                    self._answer(max(wait, 0))
                else:
                    due = self._shift(active, due)
        except Exception:
            log.exception('the engine has stopped')
        self._stopping = True
        while not self._wanted.empty():
            self._wanted.get()[0].cancel()

    def _answer(self, wait: float):
        """Does one wanted thing, if one comes in time."""
        try:
            done, function, given = self._wanted.get(timeout=wait) if wait else (
                self._wanted.get_nowait())
        except queue.Empty:
            return
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(function(*given))
            except Exception as error:       # belongs to who asked; the others play on
                done.set_exception(error)

    def _shift(self, active: list[Seat], due: float) -> float:
        """One shift -> when the next one is due."""
        began = time.monotonic()
        symbols = np.full((self.slots.count, self.slots.group), REST, np.int32)
        mask = np.zeros(self.slots.count, bool)
        for seat in active:
            key, symbols[seat.index] = seat.key, seat.symbol
            mask[seat.index] = True
            shift = len(seat.log.symbols)
            if key > seat.echoed:
                seat.echoed = seat.echoes[shift + self.slots.lag] = key
        frames, finite = self.slots.step(symbols, mask)
        frames, finite = np.asarray(frames), np.asarray(finite)
        now = time.monotonic()
        taken = now - began
        self.seconds = taken if not self.shifts else 0.8 * self.seconds + 0.2 * taken
        self.shifts += 1
        due = max(due, now)
        pace = max(self.period, self.seconds) / self.slots.frames
        rows = []
        for seat in active:
            if self.seats[seat.index] is not seat:
                continue
            if not finite[seat.index]:
                self._broken(seat)
                continue
            seat.log.symbols.append(int(symbols[seat.index, 0]))
            rows.append((seat, seat.frames, seat.echoes.pop(len(seat.log.symbols) - 1, 0),
                         frames[seat.index]))
            seat.frames += self.slots.frames
        # The encoder may be one shift behind, not more.
        if self._encoding:
            self._encoding.result()
        self._encoding = self._encoder.submit(self._send, rows, due, pace)
        for seat in active:
            self._remember(seat)
        self.observe(taken, len(active))
        return due + pace * self.slots.frames

    def _send(self, rows, due: float, pace: float):
        for seat, first, key, frames in rows:
            try:
                seat.deliver([Picture(due + i * pace, first + i, 0 if i else key,
                                      self.encode(frame)) for i, frame in enumerate(frames)])
            except Exception:                # one player's trouble; the others play on
                log.exception('a player could not be served')

    def _remember(self, seat: Seat):
        """Keeps a moment after each shift, or less often where moments are large."""
        past, shifts = seat.past, len(seat.log.symbols)
        count = max(2, round(PAST_SECONDS / self.period))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(past[0].carry))
        stride = max(1, -(-count * size // PAST_BYTES))
        if shifts - past[-1].shifts >= stride:
            past.append(Moment(shifts, list(seat.log.prompts), self.slots.read(seat.index)))
            if len(past) > max(2, count // stride):
                past.popleft()

    def _broken(self, seat: Seat):
        """A world that is no longer made of numbers starts again; the others do not notice."""
        shift, (origin, carry) = len(seat.log.symbols), seat.origin
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

    def _restart(self, seat: Seat, log: replay.Log, carry):
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
        del seat.log.symbols[moment.shifts:]
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
