"""What the engine keeps about the player in each slot."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

from matrix_jax.serve.runtime import session_log


class EncodedFrame(NamedTuple):
    """One frame on its way to a player.

    Attributes:
      due: when to show it, in `time.monotonic` seconds.
      index: number of the frame since the player joined.
      key: id of the key that this frame is the first to show, or 0.
      data: the encoded frame.
    """

    due: float
    index: int
    key: int
    data: bytes


class HistoryEntry(NamedTuple):
    """A slot's carry after `steps` steps, with the prompt changes up to then."""

    steps: int
    prompts: list
    carry: object


class SlotState:
    """The player in a slot, as the engine sees it.

    Attributes:
      control, key: the newest control (None for idle) and the id that the player gave it.
      paused: whether the slot is inactive.
      log: everything the player did so far.
      origin: (log, carry) to restart from if the world breaks.
      history: entries to rewind to, oldest first.
      saved: (log, carry) that the player saved on the server, or None.
      frames: frames made so far.
      echoed: id of the newest key that a step has taken.
      echoes: step number -> id of the key that its frames show first.
      on_frames: called with a list of `EncodedFrame`.
      on_hurry: called with a time and the part of the time after it in which the frames that wait
        are now to be shown.
      on_key: called after each new key, from any thread.
      hurried: id of the newest key for which frames were brought forward.
      on_broken: called with the step number and `breaks` when the world is no longer finite.
      breaks: how often the world broke since the player last chose what to play.
    """

    def __init__(self, index: int, log: session_log.Log, on_frames: Callable, on_broken: Callable):
        self.index, self.log = index, log
        self.on_frames, self.on_broken = on_frames, on_broken
        self.on_hurry: Callable = lambda *_: None
        self.on_key: Callable = lambda: None
        self.control, self.key, self.paused = None, 0, False
        self.frames = self.echoed = self.hurried = self.breaks = 0
        self.echoes: dict[int, int] = {}
        self.saved: tuple[session_log.Log, object] | None = None

    def begin(self, log: session_log.Log, carry):
        """Starts another log from `carry`."""
        self.log, self.echoes = log, {}
        self.origin = log.copy(), carry
        entry = HistoryEntry(len(log.controls), list(log.prompts), carry)
        self.history = collections.deque([entry])

    def press(self, key: int, control: str):
        """Sets the newest key and the control that it means; any thread may call it."""
        self.control, self.key = control, key
        self.on_key()

    def reset_keys(self):
        """Forgets the key ids of an earlier connection."""
        self.key, self.echoed, self.hurried, self.echoes = 0, 0, 0, {}

    def release(self):
        """Frees the carries."""
        self.origin, self.saved = None, None
        self.history.clear()
