"""Makes the frames of a session log again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from matrix_jax.serve.runtime import start_frames
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.key_runs import ReplayError
from matrix_jax.serve.runtime.session_log import Log
from matrix_jax.worlds.protocols import World


def compile_stream(world: World, params, log: Log) -> BatchedStream:
    """Compiles the same program that the log was recorded with.

    Raises:
      ReplayError: the log is empty, or of another world or other weights.
    """
    if not log.controls:
        raise ReplayError('replay: nothing was played in this session')
    log.check(world.vocabulary)
    if log.prompts and not world.reads_text:
        raise ReplayError('replay.prompts: this world reads no text')
    stream = BatchedStream(world, params, log.num_slots, log.control_binding, log.together)
    if stream.fingerprint() != log.fingerprint:
        raise ReplayError(
            f'replay: the session was played in another world, or with other weights '
            f'(of {log.recipe})'
        )
    return stream.compile()


def difference(stream: BatchedStream, log: Log) -> str:
    """One line about what differs from the program that wrote the log; '' if nothing does."""
    names = {'entry': 'control_binding', 'together': 'together', 'mesh': 'mesh'}
    found = [
        f'{label} {str(getattr(log, name))[:60]}, now {getattr(stream, name)}'
        for label, name in names.items()
        if getattr(log, name) not in ('', getattr(stream, name))
    ]
    if not found:
        return ''
    return f'played with {"; ".join(found)}: frames may differ in the last bit'


def frames(stream: BatchedStream, folder, log: Log) -> Iterator[np.ndarray]:
    """Yields the frames uint8 [H W 3] that the player saw."""
    start = start_frames.load(stream, folder, log.start, log.picture)
    condition, _ = stream.condition(log.prompt, start)
    stream.write(0, stream.init(condition, log.seed))
    changes = dict(log.prompts)
    active = np.arange(stream.num_slots) == 0
    for step, control in enumerate(log.controls):
        if step in changes:
            stream.set_prompt(0, stream.embed_prompt(changes[step])[0])
        controls = np.repeat(stream.encode(control)[None], stream.num_slots, axis=0)
        output, _ = stream.step(controls, active)
        yield from np.asarray(output)[0]
