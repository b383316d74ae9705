"""The thread that owns the device: it steps all active slots at the frame rate of the world.

No other thread touches the slots. A player's control is an attribute of its `SlotState`, and the
newest one counts. Everything else that changes a slot is a command that the thread runs between two
steps. A step starts as late as its frames can still be on time, so that it uses the newest keys; a
key of a player who is alone brings it forward (`pace`). If the stream is a pipeline
(`stream.steps_ahead`), a step may start before the previous one has its frames.
"""

from __future__ import annotations

import collections
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.pace import Pace
from matrix_jax.serve.runtime.slot_state import EncodedFrame, HistoryEntry, SlotState

log = logging.getLogger(__name__)
HISTORY_BYTES = 128 * 2**20  # per player
HISTORY_SECONDS = 12
MAX_BREAKS = 2  # of a world, before it rests
POLL_SECONDS = 0.001  # between two checks of a running step


class InFlightStep(NamedTuple):
    """A submitted step whose frames are not ready yet.

    Attributes:
      began: when it was submitted, in `time.monotonic` seconds.
      players: (slot, its log, id of the key that its frames show first, history entry or None).
      frames, finite: the output of `BatchedStream.step`.
    """

    began: float
    players: list
    frames: Any
    finite: Any


class Engine:
    """Steps a stream and sends its frames.

    Args:
      stream: compiled.
      encode_frame: frame uint8 [H W 3] -> bytes.
      on_step: called after each step with (seconds, number of active slots).

    Attributes:
      slots: the player in each slot, or None.
      pace: says when a step starts and when its frames are due.
      frames_at_once: frames of a step that are encoded before they are sent.
      heartbeat: when the thread was last seen alive, in `time.monotonic` seconds.
    """

    def __init__(
        self, stream: BatchedStream, encode_frame: Callable, on_step: Callable = lambda *_: None
    ):
        self.stream, self.encode_frame, self.on_step = stream, encode_frame, on_step
        self.pace = Pace(stream.frames_per_step / stream.world.cfg.fps, stream.steps_ahead)
        self.frames_at_once = 1
        self.slots: list[SlotState | None] = [None] * stream.num_slots
        self.heartbeat = time.monotonic()
        self._in_flight: collections.deque[InFlightStep] = collections.deque()
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._encoder = ThreadPoolExecutor(1, 'encode')
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._encoding: Future | None = None
        self._stopping = False

    # --- from any thread -----------------------------------------------------------------------

    def start(self):
        """Starts the thread."""
        self._thread.start()

    def stop(self):
        """Ends the thread after the running step."""
        self._stopping = True
        self.call(lambda: None)
        self._thread.join(60)
        self._encoder.shutdown()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Seconds of a step until its frames are ready, smoothed."""
        return self.pace.seconds

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.pace.steps

    @property
    def spacing(self) -> float:
        """Seconds from one step's frames to the next: the world's period, or more if it is slow."""
        return self.pace.spacing

    def call(self, function: Callable, *args) -> Future:
        """Calls `function(*args)` between two steps."""
        future: Future = Future()
        if self._stopping:
            future.cancel()
        self._commands.put((future, function, args))
        return future

    # --- in the thread -------------------------------------------------------------------------

    def _run(self):
        self.pace.due = time.monotonic()
        try:
            while not self._stopping:
                self.heartbeat = time.monotonic()
                active = [slot for slot in self.slots if slot and not slot.paused]
                self._hurry(active)
                wait = self.pace.wait(self.heartbeat, len(self._in_flight)) if active else 1
                if wait <= 0 and self._commands.empty():
                    self._submit(active)
                    if len(self._in_flight) > self.stream.steps_ahead:
                        self._collect()
                elif not self._in_flight:
                    self._run_command(max(wait, 0))
                elif not self._commands.empty() or self._in_flight[0].frames.is_ready():
                    self._collect()  # commands run only while no step is in flight
                else:
                    time.sleep(min(wait, POLL_SECONDS))
        except Exception:
            log.exception('the engine has stopped')
        self._stopping = True
        while not self._commands.empty():
            self._commands.get()[0].cancel()

    def _hurry(self, active: list[SlotState]):
        """Brings the next step forward if the only player has a new key.

        With several players the others would see their worlds run faster.
        """
        if len(active) != 1 or self.stream.steps_ahead:
            return
        slot = active[0]
        if slot.key > max(slot.echoed, slot.hurried):
            slot.hurried = slot.key
            left = self.pace.hurry(self.heartbeat)
            if left < 1:
                slot.on_hurry(self.heartbeat, left)

    def _run_command(self, wait: float):
        """Runs one command, if one arrives within `wait` seconds."""
        try:
            future, function, args = (
                self._commands.get(timeout=wait) if wait else self._commands.get_nowait()
            )
        except queue.Empty:
            return
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except Exception as error:  # for the caller; the other players go on
                future.set_exception(error)

    def _submit(self, active: list[SlotState]):
        """Submits one step."""
        began, keys = time.monotonic(), []
        idle = self.stream.world.vocabulary.idle
        controls = np.repeat(self.stream.idle[None], self.stream.num_slots, axis=0)
        mask = np.zeros(self.stream.num_slots, bool)
        for slot in active:
            key, control = slot.key, slot.control or idle
            controls[slot.index] = self.stream.encode(control)
            mask[slot.index] = True
            step = len(slot.log.controls)
            if key > slot.echoed:
                slot.echoed = slot.echoes[step + self.stream.lag] = key
            slot.log.controls.append(control)
            keys.append(slot.echoes.pop(step, 0))
        frames, finite = self.stream.step(controls, mask)
        players = [
            (slot, slot.log, key, self._history_entry(slot)) for slot, key in zip(active, keys)
        ]
        self._in_flight.append(InFlightStep(began, players, frames, finite))

    def _collect(self):
        """Waits for the oldest step and sends its frames."""
        step = self._in_flight.popleft()
        frames, finite = np.asarray(step.frames), np.asarray(step.finite)
        now = time.monotonic()
        due = self.pace.collect(step.began, now)
        frame_seconds = self.spacing / self.stream.frames_per_step
        outputs, entries = [], []
        for slot, timeline, key, entry in step.players:
            if self.slots[slot.index] is not slot or slot.log is not timeline:
                continue
            if not finite[slot.index]:
                self._restart_broken(slot)
                continue
            entries.append((slot, entry))
            outputs.append((slot, slot.frames, key, frames[slot.index]))
            slot.frames += self.stream.frames_per_step
        # The encoder may be one step behind, not more.
        if self._encoding:
            self._encoding.result()
        self._encoding = self._encoder.submit(self._send, outputs, due, frame_seconds)
        for slot, entry in entries:
            self._store_history(slot, entry)
        self.on_step(now - step.began, len(step.players))

    def _send(self, outputs, due: float, frame_seconds: float):
        for slot, first, key, frames in outputs:
            try:
                for begin in range(0, len(frames), self.frames_at_once):
                    slot.on_frames(
                        [
                            EncodedFrame(
                                due + i * frame_seconds,
                                first + i,
                                0 if i else key,
                                self.encode_frame(frames[i]),
                            )
                            for i in range(len(frames))[begin : begin + self.frames_at_once]
                        ]
                    )
            except Exception:  # concerns one player; the others go on
                log.exception('frames could not be sent')

    def _history_limits(self, slot: SlotState) -> tuple[int, int]:
        """(entries that a slot's history holds, steps between two entries)."""
        count = max(2, round(HISTORY_SECONDS / self.pace.period))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(slot.history[0].carry))
        stride = max(1, -(-count * size // HISTORY_BYTES))
        return max(2, count // stride), stride

    def _history_entry(self, slot: SlotState) -> HistoryEntry | None:
        """The entry behind the submitted step; None for most steps if the carry is large."""
        steps = len(slot.log.controls)
        if steps - slot.history[-1].steps < self._history_limits(slot)[1]:
            return None
        return HistoryEntry(steps, list(slot.log.prompts), self.stream.read_async(slot.index))

    def _store_history(self, slot: SlotState, entry: HistoryEntry | None):
        """Copies an entry to the host."""
        if entry:
            slot.history.append(entry._replace(carry=jax.tree.map(np.array, entry.carry)))
            if len(slot.history) > self._history_limits(slot)[0]:
                slot.history.popleft()

    def _restart_broken(self, slot: SlotState):
        """Restarts a world that is no longer finite; the other slots are not affected.

        A world that breaks again and again rests, because each restart takes time from all.
        """
        step, (origin, carry) = len(slot.log.controls) - 1, slot.origin
        breaks = slot.breaks + 1
        self.restart(slot, origin.copy(), carry)
        slot.breaks, slot.paused = breaks, breaks >= MAX_BREAKS
        slot.on_broken(step, breaks)

    # --- commands: run them with `call` --------------------------------------------------------

    def add(self, slot: SlotState, carry):
        """Puts a new player into its slot.

        Raises:
          RuntimeError: the slot is taken.
        """
        if self.slots[slot.index] is not None:
            raise RuntimeError(f'slot {slot.index} is taken')
        self.slots[slot.index] = slot
        if not self.stream.steps_ahead:
            slot.on_key = functools.partial(self.call, _nothing)
        self.restart(slot, slot.log, carry)

    def remove(self, slot: SlotState):
        """Frees a slot."""
        if self.slots[slot.index] is slot:
            self.slots[slot.index] = None
        slot.release()

    def pause(self, slot: SlotState, paused: bool):
        """Pauses or resumes a slot."""
        slot.paused = paused

    def restart(self, slot: SlotState, timeline: session_log.Log, carry):
        """Continues a slot from another log and carry: a new start, or a loaded world."""
        self._check(slot)
        self.stream.write(slot.index, carry)
        slot.begin(timeline, self.stream.read(slot.index))
        slot.breaks = 0

    def set_prompt(self, slot: SlotState, prompt: str, text):
        """Changes the prompt from the next step on."""
        self._check(slot)
        self.stream.set_prompt(slot.index, text)
        step = len(slot.log.controls)
        earlier = [change for change in slot.log.prompts if change[0] != step]
        slot.log.prompts = [*earlier, [step, prompt]]

    def snapshot(self, slot: SlotState):
        """(log, carry on the host)."""
        self._check(slot)
        return slot.log.copy(), self.stream.read(slot.index)

    def rewind(self, slot: SlotState, seconds: float) -> float:
        """Goes back, at most to the oldest history entry -> seconds gone back."""
        self._check(slot)
        steps = len(slot.log.controls)
        goal = steps - round(seconds / self.pace.period)
        while len(slot.history) > 1 and slot.history[-1].steps > goal:
            slot.history.pop()
        entry = slot.history[-1]
        self.stream.write(slot.index, entry.carry)
        del slot.log.controls[entry.steps :]
        slot.log.prompts, slot.echoes = list(entry.prompts), {}
        return (steps - entry.steps) * self.pace.period

    def save(self, slot: SlotState):
        """Saves the slot on the server, for `load_saved`."""
        slot.saved = self.snapshot(slot)

    def load_saved(self, slot: SlotState) -> bool:
        """Returns to what `save` saved -> whether there was anything."""
        self._check(slot)
        if slot.saved is None:
            return False
        self.restart(slot, slot.saved[0].copy(), slot.saved[1])
        return True

    def _check(self, slot: SlotState):
        if self.slots[slot.index] is not slot:
            raise RuntimeError('this player has left')


def _nothing():
    """A command that only wakes the thread."""
