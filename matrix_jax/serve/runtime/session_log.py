"""What a player did, shift by shift: enough to make the identical video again.

A log always reaches back to the seed and the start clip: rewinding cuts it, and a saved world
brings its own along.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import driving
from matrix_jax.data import start_clips
from matrix_jax.weights import diffusers_layout

VERSION = 1
MAX_SHIFTS = 4_000_000
MAX_RUNS = 2**18  # of equal controls: 18 hours of another key every quarter of a second
LOG_BYTES = 12 * 2**20  # as JSON: all runs with the mouse's words, all prompts, and a picture
RUN = re.compile(r'([A-Za-z0-9+:.-]{1,64})\*([1-9][0-9]{0,6})')
MAX_PROMPT = 500  # characters
MAX_PROMPTS = 1000  # changes
MAX_SEED = 2**31 - 1


class ReplayError(UsageError):
    """A log that cannot be replayed."""


class KeyRuns:
    """The control of every shift, kept as runs of equal ones; else like a list that only grows at
    its end and is cut there.

    One thread changes it. Any may copy it, because every change is a single assignment.

    Attributes:
      lost: the shift from which on the controls are not known any more, as there were more runs or
        shifts than a file holds; or None. The drive itself goes on.
    """

    def __init__(self, symbols=()):
        self._runs: list[tuple[str, int]] = []  # control, and the shift behind its last one
        self.lost: int | None = None
        for symbol, same in itertools.groupby(symbols):
            self.append(symbol, len(list(same)))

    def append(self, symbol: str, count: int = 1):
        """The control of the next shifts."""
        end, runs = len(self) + count, self._runs
        same = bool(runs) and runs[-1][0] == symbol
        full = end > MAX_SHIFTS or (len(runs) >= MAX_RUNS and not same)
        if full and self.lost is None:
            self.lost = len(self)
        if same or self.lost is not None:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((symbol, end))

    def copy(self) -> KeyRuns:
        other = KeyRuns()
        other.lost, other._runs = self.lost, list(self._runs)
        return other

    @property
    def kinds(self) -> set[str]:
        """The controls that occur."""
        return {symbol for symbol, _ in self._runs}

    def __len__(self):
        return self._runs[-1][1] if self._runs else 0

    def __iter__(self):
        begin = 0
        for symbol, end in self._runs:
            yield from itertools.repeat(symbol, end - begin)
            begin = end

    def __getitem__(self, shift: int) -> str:
        return self._runs[self._run(range(len(self))[shift])][0]

    def __delitem__(self, shifts: slice):
        """Only `del runs[shift:]`."""
        cut = shifts.start
        if self.lost is not None and cut <= self.lost:
            self.lost = None
        if cut < len(self):
            run = self._run(cut)
            begin = self._runs[run - 1][1] if run else 0
            self._runs[run:] = [(self._runs[run][0], cut)] if cut > begin else []

    def __eq__(self, other):
        return isinstance(other, KeyRuns) and self._runs == other._runs

    def __repr__(self):
        return f'KeyRuns({self.spell()!r})'

    def _run(self, shift: int) -> int:
        return bisect.bisect_right(self._runs, shift, key=lambda run: run[1])

    def spell(self) -> str:
        """Such as 'D*12,DL*3'."""
        ends = [0, *(end for _, end in self._runs)]
        return ','.join(f'{symbol}*{end - begin}' for (symbol, end), begin in zip(self._runs, ends))

    @classmethod
    def parse(cls, text: str) -> KeyRuns:
        """What `spell` gave.

        Raises:
          ReplayError: it is something else, or too long.
        """
        if text.count(',') >= MAX_RUNS:
            raise ReplayError(
                f'replay.symbols: got {text.count(",") + 1} runs of keys, expected '
                f'at most {MAX_RUNS}'
            )
        found, end, last = cls(), 0, None
        for run in filter(None, text.split(',')):
            match = RUN.fullmatch(run)
            if not match:
                raise ReplayError(f'replay.symbols: got {run[:20]!r}, expected such as D*12')
            symbol, count = match.groups()
            end += int(count)
            if symbol == last:
                found._runs.pop()
            found._runs.append((symbol, end))
            last = symbol
        if end > MAX_SHIFTS:
            raise ReplayError(f'replay.symbols: got {end} shifts, expected at most {MAX_SHIFTS}')
        return found


@dataclasses.dataclass
class Log:
    """One player's timeline.

    Attributes:
      recipe, fingerprint: the world, and its weights (`Slots.fingerprint`).
      slots, together, entry: of the program that ran; another one may round otherwise.
      mesh: as of `Slots`, for the same reason; '' where an older log does not say it.
      seed: of all noise.
      prompt: at the start.
      start: name of a start clip, '' for a plain one, or None if `picture` says it.
      picture: the start picture as PNG, base64.
      symbols: the control of every shift, a text of the world's vocabulary; a list will do.
      prompts: [shift, prompt] of every change.
    """

    recipe: str
    fingerprint: str
    slots: int
    together: int
    entry: str
    seed: int
    prompt: str
    start: str | None = ''
    picture: str | None = None
    symbols: KeyRuns = dataclasses.field(default_factory=KeyRuns)
    prompts: list = dataclasses.field(default_factory=list)
    mesh: str = ''

    def __post_init__(self):
        if not isinstance(self.symbols, KeyRuns):
            self.symbols = KeyRuns(self.symbols)

    @property
    def last_prompt(self) -> str:
        return self.prompts[-1][1] if self.prompts else self.prompt

    def copy(self) -> Log:
        return dataclasses.replace(self, symbols=self.symbols.copy(), prompts=list(self.prompts))

    def to_json(self) -> dict:
        """
        Raises:
          ReplayError: it is longer than a file may be.
        """
        if self.symbols.lost is not None:
            raise ReplayError(
                f'replay: this drive has more than {MAX_RUNS} changes of keys or '
                f'{MAX_SHIFTS} shifts, which no file holds; start a new one'
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {'matrix_jax_session': VERSION, **fields, 'symbols': self.symbols.spell()}

    def dumps(self) -> str:
        """As JSON text, which `loads` takes.

        Raises:
          ReplayError: it is longer than a file may be.
        """
        return _fitting(json.dumps(self.to_json()))

    def check(self, vocabulary):
        """Raises ReplayError if a control is none of the vocabulary."""
        try:
            wrong = [
                symbol for symbol in self.symbols.kinds if vocabulary.canonical(symbol) != symbol
            ]
        except driving.ControlError as error:
            raise ReplayError(f'replay.symbols: {error}') from error
        if wrong:
            raise ReplayError(
                f'replay.symbols: got {wrong[0]!r}, expected {vocabulary.canonical(wrong[0])!r}'
            )


def from_json(found) -> Log:
    """A Log from what `to_json` gave.

    Raises:
      ReplayError: it is something else.
    """
    if not isinstance(found, dict) or found.get('matrix_jax_session') != VERSION:
        raise ReplayError(f'replay: expected a JSON object with matrix_jax_session: {VERSION}')
    names = {field.name for field in dataclasses.fields(Log)}
    given = {'mesh': ''} | {
        name: value for name, value in found.items() if name != 'matrix_jax_session'
    }
    if set(given) != names:
        raise ReplayError(
            f'replay: got the fields {", ".join(sorted(given))}; expected '
            f'{", ".join(sorted(names))}'
        )
    whole = {'seed': MAX_SEED, 'slots': 1024, 'together': 1024}
    for name, most in whole.items():
        if type(given[name]) is not int or not 0 <= given[name] <= most:
            raise ReplayError(f'replay.{name}: got {given[name]!r}, expected 0 to {most}')
    for name in ('recipe', 'fingerprint', 'entry', 'mesh', 'prompt', 'symbols'):
        if not isinstance(given[name], str):
            raise ReplayError(f'replay.{name}: got {type(given[name]).__name__}, expected a string')
    for name in ('start', 'picture'):
        if not isinstance(given[name], str | None):
            raise ReplayError(f'replay.{name}: expected a string or null')
    if (given['start'] is None) == (given['picture'] is None):
        raise ReplayError('replay: expected one of start and picture')
    symbols = KeyRuns.parse(given['symbols'])
    prompts = given['prompts']
    if (
        not isinstance(prompts, list)
        or len(prompts) > MAX_PROMPTS
        or not all(
            isinstance(change, list)
            and len(change) == 2
            and type(change[0]) is int
            and isinstance(change[1], str)
            and len(change[1]) <= MAX_PROMPT
            and 0 <= change[0] <= len(symbols)
            for change in prompts
        )
    ):
        raise ReplayError('replay.prompts: expected pairs of a shift and a prompt')
    return Log(**given | {'symbols': symbols, 'prompts': prompts})


def loads(text: str) -> Log:
    """A Log from JSON text of anyone.

    Raises:
      ValueError: it is something else.
    """
    return from_json(json.loads(_fitting(text)))


def _fitting(text: str) -> str:
    """`text`, unless it is too long; told before much time is spent on it."""
    if len(text) > LOG_BYTES:
        raise ReplayError(f'replay: got a log of {len(text)} bytes, expected at most {LOG_BYTES}')
    return text


def read(path: str) -> Log:
    """The Log in a file."""
    try:
        with Path(path).expanduser().open(encoding='utf-8') as file:
            return loads(file.read(LOG_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ReplayError) else f'not readable ({error})'
        raise ReplayError(f'{path}: {reason}') from error


# --- start clips -------------------------------------------------------------------------------


def starts_folder(world, folder) -> Path:
    """Where a world's start clips are; fresh weights have none but those of their bundled kin."""
    places = Path(folder), diffusers_layout.ASSETS / world.cfg.name.lower()
    return next(filter(start_clips.listing, places), places[0])


def _known(world, folder, start: str | None) -> tuple[Path, dict]:
    """(folder, listing) of the start clips, of which `start` is one, or none is named."""
    place = starts_folder(world, folder)
    found = start_clips.listing(place)
    if start not in (None, '', *found):
        raise ReplayError(
            f'start: got {start!r}, expected one of '
            f'{", ".join(found) or "none: this world brings no start clips"}'
        )
    return place, found


def choose(world, folder, prompt: str | None, start: str | None) -> tuple[str, str]:
    """(prompt, name of a start clip) in full: who says only one of them leaves the other to it."""
    place, found = _known(world, folder, start)
    if prompt is None:
        prompt = found[start]['caption'] if start else world.cfg.prompt
    return prompt, (start_clips.match(place, prompt) or '') if start is None else start


def start_frames(slots, folder, start: str | None, picture: str | None) -> np.ndarray:
    """Start clip uint8 [F H W 3] of a log's `start` or `picture`."""
    cfg, count = slots.world.cfg, slots.start_frames
    if picture is not None:
        try:
            data = base64.b64decode(picture, validate=True)
        except ValueError as error:
            raise ReplayError('replay.picture: not base64') from error
        still = decode_picture(data, slots.world)
    elif start == '':
        still = np.full((cfg.height, cfg.width, 3), 128, np.uint8)
    else:
        place, _ = _known(slots.world, folder, start)
        return start_clips.read(place, start, cfg.height, cfg.width)[:count]
    return np.repeat(still[None], count, 0)


def decode_picture(data: bytes, world, max_pixels: int = 40_000_000):
    """A picture that someone sent, as the world's first frame [H W 3]; its size is judged before it
    is read.

    Raises:
      VideoError: what is wrong with it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=('PNG', 'JPEG', 'WEBP')) as image:
            if image.width * image.height > max_pixels:
                raise video.VideoError(
                    f'picture: got {image.width}x{image.height} pixels, '
                    f'expected at most {max_pixels // 10**6} million'
                )
            image.draft('RGB', (4 * world.cfg.width, 4 * world.cfg.height))
            pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, video.VideoError):
            raise
        raise video.VideoError('picture: not readable as PNG, JPEG or WebP') from error
    return world.fit(pixels[None])[0]


def encode_picture(pixels: np.ndarray) -> str:
    """uint8 [H W 3] -> PNG, base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()


# --- again ---------------------------------------------------------------------------------------


def compile_for(world, params, log: Log):
    """The very program of a log's house.

    Raises:
      ReplayError: the log is of another world or of other weights, or it is empty.
    """
    from matrix_jax.serve.runtime.batched_stream import Slots

    if not log.symbols:
        raise ReplayError('replay: nothing was played in this session')
    log.check(world.vocabulary)
    if log.prompts and not world.reads_text:
        raise ReplayError('replay.prompts: this world reads no text')
    slots = Slots(world, params, log.slots, entry=log.entry, together=log.together)
    if slots.fingerprint() != log.fingerprint:
        raise ReplayError(
            f'replay: the session was played in another world, or with other weights '
            f'(of {log.recipe})'
        )
    return slots.compile()


def difference(slots, log: Log) -> str:
    """One line about what ran otherwise when the log was written, '' if nothing did."""
    now = {'entry': slots.entry, 'together': slots.together, 'mesh': slots.mesh}
    found = [
        f'{name} {str(getattr(log, name))[:60]}, now {value}'
        for name, value in now.items()
        if getattr(log, name) not in ('', value)
    ]
    return (
        (f'played with {"; ".join(found)}: the pictures may not be the very same to the last bit')
        if found
        else ''
    )


def frames(slots, folder, log: Log):
    """Yields the frames uint8 [H W 3] that the player saw."""
    condition, _ = slots.condition(log.prompt, start_frames(slots, folder, log.start, log.picture))
    slots.write(0, slots.begin(condition, log.seed))
    changes = dict(log.prompts)
    active = np.arange(slots.count) == 0
    for shift, symbol in enumerate(log.symbols):
        if shift in changes:
            slots.retext(0, slots.embed(changes[shift])[0])
        made, _ = slots.step(np.repeat(slots.encode(symbol)[None], slots.count, axis=0), active)
        yield from np.asarray(made)[0]
