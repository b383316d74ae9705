"""From a prompt and keys to frames: what the command line, the Python door and tests share.

One compiled step is called once per shift. It hands out frames as the stream makes them; the host
only copies the frames of the previous shift while the next one runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np

from matrix_jax import recipes, video
from matrix_jax.config import UsageError, check_writable
from matrix_jax.data import start_clips
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.weights import diffusers_layout

DEFAULT_LENGTH, LONGEST = 8, 24 * 3600  # seconds


@dataclasses.dataclass
class GeneratedVideo:
    """A generated video: frames as they come, and what was measured.

    Attributes:
      symbols: the controls that are shown, each for as many frames as one steers.
      notes: lines that the user should see (cut prompt, unused controls).
      compile_seconds: time to compile everything and to encode the start clip.
      run_seconds: time of all steps so far, copies to the host included.
    """

    symbols: list[str]
    notes: list[str]
    compile_seconds: float = 0.0
    run_seconds: float = 0.0


def plan(world, length: int | None, control: str | None, control_seed: int, pad: str | None):
    """The controls of a video.

    Args:
      world: the World.
      length: seconds, at least 1. None = as long as the controls, whose last one is held to the end
        of its step; without controls or with a `pad`, 8 or the longest whole clip.
      control: text of the world's vocabulary; None = random.
      control_seed: seed of random controls.
      pad: None, 'random' or 'hold', for controls that are too few.

    Returns:
      (controls, notes).

    Raises:
      UsageError, ControlError: length, an unknown control, or too few of them.
    """
    count = None
    if length is None and control is not None and pad is None:
        count = world.vocabulary.count(control)
    if count:
        if count * world.vocabulary.frames > LONGEST * world.cfg.fps:
            raise UsageError(
                f'--control: got {count} controls, expected a video of at most {LONGEST} seconds'
            )
        return world.vocabulary.read(control, world.round_up_controls(count), pad='hold')
    if length is None:
        length = min(DEFAULT_LENGTH, world.max_seconds or DEFAULT_LENGTH)
    if not (isinstance(length, int) and 1 <= length <= LONGEST):
        raise UsageError(f'--length: got {length}, expected whole seconds from 1 to {LONGEST}')
    return world.vocabulary.read(control, world.controls_for_seconds(length), pad=pad, seed=control_seed)


def start_clip(world, folder: str, prompt: str, source: str | None, is_image: bool) -> np.ndarray:
    """Start frames uint8 [F H W 3]: from a file of the user, or a bundled clip.

    A bundled clip is chosen by the words that its caption shares with the prompt.
    """
    cfg, count = world.cfg, world.start_frames
    if source is not None:
        frames = world.fit(
            video.read_image(source)[None] if is_image else video.read_video(source, cfg.fps, count)
        )
        return np.concatenate([frames, np.repeat(frames[-1:], max(count - len(frames), 0), 0)])
    for place in (
        folder,
        diffusers_layout.ASSETS / cfg.name.lower(),
    ):  # fresh weights have no clips
        frames = start_clips.choose(place, prompt, cfg.height, cfg.width)
        if frames is not None:
            break
    else:
        raise UsageError('this world brings no start clip: give --video or --image')
    return frames[:count]


class StreamRunner:
    """One stream of one world: start it, step it with controls, take frames.

    Args:
      world, params: from `worlds.load` or `worlds.open_run`.
      control_binding: where keys bind, 'late' or 'early'; the recipe's choice by default.
    """

    def __init__(self, world, params, control_binding: str | None = None):
        params, decoder = world.split_decoder(params)
        self.world, self.params = world, params
        self._mesh = sharding.mesh_of(params)
        self._condition = compilation.jit(world.condition, fast_compile=True)
        self._pipeline = self._prefill = None
        if decoder is None:
            stream = world.stream(control_binding)
            self._init, self._step = compilation.jit(stream.init, fast_compile=True), stream.step
            if stream.prefill is not stream.step:
                self._prefill = compilation.jit(stream.prefill, donate_argnums=1)
        else:
            self._pipeline = Pipeline(**world.stages(control_binding), params=(params, decoder))
            self._init, self._step = self._pipeline.init, self._pipeline.step

    def start(self, prompt: str, frames: np.ndarray, known: list[str], seed: int):
        """Begins a stream.

        Args:
          prompt: text.
          frames: start clip uint8 [F H W 3].
          known: controls that the start takes, the first of `world.split_controls`.
          seed: seed of all noise.

        Returns:
          (carry, the text that did not fit the model, '' if all did).
        """
        given, cut = self.world.inputs(prompt, frames, known)
        key = jax.random.split(jax.random.key(seed), 1)
        with sharding.use_mesh(self._mesh):
            condition = self._condition(self.params, *given)
            return self._init(self.params, condition, key), cut

    def compile(self, carry, steps: list[list[str]]):
        """Compiles for this carry and the controls of steps to come, unless it has for others.

        Returns:
          (carry, frames or None): where the first step differs from the others, it is made here.
        """
        frames = None
        with sharding.use_mesh(self._mesh):
            if self._prefill:
                carry, frames = self._prefill(self.params, carry, self._encoded(steps[0]))
                steps = steps[1:]
            if steps and self._pipeline:
                self._pipeline.compile(self.params, carry, self._encoded(steps[0]))
            elif steps and not isinstance(self._step, jax.stages.Compiled):
                step = compilation.jit(
                    self._step, donate_argnums=1, out_shardings=(sharding.tree_shardings(carry), None)
                )
                self._step = step.lower(self.params, carry, self._encoded(steps[0])).compile()
        return carry, frames

    def step(self, carry, given: list[str]):
        """One step under the newest controls -> (carry, frames uint8 [B F H W 3] on device); after
        `compile`."""
        return self._step(self.params, carry, self._encoded(given))

    def _encoded(self, given):
        return self.world.vocabulary.encode(given)[None]


def stream_frames(
    player: StreamRunner, carry, steps: list[list[str]], clip: GeneratedVideo, first=None
) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H W 3] one by one, copying one step while the next is computed.

    Args:
      steps: controls of each step.
      clip: its `run_seconds` is kept up to date.
      first: frames that `compile` has made.
    """
    began, waiting = time.perf_counter(), first
    for given in (*steps, None):
        frames = None
        if given is not None:
            carry, frames = player.step(carry, given)
        if waiting is not None:
            done = np.asarray(waiting)[0]
            clip.run_seconds = time.perf_counter() - began
            yield from done
        waiting = frames


def generate(
    world,
    params,
    folder,
    *,
    prompt: str | None = None,
    control: str | None = None,
    length: int | None = None,
    seed: int = 42,
    control_seed: int = 42,
    pad: str | None = None,
    image: str | None = None,
    video_path: str | None = None,
    say=lambda line: None,
):
    """Plans, compiles and starts a clip.

    Args:
      world, params: from `worlds.open_run`.
      folder: the weights folder, which may bring start clips.
      prompt: text; the world's own by default.
      control, length, control_seed, pad: see `plan`.
      seed: of all noise; one seed is one video.
      image, video_path: file to start from; a bundled clip that fits the prompt by default.
      say: takes a line of progress.

    Returns:
      (iterator of frames uint8 [H W 3], GeneratedVideo).

    Raises:
      UsageError: what is wrong with an argument, before anything is computed.
    """
    if image and video_path:
        raise UsageError('--image and --video: got both, expected one start')
    if not 0 <= seed < 2**63:
        raise UsageError(f'--seed: got {seed}, expected 0 to 2**63 - 1')
    if prompt is not None and not world.reads_text and (image or video_path):
        raise UsageError('--prompt: this model reads no text, and its start is given')
    prompt = world.cfg.prompt if prompt is None else prompt
    symbols, notes = plan(world, length, control, control_seed, pad)
    if not world.start_frames and (image or video_path):
        raise UsageError('--image, --video: this model makes clips from the prompt alone')
    frames = None
    if world.start_frames:
        frames = start_clip(world, folder, prompt, image or video_path, bool(image))
    say(f'compiling {world.cfg.name}')
    if world.cfg.clip:
        return whole_clip(world, params, prompt, frames, symbols, notes, seed)
    known, steps = world.split_controls(symbols)
    player = StreamRunner(world, params, control_binding='late')
    began = time.perf_counter()
    carry, cut = player.start(prompt, frames, known, seed)
    carry, first = player.compile(carry, steps)
    seconds = time.perf_counter() - began
    clip = GeneratedVideo(symbols, notes + cut_note(world, cut), compile_seconds=seconds)
    steps = steps if first is None else steps[1:]
    return stream_frames(player, carry, steps, clip, first), clip


def whole_clip(world, params, prompt: str, start, symbols: list[str], notes: list[str], seed: int):
    """The clip of a model that does not stream -> (iterator of its frames, GeneratedVideo)."""
    given, cut = world.inputs(prompt, start, symbols)
    notes = notes + cut_note(world, cut)
    given = (params, *given, jax.random.key(seed))
    began = time.perf_counter()
    with sharding.use_mesh(sharding.mesh_of(params)):
        make = compilation.jit(world.sample_clip).lower(*given).compile()
    clip = GeneratedVideo(symbols, notes, compile_seconds=time.perf_counter() - began)

    def frames():
        began = time.perf_counter()
        made = np.asarray(make(*given))[0]
        clip.run_seconds = time.perf_counter() - began
        yield from made

    return frames(), clip


def cut_note(world, cut: str) -> list[str]:
    """What to tell about the end of a prompt that the model does not read."""
    if not cut:
        return []
    return [f'prompt: the model reads {world.cfg.dit.text_length} tokens; cut off: {cut!r}']


def recipe_of_log(options) -> str:
    """The recipe of the session that is to be replayed.

    Raises:
      UsageError: the user names another one.
    """
    from matrix_jax.serve.runtime import session_log

    played = session_log.read(options.replay).recipe
    if options.recipe and recipes.load(options.recipe).name != played:
        raise UsageError(
            f'--replay: got the recipe {options.recipe}, expected {played[:60]}, in '
            f'which {options.replay} was played; it may be left out'
        )
    return played


def replayed(run, options):
    """What a player did and saw, again -> (iterator of frames, GeneratedVideo).

    The frames are those of `matrix-jax play` to the last bit, on a device of the same kind.
    """
    from matrix_jax import worlds
    from matrix_jax.serve.runtime import replay, session_log

    log = session_log.read(options.replay)
    given = [
        f'--{name}'
        for name in ('prompt', 'control', 'image', 'video', 'pad')
        if getattr(options, name) is not None
    ]
    if given:
        raise UsageError(f'--replay: got {", ".join(given)} as well, which the session decides')
    began = time.perf_counter()
    stream = replay.compile_stream(
        *worlds.open_run(run, split_decoder=run.world.clip is None), log
    )
    clip = GeneratedVideo(
        [control for control in log.controls for _ in range(stream.controls_per_step)],
        list(filter(None, [replay.difference(stream, log)])),
        compile_seconds=time.perf_counter() - began,
    )

    def frames():
        began = time.perf_counter()
        for frame in replay.frames(stream, diffusers_layout.resolve(run.weights), log):
            clip.run_seconds = time.perf_counter() - began
            yield frame

    return frames(), clip


def summary(run) -> str:
    """Parameters, and memory per device of the run's mesh, which may be more than there are."""
    from matrix_jax import worlds

    return worlds.build(run.world).summary(sharding.abstract_mesh(run.mesh))


def to_file(run, options):
    """What `matrix-jax generate` does: checks all, then writes one video -> (path, GeneratedVideo, frames)."""
    from tqdm import tqdm

    from matrix_jax import worlds

    name = run.name.replace(':', '-').lower()
    path = video.check_path(run.out or f'outputs/{name}-{options.seed}.mp4')
    check_writable('--out', path)
    if options.replay:
        frames, clip = replayed(run, options)
        world = worlds.build(run.world)
    else:
        plan(
            worlds.build(run.world),
            options.length,
            options.control,
            options.control_seed,
            options.pad,
        )
        world, params = worlds.open_run(run, split_decoder=run.world.clip is None)
        frames, clip = generate(
            world,
            params,
            diffusers_layout.resolve(run.weights),
            prompt=options.prompt,
            control=options.control,
            length=options.length,
            seed=options.seed,
            control_seed=options.control_seed,
            pad=options.pad,
            image=options.image,
            video_path=options.video,
            say=print,
        )
    for note in clip.notes:
        print(f'note: {note}')
    vocabulary = world.vocabulary
    per = vocabulary.frames
    # The first latent frame of a whole clip is a single frame.
    keys = [vocabulary.overlay(symbol) for symbol in clip.symbols for _ in range(per)]
    keys = keys[per - 1 :] if world.cfg.clip else keys
    total, keys = len(keys), None if options.no_overlay else keys
    with tqdm(frames, total=total, unit='frame', dynamic_ncols=True) as bar:
        count = video.write_video(path, bar, world.cfg.fps, keys)
    return path, clip, count
