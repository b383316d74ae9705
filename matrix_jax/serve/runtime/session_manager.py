"""Admits players to the slots of one world, and does what they ask for."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

from matrix_jax.serve.runtime import replay, session_log, snapshot, start_frames
from matrix_jax.serve.runtime.engine import Engine
from matrix_jax.serve.runtime.session import COSTS, Session, SessionMetrics, Socket
from matrix_jax.serve.runtime.slot_state import SlotState
from matrix_jax.serve.runtime.token_bucket import TokenBucket

log = logging.getLogger(__name__)
GRACE_SECONDS = 30.0  # how long a session waits for its player to return
START_RATE = 1  # new players per second; many at once wait in the page
MAX_BROKEN_FILES = 1024  # world files that are not loaded again
MAX_CONDITIONS = 16  # encoded starts kept for the next players


class Refused(Exception):
    """The request cannot be granted; the message may be shown to the player."""


class TooSoon(Refused):
    """The player asks for too much at once; may ask again after `wait` seconds."""

    def __init__(self, what: str, wait: float):
        super().__init__(f'{what}: too much at once; try again in {max(1, round(wait))} s')
        self.wait = wait


class SessionManager:
    """The sessions of one world by token; must be created in the server's event loop.

    Args:
      engine: of the world.
      folder: weights folder, which may contain start clips.
      recipe: name of the recipe that is played.
      metrics: counters to update.
      grace: seconds that a session without a socket is kept.
      open_admission: whether players may join by themselves; otherwise only sessions that `admit`
        created can be joined.
    """

    def __init__(
        self,
        engine: Engine,
        folder,
        recipe: str,
        metrics: SessionMetrics,
        grace: float = GRACE_SECONDS,
        open_admission: bool = True,
    ):
        self.loop, self.open_admission = asyncio.get_running_loop(), open_admission
        self.engine, self.folder, self.recipe, self.metrics = engine, folder, recipe, metrics
        self.grace, self.stream = grace, engine.stream
        self.world = self.stream.world
        self.captions = start_frames.captions(self.world, folder)
        self.fingerprint = self.stream.fingerprint()
        self.sessions: dict[str, Session] = {}
        self._starts = TokenBucket(START_RATE, 2 * self.stream.num_slots + 8)
        self._broken_files: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._free = list(range(self.stream.num_slots))
        self._conditions: collections.OrderedDict = collections.OrderedDict()
        # One thread encodes starts and prompts. Another one saves, because a save must not wait for
        # a long start clip.
        self._encoder = ThreadPoolExecutor(1, 'prepare')
        self._saver = ThreadPoolExecutor(1, 'save')
        metrics.slots.set(self.stream.num_slots)

    # --- joining and leaving -------------------------------------------------------------------

    async def join(self, request: dict) -> tuple[Session, bool]:
        """Handles a 'join' message -> (session, whether it continues an earlier one).

        Raises:
          Refused: no slot is free.
          UsageError: the start clip is unknown.
        """
        session = self.sessions.get(request['session'] or '')
        if session:
            self.charge(session, 'join')
            return session, session.was_attached
        if not self.open_admission:
            raise Refused('this session is over')
        return await self._create(self._start_new, request), False

    async def admit(self, token: str, request: dict, data: bytes | None, paused: bool) -> Session:
        """Creates a session that waits for its player.

        Args:
          token: token of the session.
          request: a 'join' message.
          data: bytes of a `.world` file to continue, or None for a new start.
          paused: whether the player had paused it.

        Raises:
          Refused, UsageError: as of `join`, or the bytes do not fit.
        """
        if token in self.sessions:
            return self.sessions[token]
        prepare, source = (self._parse, data) if data else (self._start_new, request)
        session = await self._create(prepare, source, token, paused=True)
        session.was_attached, session.paused = data is not None, paused
        self._wait_for_player(session)
        return session

    async def _create(self, prepare, source, token: str | None = None, paused: bool = False):
        """A session in a free slot; `prepare(source)` -> (log, carry, note)."""
        if not self._free:
            self.metrics.refused.inc()
            raise Refused(f'all {self.stream.num_slots} places are taken; try again in a minute')
        if prepare == self._start_new and not self._starts.take():
            raise TooSoon('new players', self._starts.wait())
        index = self._free.pop(0)
        session = Session(
            self.loop, self.world.cfg.fps, self.metrics, token, self.stream.frames_per_step
        )
        try:
            timeline, carry, session.greeting = await prepare(source)
            session.slot = SlotState(index, timeline, session.deliver, session.report_broken)
            session.slot.on_hurry = session.hurry
            session.slot.paused = paused
            await self._command(self.engine.add, session.slot, carry)
        except BaseException:  # includes the cancellation when the player leaves meanwhile
            if session.slot:
                self.engine.call(self.engine.remove, session.slot)
            self._free.append(index)
            raise
        self.sessions[session.token] = session
        self.metrics.sessions.set(len(self.sessions))
        return session

    def charge(self, session: Session, kind: str):
        """Counts a request of a player.

        Raises:
          TooSoon: there were too many.
        """
        cost = COSTS.get(kind, 1)
        if not session.requests.take(cost):
            raise TooSoon(kind, session.requests.wait(cost))

    def detach(self, session: Session, socket: Socket):
        """Pauses a session whose socket is gone, and keeps it for `grace` seconds."""
        if session.socket is socket:
            session.socket = None
            self._wait_for_player(session)

    def _wait_for_player(self, session: Session):
        self.engine.call(self.engine.pause, session.slot, True)
        session.expiry = self.loop.call_later(self.grace, self.end, session, 'lost')

    async def attach(self, session: Session, socket: Socket) -> Socket | None:
        """Hands a session to a socket -> the socket that had it before, or None."""
        before, _ = session.socket, session.attach(socket)
        await self._command(self.engine.pause, session.slot, session.paused)
        return before

    def end(self, session: Session, reason: str):
        """Ends a session and frees its slot."""
        if self.sessions.pop(session.token, None) is None:
            return
        steps = len(session.slot.log.controls)
        self.engine.call(self.engine.remove, session.slot)
        self._free.append(session.slot.index)
        session.end(reason)
        self.metrics.sessions.set(len(self.sessions))
        log.info(
            'session_end',
            extra={
                'fields': {
                    'session': session.token[:6],
                    'reason': reason,
                    'seconds': round(time.monotonic() - session.began, 1),
                    'steps': steps,
                    'frames': session.sent,
                    'dropped': session.dropped,
                }
            },
        )

    def close(self):
        """Ends all sessions and stops the threads."""
        for session in list(self.sessions.values()):
            self.end(session, 'stopped')
        for executor in (self._encoder, self._saver):
            executor.shutdown(cancel_futures=True)

    def describe(self, session: Session, resumed: bool) -> dict:
        """The fields of a 'welcome' message."""
        slot, cfg = session.slot, self.world.cfg
        return {
            'session': session.token,
            'resumed': resumed,
            'world': self.recipe,
            'width': cfg.width,
            'height': cfg.height,
            'fps': cfg.fps,
            'starts': list(self.captions.items()),
            'start': slot.log.start,
            'seed': slot.log.seed,
            'prompt': slot.log.last_prompt,
            'paused': session.paused,
            'kept': slot.saved is not None,
            'players': self.stream.num_slots,
            'grace': self.grace,
            'message': session.greeting,
            'shift_frames': self.stream.frames_per_step,
            'reads_text': self.world.reads_text,
            'controls': self.world.vocabulary.key_layout(),
        }

    # --- what a player changes -----------------------------------------------------------------

    async def handle(self, session: Session, message: dict):
        """Does what a message asks for; 'join', 'keys', 'seen' and 'leave' are handled elsewhere.

        Raises:
          Refused: it cannot be done, or the player asks for too much at once.
          UsageError: the start clip is unknown.
        """
        self.charge(session, message['type'])
        slot = session.slot
        async with session.lock:
            match message['type']:
                case 'prompt':
                    await self._change_prompt(session, message['text'])
                case 'pause':
                    session.paused = message['on']
                    await self._command(self.engine.pause, slot, message['on'])
                    session.notify_state()
                case 'rewind':
                    seconds = await self._command(self.engine.rewind, slot, message['seconds'])
                    session.notify_state(rewound=round(seconds, 2))
                case 'keep':
                    await self._command(self.engine.save, slot)
                    session.notify_state(saved=True)
                case 'recall':
                    if not await self._command(self.engine.load_saved, slot):
                        raise Refused('nothing was saved yet')
                    session.notify_state(recalled=True)
                case 'record':
                    session.record(message['on'])
                case 'restart':
                    await self._restart(session, self._new_log(message))

    async def start_from_picture(self, session: Session, data: bytes):
        """Restarts a session from a picture that the player sent.

        Raises:
          TooSoon: the player asks for too much at once.
        """
        self.charge(session, 'picture')
        pixels = await self._encode(start_frames.decode_picture, data, self.world)
        request = {'start': None, 'prompt': session.slot.log.last_prompt, 'seed': None}
        timeline = self._new_log(request, start_frames.encode_picture(pixels))
        async with session.lock:
            await self._restart(session, timeline)

    async def save(self, session: Session) -> bytes:
        """The session as the bytes of a `.world` file; does not wait for `session.lock`."""
        timeline, carry = await self._command(self.engine.snapshot, session.slot)
        return await self.loop.run_in_executor(self._saver, snapshot.dump, carry, timeline)

    async def load(self, session: Session, data: bytes):
        """Continues a session from the bytes of a `.world` file.

        Raises:
          Refused: the file broke twice, or the player asks for too much at once.
        """
        self.charge(session, 'world')
        self._note_broken(session)
        digest = hashlib.sha256(data).hexdigest()
        if digest in self._broken_files:
            raise Refused('world file: this world broke again and again; it is not loaded again')
        timeline, carry, note = await self._parse(data)
        async with session.lock:
            await self._command(self.engine.restart, session.slot, timeline, carry)
            session.loaded = digest
            await self._leave_rest(session)
        session.notify_state(loaded=True)
        if note:
            session.notify('note', {'message': note})

    async def copy_log(self, session: Session) -> session_log.Log:
        """A copy of the session's log, made by the engine's thread, which alone changes it."""
        return await self._command(lambda: session.slot.log.copy())

    async def _change_prompt(self, session: Session, prompt: str):
        if not self.world.reads_text:
            raise Refused('prompt: this world reads no text')
        if len(session.slot.log.prompts) >= session_log.MAX_PROMPTS:
            raise Refused(
                f'prompt: changed {session_log.MAX_PROMPTS} times, which is the limit of a '
                'session; start a new one'
            )
        text, cut = await self._encode(self.stream.embed_prompt, prompt)
        await self._command(self.engine.set_prompt, session.slot, prompt, text)
        session.notify_state(**({'cut': cut} if cut else {}))

    def _note_broken(self, session: Session):
        """Remembers the file of a world that broke twice."""
        if session.broke_twice and session.loaded:
            self._broken_files[session.loaded] = None
            if len(self._broken_files) > MAX_BROKEN_FILES:
                self._broken_files.popitem(last=False)

    async def _leave_rest(self, session: Session):
        """Lets a session go on that rested because its world broke."""
        if session.broke_twice:
            session.broke_twice = session.paused = False
            await self._command(self.engine.pause, session.slot, False)

    async def _restart(self, session: Session, timeline: session_log.Log):
        self._note_broken(session)
        timeline, carry, note = await self._prepare(timeline)
        await self._command(self.engine.restart, session.slot, timeline, carry)
        session.loaded = ''
        await self._leave_rest(session)
        session.notify_state(restarted=True, **({'message': note} if note else {}))

    def _new_log(self, request: dict, picture: str | None = None) -> session_log.Log:
        prompt, start = start_frames.choose(
            self.world, self.folder, request['prompt'], request['start']
        )
        seed = request['seed']
        return session_log.Log(
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            num_slots=self.stream.num_slots,
            together=self.stream.together,
            control_binding=self.stream.control_binding,
            mesh=self.stream.mesh,
            prompt=prompt,
            picture=picture,
            seed=secrets.randbelow(session_log.MAX_SEED) if seed is None else seed,
            start=start if picture is None else None,
        )

    async def _start_new(self, request: dict):
        return await self._prepare(self._new_log(request))

    async def _parse(self, data: bytes):
        """As `_prepare`, from the bytes of a `.world` file."""
        carry, timeline = await self._encode(
            snapshot.parse, data, self.stream.carry_shapes, self.fingerprint
        )
        await self._encode(timeline.check, self.world.vocabulary)
        return timeline, carry, replay.difference(self.stream, timeline)

    async def _prepare(self, timeline: session_log.Log):
        """The start of a log -> (log, carry, note for the player)."""
        carry, cut = await self._encode(self._init_carry, timeline)
        note = f'the model does not read the end of the prompt: {cut!r}' if cut else ''
        return timeline, carry, note

    def _init_carry(self, timeline: session_log.Log):
        """In the encoder thread; keeps the encoded start for the next player."""
        name = timeline.start, timeline.prompt
        found = None if timeline.picture else self._conditions.get(name)
        if found is None:
            frames = start_frames.load(self.stream, self.folder, timeline.start, timeline.picture)
            found = self.stream.condition(timeline.prompt, frames)
            if timeline.picture is None:
                self._conditions[name] = found
                if len(self._conditions) > MAX_CONDITIONS:
                    self._conditions.popitem(last=False)
        return self.stream.init(found[0], timeline.seed), found[1]

    async def _encode(self, function, *args):
        return await self.loop.run_in_executor(self._encoder, function, *args)

    async def _command(self, function, *args):
        """Runs a command between two steps of the engine.

        Raises:
          Refused: the engine stopped before it ran the command, or the player has left.
        """
        future = self.engine.call(function, *args)
        try:
            return await asyncio.wrap_future(future)
        except RuntimeError as error:
            raise Refused(str(error)) from error
        except asyncio.CancelledError:
            if not future.cancelled() or asyncio.current_task().cancelling():
                raise
            raise Refused('the engine has stopped') from None
