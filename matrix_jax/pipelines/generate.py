"""From a prompt and controls to frames, for the command line, for Python and for tests.

One compiled program makes each step. Frames are returned while the stream runs: the host copies the
frames of a step while the device makes the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from matrix_jax import recipes, video
from matrix_jax.config import UsageError, check_writable
from matrix_jax.data import start_clips
from matrix_jax.parallel import compilation, sharding
from matrix_jax.pipelines import driven
from matrix_jax.pipelines.stream_runner import StreamRunner
from matrix_jax.weights import diffusers_layout

DEFAULT_LENGTH, LONGEST = 8, 24 * 3600  # seconds


@dataclasses.dataclass
class GeneratedVideo:
    """What is known about a video besides its frames.

    Attributes:
      controls: controls of the video, in order.
      notes: lines for the user (cut prompt, unused controls).
      compile_seconds: time to compile all programs and to encode the start.
      run_seconds: time of all steps so far, copies to the host included.
      stopped_by: number of the signal that ended the video early, or 0.
    """

    controls: list[str]
    notes: list[str]
    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    stopped_by: int = 0


def plan(
    world,
    length: int | None,
    control: str | None,
    control_seed: int,
    pad: str | None,
    iterations: int | None = None,
):
    """Returns the controls of a video, and notes for the user.

    Args:
      world: a `World`.
      length: seconds, at least 1. None = as long as the controls, the last one repeated to the end
        of its step; without controls or with `pad`, 8 seconds, or the longest clip if shorter.
      control: controls as text of the world's vocabulary; None = random controls; 'driver' = as
        many idle controls, which the driver replaces (`pipelines.driven`).
      control_seed: seed of random controls.
      pad: how to continue controls that are too few: None (an error), 'random' or 'hold'.
      iterations: steps of a stream, instead of `length`.

    Raises:
      UsageError, ControlError: the length or the controls cannot be used.
    """
    if control == driven.NAME:
        controls, _ = plan(world, length, None, control_seed, None, iterations)
        return [world.vocabulary.idle] * len(controls), []
    if iterations is not None:
        needed = _controls_of_steps(world, length, iterations)
        return world.vocabulary.read(control, needed, pad=pad, seed=control_seed)
    count = None
    if length is None and control is not None and pad is None:
        count = world.vocabulary.count(control)
    if count:
        if count * world.vocabulary.frames_per_control > LONGEST * world.cfg.fps:
            raise UsageError(
                f'--control: got {count} controls, expected a video of at most {LONGEST} seconds'
            )
        return world.vocabulary.read(control, world.round_up_controls(count), pad='hold')
    if length is None:
        length = min(DEFAULT_LENGTH, world.max_seconds or DEFAULT_LENGTH)
    if not (isinstance(length, int) and 1 <= length <= LONGEST):
        raise UsageError(f'--length: got {length}, expected whole seconds from 1 to {LONGEST}')
    return world.vocabulary.read(
        control, world.controls_for_seconds(length), pad=pad, seed=control_seed
    )


def _controls_of_steps(world, length: int | None, iterations: int) -> int:
    """Returns the controls of a video of this many steps."""
    if length is not None:
        raise UsageError('--iterations and --length: got both, expected one of them')
    if world.cfg.clip:
        raise UsageError('--iterations: this model makes whole clips; --length gives the seconds')
    count = world.first_step_controls + (iterations - 1) * world.cfg.stream.controls_per_step
    if count * world.vocabulary.frames_per_control > LONGEST * world.cfg.fps:
        raise UsageError(
            f'--iterations: got {iterations}, expected a video of at most {LONGEST} seconds'
        )
    return count


def start_clip(world, folder: str, prompt: str, source: str | None, is_image: bool) -> np.ndarray:
    """Returns start frames uint8 [F H W 3], from a file or from the start clips of the weights.

    The start clip is the one whose caption shares most words with the prompt.

    Raises:
      UsageError: the file cannot be read, or there are no start clips.
    """
    cfg, count = world.cfg, world.start_frames
    if source is not None:
        frames = world.fit(
            video.read_image(source)[None] if is_image else video.read_video(source, cfg.fps, count)
        )
        return np.concatenate([frames, np.repeat(frames[-1:], max(count - len(frames), 0), 0)])
    # Weights in training have no start clips; those of the bundled world then serve.
    for place in (folder, diffusers_layout.ASSETS / cfg.name.lower()):
        frames = start_clips.choose(place, prompt, cfg.height, cfg.width)
        if frames is not None:
            break
    else:
        raise UsageError('this world has no start clip: give --video or --image')
    return frames[:count]


def stream_frames(
    runner: StreamRunner, carry, steps: list[list[str]], clip: GeneratedVideo, first=None
) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H W 3] one by one, copying one step while the next is computed.

    Args:
      runner: the stream, compiled.
      carry: where it starts.
      steps: controls of each step.
      clip: receives `run_seconds`.
      first: frames that `runner.compile` has made.
    """
    began, waiting = time.perf_counter(), first
    for given in (*steps, None):
        frames = None
        if given is not None:
            carry, frames = runner.step(carry, given)
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
    iterations: int | None = None,
    seed: int = 42,
    control_seed: int = 42,
    pad: str | None = None,
    image: str | None = None,
    video_path: str | None = None,
    say=lambda line: None,
):
    """Compiles and starts a video.

    Args:
      world, params: from `worlds.open_run`.
      folder: weights folder, for its start clips.
      prompt: text; the default prompt of the world by default.
      control, length, iterations, control_seed, pad: see `plan`; None = random controls.
      seed: seed of all noise; one seed always gives the same video.
      image, video_path: file to start from; a start clip that fits the prompt by default.
      say: called with lines of progress.

    Returns:
      (iterator of frames uint8 [H W 3], `GeneratedVideo`).

    Raises:
      UsageError, ControlError: an argument cannot be used; raised before anything is computed.
    """
    if image and video_path:
        raise UsageError('--image and --video: got both, expected one start')
    if not 0 <= seed < 2**63:
        raise UsageError(f'--seed: got {seed}, expected 0 to 2**63 - 1')
    if prompt is not None and not world.reads_text and (image or video_path):
        raise UsageError('--prompt: this model reads no text, and --image or --video is its start')
    prompt = world.cfg.prompt if prompt is None else prompt
    controls, notes = plan(world, length, control, control_seed, pad, iterations)
    if not world.start_frames and (image or video_path):
        raise UsageError('--image, --video: this model makes clips from the prompt alone')
    frames = None
    if world.start_frames and (image or video_path or not world.start_is_optional):
        frames = start_clip(world, folder, prompt, image or video_path, bool(image))
    if world.cfg.clip:
        say(f'compiling {world.cfg.name}')
        return whole_clip(world, params, prompt, frames, controls, notes, seed)
    known, steps = world.split_controls(controls)
    driver = control == driven.NAME
    if driver:
        known = ['D'] * world.cfg.stream.known_controls
    runner = StreamRunner(world, params, control_binding='early' if driver else 'late')
    if runner.note:
        say(f'note: {runner.note}')
    say(f'{"loaded" if runner.stored else "compiling"} {world.cfg.name}')
    began = time.perf_counter()
    carry, cut = runner.start(prompt, frames, known, seed, steps)
    carry, first = runner.compile(carry, steps)
    seconds = time.perf_counter() - began
    clip = GeneratedVideo(controls, notes + cut_note(world, cut), compile_seconds=seconds)
    if driver:
        return timed(driven.drive(runner, carry, frames, known, clip.controls), clip), clip
    steps = steps if first is None else steps[1:]
    return stream_frames(runner, carry, steps, clip, first), clip


def timed(steps: Iterator[np.ndarray], clip: GeneratedVideo) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H W 3] of steps [F H W 3] one by one; `clip` receives `run_seconds`."""
    began = time.perf_counter()
    for frames in steps:
        clip.run_seconds = time.perf_counter() - began
        yield from frames


def whole_clip(world, params, prompt: str, start, controls: list[str], notes: list[str], seed: int):
    """Makes the clip of a model that does not stream -> (iterator of frames, `GeneratedVideo`)."""
    given, cut = world.inputs(prompt, start, controls)
    notes = notes + cut_note(world, cut)
    given = (params, *given, jax.random.key(seed))
    began = time.perf_counter()
    with sharding.use_mesh(sharding.mesh_of(params)):
        make = compilation.jit(world.sample_clip).lower(*given).compile()
    clip = GeneratedVideo(controls, notes, compile_seconds=time.perf_counter() - began)

    def frames():
        began = time.perf_counter()
        made = np.asarray(make(*given))[0]
        clip.run_seconds = time.perf_counter() - began
        yield from made

    return frames(), clip


def cut_note(world, cut: str) -> list[str]:
    """Returns the note about the end of a prompt that the model does not read."""
    if not cut:
        return []
    return [f'prompt: the model reads {world.cfg.dit.text_length} tokens; cut off: {cut!r}']


def recipe_of_log(args) -> str:
    """Returns the recipe of the session in `--replay`.

    Raises:
      UsageError: the command line names another recipe.
    """
    from matrix_jax.serve.runtime import session_log

    played = session_log.read(args.replay).recipe
    if args.recipe and recipes.load(args.recipe).name != played:
        raise UsageError(
            f'--replay: got the recipe {args.recipe}, expected {played[:60]}, in '
            f'which {args.replay} was played; it may be left out'
        )
    return played


def replayed(run, args):
    """Makes the video of a saved session again -> (iterator of frames, `GeneratedVideo`).

    The frames equal those that the player saw bit for bit, on a device of the same kind.

    Raises:
      UsageError: an option contradicts the session; ReplayError: the session cannot be used.
    """
    from matrix_jax import worlds
    from matrix_jax.serve.runtime import replay, session_log

    log = session_log.read(args.replay)
    given = [
        f'--{name}'
        for name in ('prompt', 'control', 'image', 'video', 'pad')
        if getattr(args, name) is not None
    ]
    if given:
        raise UsageError(f'--replay: got {", ".join(given)} as well, which the session decides')
    began = time.perf_counter()
    stream = replay.compile_stream(*worlds.open_run(run, split_decoder=run.world.clip is None), log)
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
    """Returns parameters and memory per device of the run's mesh; needs no such devices."""
    from matrix_jax import worlds

    return worlds.build(run.world).summary(sharding.abstract_mesh(run.mesh))


def free_path(name: str) -> Path:
    """Returns outputs/NAME.mp4, or outputs/NAME-2.mp4 and so on if there is such a file already."""
    endings = itertools.chain([''], (f'-{number}' for number in itertools.count(2)))
    paths = (Path('outputs', f'{name}{ending}.mp4') for ending in endings)
    return next(path for path in paths if not os.path.lexists(path))


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes Ctrl-C and SIGTERM in the list that it yields; a second signal interrupts.

    Outside of the main thread, which alone gets signals, the list stays empty.
    """
    noted: list[int] = []

    def note(number, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_file(run, args):
    """Checks all arguments, then writes one video -> (path, `GeneratedVideo`, number of frames).

    Ctrl-C and SIGTERM end the video early; the file then has the frames made so far.
    """
    from tqdm import tqdm

    from matrix_jax import worlds

    name = run.name.replace(':', '-').lower()
    path = video.check_path(run.out or free_path(f'{name}-{args.seed}'))
    check_writable('--out', path)
    if args.replay:
        frames, clip = replayed(run, args)
        world = worlds.build(run.world)
    else:
        control = driven.choose_control(
            worlds.build(run.world), 'random' if args.pad and not args.control else args.control
        )
        plan(
            worlds.build(run.world),
            args.length,
            control,
            args.control_seed,
            args.pad,
            args.iterations,
        )
        world, params = worlds.open_run(run, split_decoder=run.world.clip is None)
        frames, clip = generate(
            world,
            params,
            diffusers_layout.resolve(run.weights),
            prompt=args.prompt,
            control=control,
            length=args.length,
            iterations=args.iterations,
            seed=args.seed,
            control_seed=args.control_seed,
            pad=args.pad,
            image=args.image,
            video_path=args.video,
            say=print,
        )
    for note in clip.notes:
        print(f'note: {note}')
    vocabulary = world.vocabulary
    per = vocabulary.frames_per_control
    # The first latent frame of a whole clip is a single frame.
    shown = range(per - 1 if world.cfg.clip else 0, per * len(clip.controls))
    # The driver writes a control just before its frames, so overlays are made on the way.
    overlays = (vocabulary.overlay(clip.controls[index // per]) for index in shown)
    with (
        tqdm(frames, total=len(shown), unit='frame', dynamic_ncols=True) as bar,
        noted_signals() as signals,
    ):
        keys = None if args.no_overlay else overlays
        # A video has a frame at least, so the first one is written in any case.
        made = itertools.takewhile(lambda one: one[0] == 0 or not signals, enumerate(bar))
        count = video.write_video(path, (frame for _, frame in made), world.cfg.fps, keys)
    clip.stopped_by = signals[0] if count < len(shown) and signals else 0
    return path, clip, count
