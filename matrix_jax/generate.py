"""From a prompt and keys to frames: what the command line, the Python door and tests share.

One compiled step is called once per shift. It hands out frames as the stream makes them; the host
only copies the frames of the previous shift while the next one runs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import checkpoint, controls, sharding, video
from matrix_jax.config import UsageError
from matrix_jax.data import starts
from matrix_jax.stream.pipeline import Pipeline


@dataclasses.dataclass
class Clip:
    """A generated video: frames as they come, and what was measured.

    Attributes:
      symbols: the control symbol of each latent frame that is shown.
      notes: lines that the user should see (cut prompt, unused controls).
      compile_seconds: time to compile everything and to encode the start clip.
      run_seconds: time of all steps so far, copies to the host included.
    """
    symbols: list[str]
    notes: list[str]
    compile_seconds: float = 0.0
    run_seconds: float = 0.0


def plan(world, length: int, control: str | None, control_seed: int, pad: str | None):
    """Shifts of the stream and the symbols of its latent frames.

    Args:
      world: the World.
      length: seconds, at least 1.
      control: comma-separated symbols, one per shown latent frame; None = random.
      control_seed: seed of random symbols.
      pad: None, 'random' or 'hold', for a control string that is too short.

    Returns:
      (shifts, symbols, notes); `len(symbols)` is shifts * group_frames, or the latent frames of a
      whole clip.

    Raises:
      UsageError: length, an unknown symbol, or too few symbols.
    """
    if not (isinstance(length, int) and 1 <= length <= 24 * 3600):
        raise UsageError(f'--length: got {length}, expected whole seconds from 1 to 86400')
    cfg = world.cfg
    if cfg.clip:
        if length > controls.BASE_SECONDS:
            raise UsageError(f'--length: got {length}, expected at most {controls.BASE_SECONDS}: '
                             'this model denoises whole clips (stages 3 and 4 stream)')
        shifts, need = 1, 1 + length * cfg.fps // cfg.frames_per_control
    else:
        latents = length * cfg.fps / cfg.frames_per_control
        shifts = math.ceil(latents / cfg.stream.group_frames)
        need = shifts * cfg.stream.group_frames
    if control is None:
        return shifts, controls.generate_random_control_signal(need, control_seed).split(','), []
    symbols, note = controls.fit(controls.parse(control), need, pad=pad, seed=control_seed)
    return shifts, symbols, [note] if note else []


def start_clip(world, folder: str, prompt: str, source: str | None, is_image: bool) -> np.ndarray:
    """Start frames uint8 [F H W 3] that fill the window: a file of the user, or a bundled clip.

    A bundled clip is chosen by the words that its caption shares with the prompt.
    """
    cfg = world.cfg
    count = 1 + (cfg.stream.frames - 1) * cfg.frames_per_control
    if source is not None:
        frames = (video.read_image(source)[None] if is_image
                  else video.read_video(source, cfg.fps, count))
        frames = video.fit(frames, cfg.height, cfg.width)
        return np.concatenate([frames, np.repeat(frames[-1:], max(count - len(frames), 0), 0)])
    for place in (folder, checkpoint.ASSETS / cfg.name.lower()):   # fresh weights have no clips
        frames = starts.choose(place, prompt, cfg.height, cfg.width)
        if frames is not None:
            break
    else:
        raise UsageError('this world brings no start clip: give --video or --image')
    return frames[:count]


class Player:
    """One stream of one world: start it, step it with symbols, take frames.

    Args:
      world, params: from `worlds.load` or `worlds.open_run`.
      entry: where keys bind, 'tail' or 'head'; the recipe's choice by default.
    """

    def __init__(self, world, params, entry: str | None = None):
        params, decoder = world.apart(params)
        params = world.ready(params)
        self.world, self.params = world, params
        self._condition = jax.jit(world.condition)
        self._pipeline = None
        if decoder is None:
            stream = world.stream(entry)
            self._init = jax.jit(stream.init)
            self._step = jax.jit(stream.step, donate_argnums=1)
        else:
            self._pipeline = Pipeline(**world.halves(entry), params=(params, decoder))
            self._init, self._step = self._pipeline.init, self._pipeline.step

    def start(self, prompt: str, frames: np.ndarray, symbols: list[str], seed: int):
        """Begins a stream.

        Args:
          prompt: text.
          frames: start clip uint8 [F H W 3].
          symbols: controls of the window's frames but its newest group.
          seed: seed of all noise.

        Returns:
          (carry, the text that did not fit the model, '' if all did).
        """
        ids, cut = self.world.tokenize_and_cut([prompt])
        indices = np.asarray([[controls.SYMBOLS.index(symbol) for symbol in symbols]], np.int32)
        condition = self._condition(self.params, ids, frames[None], indices)
        carry = self._init(self.params, condition, jax.random.split(jax.random.key(seed), 1))
        return carry, cut[0]

    def compile(self, carry):
        """Compiles the step for this carry."""
        symbols = jax.ShapeDtypeStruct((1, self.world.cfg.stream.group_frames), jnp.int32)
        if self._pipeline:
            self._pipeline.compile(self.params, carry, symbols)
        else:
            self._step = self._step.lower(self.params, carry, symbols).compile()

    def step(self, carry, symbols: list[str]):
        """One shift under the newest symbols -> (carry, frames uint8 [B F H W 3] on device)."""
        indices = np.asarray([[controls.SYMBOLS.index(symbol) for symbol in symbols]], np.int32)
        return self._step(self.params, carry, indices)


def stream_frames(player: Player, carry, symbols: list[str], clip: Clip) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H W 3] one by one, copying one shift while the next is computed.

    Args:
      symbols: controls of the steps, `group_frames` each.
      clip: its `run_seconds` is kept up to date.
    """
    size = player.world.cfg.stream.group_frames
    began, waiting = time.perf_counter(), None
    for index in range(0, len(symbols) + size, size):
        frames = None
        if index < len(symbols):
            carry, frames = player.step(carry, symbols[index:index + size])
        if waiting is not None:
            done = np.asarray(waiting)[0]
            clip.run_seconds = time.perf_counter() - began
            yield from done
        waiting = frames


def generate(world, params, folder, *, prompt: str | None = None, control: str | None = None,
             length: int = 8, seed: int = 42, control_seed: int = 42, pad: str | None = None,
             image: str | None = None, video_path: str | None = None):
    """Plans, compiles and starts a clip.

    Args:
      world, params: from `worlds.open_run`.
      folder: the weights folder, which may bring start clips.
      prompt: text; the world's own by default.
      control, length, control_seed, pad: see `plan`.
      seed: of all noise; one seed is one video.
      image, video_path: file to start from; a bundled clip that fits the prompt by default.

    Returns:
      (iterator of frames uint8 [H W 3], Clip).

    Raises:
      UsageError: what is wrong with an argument, before anything is computed.
    """
    if image and video_path:
        raise UsageError('--image and --video: got both, expected one start')
    if not 0 <= seed < 2**63:
        raise UsageError(f'--seed: got {seed}, expected 0 to 2**63 - 1')
    cfg = world.cfg
    prompt = cfg.prompt if prompt is None else prompt
    shifts, symbols, notes = plan(world, length, control, control_seed, pad)
    if cfg.clip:
        if image or video_path:
            raise UsageError('--image, --video: this model makes clips from the prompt alone')
        return whole_clip(world, params, prompt, symbols, notes, seed)
    frames = start_clip(world, folder, prompt, image or video_path, bool(image))
    # Every symbol steers the quarter second that it stands for: the window knows what is to come.
    stream = cfg.stream
    before = [symbols[0]] * stream.context
    known = before + symbols + [symbols[-1]] * (stream.frames - stream.context)
    player = Player(world, params, entry='tail')
    began = time.perf_counter()
    carry, cut = player.start(prompt, frames, known[:stream.remembered], seed)
    player.compile(carry)
    seconds = time.perf_counter() - began
    clip = Clip(symbols, notes + cut_note(world, cut), compile_seconds=seconds)
    steps = known[stream.remembered:stream.remembered + shifts * stream.group_frames]
    return stream_frames(player, carry, steps, clip), clip


def whole_clip(world, params, prompt: str, symbols: list[str], notes: list[str], seed: int):
    """The clip of a model that does not stream -> (iterator of its frames, Clip)."""
    ids, cut = world.tokenize_and_cut([prompt])
    notes = notes + cut_note(world, cut[0])
    given = (params, ids, controls.encode(symbols)[None], jax.random.key(seed))
    began = time.perf_counter()
    make = jax.jit(world.sample_clip).lower(*given).compile()
    clip = Clip(symbols, notes, compile_seconds=time.perf_counter() - began)

    def frames():
        began = time.perf_counter()
        made = np.asarray(make(*given))[0]
        clip.run_seconds = time.perf_counter() - began
        yield from made

    return frames(), clip


def cut_note(world, cut: str) -> list[str]:
    """What to tell about the end of a prompt that the model does not read."""
    length = world.cfg.dit.text_length
    return [f'prompt: the model reads {length} tokens; cut off: {cut!r}'] if cut else []


def replayed(run, options):
    """What a player did and saw, again -> (iterator of frames, Clip).

    The frames are those of `tools/play.py` to the last bit, on a device of the same kind.
    """
    from matrix_jax import worlds
    from matrix_jax.serve import replay
    log = replay.read(options.replay)
    given = [f'--{name}' for name in ('prompt', 'control', 'image', 'video', 'pad')
             if getattr(options, name) is not None]
    if given:
        raise UsageError(f'--replay: got {", ".join(given)} as well, which the session decides')
    began = time.perf_counter()
    slots = replay.compile_for(*worlds.open_run(run), log)
    clip = Clip([symbol for symbol in controls.decode(list(log.symbols))
                 for _ in range(slots.group)], [], compile_seconds=time.perf_counter() - began)

    def frames():
        began = time.perf_counter()
        for frame in replay.frames(slots, checkpoint.resolve(run.weights), log):
            clip.run_seconds = time.perf_counter() - began
            yield frame

    return frames(), clip


def summary(run) -> str:
    """Parameters, and memory per device of the run's mesh, which may be more than there are."""
    from matrix_jax import worlds
    return worlds.build(run.world).summary(sharding.abstract_mesh(run.mesh))


def to_file(run, options):
    """What `tools/generate.py` does: checks all, then writes one video -> (path, Clip, frames)."""
    from tqdm import tqdm

    from matrix_jax import worlds
    name = run.name.replace(':', '-').lower()
    path = video.check_path(run.out or f'outputs/{name}-{options.seed}.mp4')
    if options.replay:
        frames, clip = replayed(run, options)
        world = worlds.build(run.world)
    else:
        plan(worlds.build(run.world), options.length, options.control, options.control_seed,
             options.pad)
        world, params = worlds.open_run(run)
        frames, clip = generate(
            world, params, checkpoint.resolve(run.weights), prompt=options.prompt,
            control=options.control, length=options.length, seed=options.seed,
            control_seed=options.control_seed, pad=options.pad, image=options.image,
            video_path=options.video)
    for note in clip.notes:
        print(f'note: {note}')
    per = world.cfg.frames_per_control
    # The first latent frame of a whole clip is a single frame.
    keys = [symbol for symbol in clip.symbols for _ in range(per)]
    keys = keys[per - 1:] if world.cfg.clip else keys
    total, keys = len(keys), None if options.no_overlay else keys
    bar = tqdm(frames, total=total, unit='frame', dynamic_ncols=True)
    count = video.write_video(path, bar, world.cfg.fps, keys)
    return path, clip, count
