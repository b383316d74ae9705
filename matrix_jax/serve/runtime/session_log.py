"""What a player did, step by step: enough to make the identical video again.

A log always starts at the seed and the start frames. Rewinding cuts it, and a saved world carries
its own log.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from matrix_jax.controls import driving
from matrix_jax.controls.vocabulary import Vocabulary
from matrix_jax.serve.runtime import key_runs
from matrix_jax.serve.runtime.key_runs import KeyRuns, ReplayError

VERSION = 1
LOG_BYTES = 12 * 2**20  # as JSON: the most runs with long controls, all prompts, and a picture
MAX_PROMPT = 500  # characters
MAX_PROMPTS = 1000  # changes
MAX_SEED = 2**31 - 1
# Files keep the names of version 1.
FILE_KEYS = {'controls': 'symbols', 'control_binding': 'entry', 'num_slots': 'slots'}
FILE_BINDINGS = {'early': 'head', 'late': 'tail'}


@dataclasses.dataclass
class Log:
    """One player's log.

    Attributes:
      recipe, fingerprint: the world, and its weights (`BatchedStream.fingerprint`).
      num_slots, together, control_binding: as of the `BatchedStream` that ran; a program compiled
        for other values may round differently.
      seed: seed of all noise.
      prompt: prompt at the start.
      start: name of a start clip, '' for a plain grey one, or None if there is a `picture`.
      picture: the start picture as PNG, base64.
      controls: control of every step, in the words of the world's vocabulary; accepts a list.
      prompts: [step, prompt] for every change.
      mesh: as of the `BatchedStream`; '' in older logs.
    """

    recipe: str
    fingerprint: str
    num_slots: int
    together: int
    control_binding: str
    seed: int
    prompt: str
    start: str | None = ''
    picture: str | None = None
    controls: KeyRuns = dataclasses.field(default_factory=KeyRuns)
    prompts: list = dataclasses.field(default_factory=list)
    mesh: str = ''

    def __post_init__(self):
        if not isinstance(self.controls, KeyRuns):
            self.controls = KeyRuns(self.controls)

    @property
    def last_prompt(self) -> str:
        """The prompt in force."""
        return self.prompts[-1][1] if self.prompts else self.prompt

    def copy(self) -> Log:
        """An independent copy."""
        return dataclasses.replace(self, controls=self.controls.copy(), prompts=list(self.prompts))

    def to_json(self) -> dict:
        """The log as a JSON object.

        Raises:
          ReplayError: the log is longer than a file may be.
        """
        if self.controls.lost is not None:
            raise ReplayError(
                f'replay: this session has more than {key_runs.MAX_RUNS} changes of keys or '
                f'{key_runs.MAX_STEPS} steps, which no file holds; start a new one'
            )
        fields = {
            FILE_KEYS.get(field.name, field.name): getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        return {
            'matrix_jax_session': VERSION,
            **fields,
            'symbols': self.controls.format(),
            'entry': FILE_BINDINGS.get(self.control_binding, self.control_binding),
        }

    def dumps(self) -> str:
        """The log as JSON text, for `loads`.

        Raises:
          ReplayError: the log is longer than a file may be.
        """
        return _check_size(json.dumps(self.to_json()))

    def check(self, vocabulary: Vocabulary):
        """Raises ReplayError if a control is not in the vocabulary."""
        try:
            wrong = [
                control
                for control in self.controls.distinct
                if vocabulary.canonical(control) != control
            ]
        except driving.ControlError as error:
            raise ReplayError(f'replay.symbols: {error}') from error
        if wrong:
            raise ReplayError(
                f'replay.symbols: got {wrong[0]!r}, expected {vocabulary.canonical(wrong[0])!r}'
            )


def is_text(value, longest: int = MAX_PROMPT) -> bool:
    """Whether a value is text that a tokenizer accepts, of at most `longest` characters.

    Half a surrogate pair is valid JSON, but a tokenizer does not accept it.
    """
    return (
        isinstance(value, str)
        and len(value) <= longest
        and not any('\ud800' <= letter <= '\udfff' for letter in value)
    )


def from_json(found) -> Log:
    """Reads the output of `Log.to_json`.

    Raises:
      ReplayError: it is not a valid log.
    """
    if not isinstance(found, dict) or found.get('matrix_jax_session') != VERSION:
        raise ReplayError(f'replay: expected a JSON object with matrix_jax_session: {VERSION}')
    keys = {field.name: FILE_KEYS.get(field.name, field.name) for field in dataclasses.fields(Log)}
    given = {'mesh': ''} | {
        name: value for name, value in found.items() if name != 'matrix_jax_session'
    }
    if set(given) != set(keys.values()):
        raise ReplayError(
            f'replay: got the fields {", ".join(sorted(given))}; expected '
            f'{", ".join(sorted(keys.values()))}'
        )
    for name, most in {'seed': MAX_SEED, 'slots': 1024, 'together': 1024}.items():
        if type(given[name]) is not int or not 0 <= given[name] <= most:
            raise ReplayError(f'replay.{name}: got {given[name]!r}, expected 0 to {most}')
    for name in ('recipe', 'fingerprint', 'entry', 'mesh', 'prompt', 'symbols'):
        if not isinstance(given[name], str):
            raise ReplayError(f'replay.{name}: got {type(given[name]).__name__}, expected a string')
    for name in ('start', 'picture'):
        if not isinstance(given[name], str | None):
            raise ReplayError(f'replay.{name}: expected a string or null')
    for name in ('recipe', 'fingerprint', 'entry', 'mesh', 'prompt', 'start'):
        if given[name] is not None and not is_text(given[name]):
            raise ReplayError(f'replay.{name}: expected text of at most {MAX_PROMPT} characters')
    if (given['start'] is None) == (given['picture'] is None):
        raise ReplayError('replay: expected one of start and picture')
    controls = KeyRuns.parse(given['symbols'])
    prompts = given['prompts']
    if (
        not isinstance(prompts, list)
        or len(prompts) > MAX_PROMPTS
        or not all(
            isinstance(change, list)
            and len(change) == 2
            and type(change[0]) is int
            and is_text(change[1])
            and 0 <= change[0] <= len(controls)
            for change in prompts
        )
    ):
        raise ReplayError('replay.prompts: expected pairs of a step and a prompt')
    bindings = {old: new for new, old in FILE_BINDINGS.items()}
    fields = {name: given[key] for name, key in keys.items()}
    binding = bindings.get(given['entry'], given['entry'])
    return Log(**fields | {'controls': controls, 'control_binding': binding})


def loads(text: str) -> Log:
    """Reads JSON text from an untrusted source.

    Raises:
      ValueError: it is not a valid log.
    """
    return from_json(json.loads(_check_size(text)))


def read(path: str) -> Log:
    """Reads a log file.

    Raises:
      ReplayError: the file is not readable, or not a valid log.
    """
    try:
        with Path(path).expanduser().open(encoding='utf-8-sig') as file:
            return loads(file.read(LOG_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ReplayError) else f'not readable ({error})'
        raise ReplayError(f'{path}: {reason}') from error


def _check_size(text: str) -> str:
    if len(text) > LOG_BYTES:
        raise ReplayError(f'replay: got a log of {len(text)} bytes, expected at most {LOG_BYTES}')
    return text
