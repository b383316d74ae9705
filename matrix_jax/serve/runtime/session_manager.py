"""Who plays: admission to a fixed number of slots, and all that a player may change in a world."""

from __future__ import annotations

import asyncio
import collections
import logging
import secrets
import time
from concurrent.futures import Future, ThreadPoolExecutor

from matrix_jax.controls.driving import ControlError
from matrix_jax.data import start_clips
from matrix_jax.serve.runtime import session_log, snapshot
from matrix_jax.serve.runtime.engine import Engine, Seat
from matrix_jax.serve.runtime.session import Session
from matrix_jax.serve.web.protocol import MessageError

log = logging.getLogger(__name__)
GRACE_SECONDS = 30.0  # a lost player may come back


class Refused(Exception):
    """What a player asked for cannot be had; the message may be shown."""


class House:
    """Sessions by token; lives in the event loop of the server.

    Args:
      engine: started.
      folder: weights folder, which may bring start clips.
      recipe: name of what is played.
      meters: counters.
      door: whether a player may come in by itself; else only those that `admit` has seated.
    """

    def __init__(
        self,
        engine: Engine,
        folder,
        recipe: str,
        meters,
        grace: float = GRACE_SECONDS,
        door: bool = True,
    ):
        self.loop, self.door = asyncio.get_running_loop(), door
        self.engine, self.folder, self.recipe, self.meters = engine, folder, recipe, meters
        self.grace, self.slots = grace, engine.slots
        self.cfg = self.slots.world.cfg
        self.captions = {
            theme: start['caption']
            for theme, start in start_clips.listing(
                session_log.starts_folder(self.slots.world, folder)
            ).items()
        }
        self.fingerprint = self.slots.fingerprint()
        self.sessions: dict[str, Session] = {}
        self._free = list(range(self.slots.count))
        self._conditions: collections.OrderedDict = collections.OrderedDict()
        # Start clips and prompts are encoded beside the engine, one at a time; moments are saved
        # beside that, since a player may be back at its last one by the time that a clip is done.
        self._worker = ThreadPoolExecutor(1, 'prepare')
        self._saver = ThreadPoolExecutor(1, 'save')
        meters.slots.set(self.slots.count)

    # --- coming and going ------------------------------------------------------------------------

    async def join(self, wanted: dict) -> tuple[Session, bool]:
        """The session of a 'join' message, and whether it goes on.

        Raises:
          Refused: no slot is free, or the start is unknown.
        """
        session = self.sessions.get(wanted['session'] or '')
        if session:
            return session, session.met
        if not self.door:
            raise Refused('this session is over')
        return await self._seat(self._anew, wanted), False

    async def admit(self, token: str, wanted: dict, data: bytes | None, paused: bool) -> Session:
        """A session that waits for its player.

        Args:
          token: of the session.
          wanted: a 'join' message.
          data: bytes of a `.world` file to go on from, or None for a new drive.
          paused: whether it rests.

        Raises:
          Refused, UsageError: as of `join`, or the data do not fit.
        """
        if token in self.sessions:
            return self.sessions[token]
        prepare, given = (self._parse, data) if data else (self._anew, wanted)
        session = await self._seat(prepare, given, token, rests=True)
        session.met, session.paused = data is not None, paused
        self._leave_for_now(session)
        return session

    async def _seat(self, prepare, given, token: str | None = None, rests: bool = False):
        """A session at a free slot; `prepare(given)` -> (log, carry, note)."""
        if not self._free:
            self.meters.refused.inc()
            raise Refused(
                f'the house is full: all {self.slots.count} places are taken; try again in a minute'
            )
        index = self._free.pop(0)
        session = Session(self.loop, self.cfg.fps, self.meters, token)
        try:
            timeline, carry, session.greeting = await prepare(given)
            session.seat = Seat(index, timeline, session.deliver, session.broken)
            session.seat.paused = rests
            await ask(self.engine.seat(session.seat, carry))
        except BaseException:  # a player who left meanwhile as well
            if session.seat:
                self.engine.leave(session.seat)
            self._free.append(index)
            raise
        self.sessions[session.token] = session
        self.meters.sessions.set(len(self.sessions))
        return session

    def detach(self, session: Session, socket):
        """The socket of a session is gone; its slot rests and waits a while for it."""
        if session.socket is not socket:
            return
        session.socket = None
        self._leave_for_now(session)

    def _leave_for_now(self, session: Session):
        """Nobody sees this session; it rests, and ends after a while."""
        self.engine.pause(session.seat, True)
        session.lost = self.loop.call_later(self.grace, self.end, session, 'lost')

    async def attach(self, session: Session, socket):
        """A socket plays this session from now on -> the one that did so far, or None."""
        before, _ = session.socket, session.attach(socket)
        await ask(self.engine.pause(session.seat, session.paused))
        return before

    def end(self, session: Session, reason: str):
        """Ends a session for good."""
        if self.sessions.pop(session.token, None) is None:
            return
        if session.lost:
            session.lost.cancel()
        shifts = len(session.seat.log.symbols)
        self.engine.leave(session.seat)
        self._free.append(session.seat.index)
        session.socket, session.recording, session.recorded = None, None, []
        session.pictures.clear()
        session.reason = reason
        session.over.set()
        self.meters.sessions.set(len(self.sessions))
        log.info(
            'session_end',
            extra={
                'fields': {
                    'session': session.token[:6],
                    'reason': reason,
                    'seconds': round(time.monotonic() - session.began, 1),
                    'shifts': shifts,
                    'frames': session.sent,
                    'dropped': session.dropped,
                }
            },
        )

    def close(self):
        """Ends all sessions and the helpers."""
        for session in list(self.sessions.values()):
            self.end(session, 'stopped')
        for helper in (self._worker, self._saver):
            helper.shutdown(cancel_futures=True)

    def describe(self, session: Session, resumed: bool) -> dict:
        """The welcome of a player."""
        seat, cfg = session.seat, self.cfg
        return {
            'session': session.token,
            'resumed': resumed,
            'world': self.recipe,
            'width': cfg.width,
            'height': cfg.height,
            'fps': cfg.fps,
            'starts': list(self.captions.items()),
            'start': seat.log.start,
            'seed': seat.log.seed,
            'prompt': seat.log.last_prompt,
            'paused': session.paused,
            'kept': seat.kept is not None,
            'players': self.slots.count,
            'grace': self.grace,
            'message': session.greeting,
            'shift_frames': self.slots.frames,
            'reads_text': self.slots.world.reads_text,
            'controls': self.slots.world.vocabulary.page(),
        }

    def canonical(self, symbol: str) -> str:
        """The one spelling of a control.

        Raises:
          MessageError: this world has none of that name.
        """
        try:
            return self.slots.world.vocabulary.canonical(symbol)
        except ControlError as error:
            raise MessageError(f'keys.symbol: {error}') from error

    # --- what a player changes -------------------------------------------------------------------

    async def handle(self, session: Session, message: dict):
        """Does what a message asks for, except 'join', 'keys', 'seen' and 'leave'.

        Raises:
          Refused: it cannot be done.
        """
        kind, seat, engine = message['type'], session.seat, self.engine
        async with session.busy:
            if kind == 'prompt':
                if not self.slots.world.reads_text:
                    raise Refused('prompt: this world reads no text')
                if len(seat.log.prompts) >= session_log.MAX_PROMPTS:
                    raise Refused(
                        f'prompt: changed {session_log.MAX_PROMPTS} times, which is all that '
                        'a drive holds; start a new one'
                    )
                text, cut = await self._work(self.slots.embed, message['text'])
                await ask(engine.retext(seat, message['text'], text))
                session.state(**({'cut': cut} if cut else {}))
            elif kind == 'pause':
                session.paused = message['on']
                await ask(engine.pause(seat, message['on']))
                session.state()
            elif kind == 'rewind':
                seconds = await ask(engine.rewind(seat, message['seconds']))
                session.state(rewound=round(seconds, 2))
            elif kind == 'keep':
                await ask(engine.keep(seat))
                session.state()
            elif kind == 'recall':
                if not await ask(engine.recall(seat)):
                    raise Refused('nothing was saved yet')
                session.state(recalled=True)
            elif kind == 'record':
                session.record(message['on'])
            elif kind == 'restart':
                await self._restart(session, self._log(message))

    async def picture(self, session: Session, data: bytes):
        """Starts a session again from a picture that the player sent."""
        pixels = await self._work(session_log.decode_picture, data, self.slots.world)
        wanted = {'start': None, 'prompt': session.seat.log.last_prompt, 'seed': None}
        timeline = self._log(wanted, session_log.encode_picture(pixels))
        async with session.busy:
            await self._restart(session, timeline)

    async def save(self, session: Session) -> bytes:
        """The session's moment as the bytes of a `.world` file; waits for no other wish."""
        timeline, carry = await ask(self.engine.moment(session.seat))
        return await self.loop.run_in_executor(self._saver, snapshot.dump, carry, timeline)

    async def load(self, session: Session, data: bytes):
        """Goes on from the bytes of a `.world` file."""
        timeline, carry, note = await self._parse(data)
        async with session.busy:
            await ask(self.engine.restart(session.seat, timeline, carry))
        session.state(loaded=True)
        if note:
            session.note('note', {'message': note})

    async def _restart(self, session: Session, timeline: session_log.Log):
        timeline, carry, note = await self._prepare(timeline)
        await ask(self.engine.restart(session.seat, timeline, carry))
        session.state(restarted=True, **({'message': note} if note else {}))

    def _log(self, wanted: dict, picture: str | None = None) -> session_log.Log:
        prompt, start = session_log.choose(
            self.slots.world, self.folder, wanted['prompt'], wanted['start']
        )
        seed = wanted['seed']
        return session_log.Log(
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            slots=self.slots.count,
            together=self.slots.together,
            entry=self.slots.entry,
            mesh=self.slots.mesh,
            prompt=prompt,
            picture=picture,
            seed=secrets.randbelow(session_log.MAX_SEED) if seed is None else seed,
            start=start if picture is None else None,
        )

    async def _anew(self, wanted: dict):
        return await self._prepare(self._log(wanted))

    async def _parse(self, data: bytes):
        """As `_prepare`, from the bytes of a `.world` file."""
        carry, timeline = await self._work(snapshot.parse, data, self.slots.like, self.fingerprint)
        await self._work(timeline.check, self.slots.world.vocabulary)
        return timeline, carry, session_log.difference(self.slots, timeline)

    async def _prepare(self, timeline: session_log.Log):
        """(log, carry, what the player should know) of a new timeline."""
        carry, cut = await self._work(self._begin, timeline)
        note = f'the model does not read the end of the prompt: {cut!r}' if cut else ''
        return timeline, carry, note

    def _begin(self, timeline: session_log.Log):
        """In the worker; what a start clip and a prompt give is kept for the next player."""
        name = timeline.start, timeline.prompt
        found = None if timeline.picture else self._conditions.get(name)
        if found is None:
            found = self.slots.condition(
                timeline.prompt,
                session_log.start_frames(self.slots, self.folder, timeline.start, timeline.picture),
            )
            if timeline.picture is None:
                self._conditions[name] = found
                if len(self._conditions) > 16:
                    self._conditions.popitem(last=False)
        return self.slots.begin(found[0], timeline.seed), found[1]

    async def _work(self, function, *given):
        return await self.loop.run_in_executor(self._worker, function, *given)


async def ask(future: Future):
    """The result of an engine's future.

    Raises:
      Refused: the engine stopped before it was done, or the player has left.
    """
    try:
        return await asyncio.wrap_future(future)
    except RuntimeError as error:
        raise Refused(str(error)) from error
    except asyncio.CancelledError:
        if not future.cancelled() or asyncio.current_task().cancelling():
            raise
        raise Refused('the engine has stopped') from None
