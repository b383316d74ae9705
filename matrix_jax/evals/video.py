"""Streams of a world for evaluation, reconstructions, and measures of any video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import driving as vocabulary
from matrix_jax.parallel import compilation
from matrix_jax.stream import swin

CHUNK = 8  # frames per encoder chunk


def check_clips(world: Any, clips: Sequence[Any], data: str) -> None:
    """Checks that recorded clips have the frames that a world makes.

    Args:
      world: the world.
      clips: the clips; the first one is checked.
      data: their folder, for the message.

    Raises:
      UsageError: frames have another size or rate.
    """
    ours, (_, height, width, _), fps = world.cfg, clips[0].frames.shape, clips[0].fps
    if (height, width, fps) != (ours.height, ours.width, ours.fps):
        raise UsageError(
            f'--data: {data}: got clips of {height}x{width} at {fps} fps, expected '
            f'{ours.height}x{ours.width} at {ours.fps} as this world makes them'
        )


class Streams:
    """Batches of streams of one world; each batch size compiles once.

    Args:
      world, params: from `worlds.open_run`.
      control_binding: where keys bind, 'late' or 'early'; None = as in the recipe.
    """

    def __init__(self, world, params, control_binding: str | None = None):
        self.world, self.params = world, params
        self.cfg = (
            world.cfg.stream.with_control_binding(control_binding)
            if control_binding
            else world.cfg.stream
        )
        stream = world.stream(control_binding)
        self._condition = compilation.jit(world.condition, fast_compile=True)
        self._init = compilation.jit(stream.init, fast_compile=True)
        self._step = compilation.jit(stream.step, donate_argnums=1)
        self._first = self._step
        if stream.prefill is not stream.step:
            self._first = compilation.jit(stream.prefill, donate_argnums=1)

    @property
    def lag(self) -> int:
        """Latent frames between a new key and the first frame that it was bound to."""
        return self.cfg.binding_slot - self.cfg.context

    def start(self, prompts: Sequence[str], frames, symbols, seed: int):
        """Carry of B streams.

        Args:
          prompts: B texts.
          frames: start clips uint8 [B F H W 3] that fill the window.
          symbols: int [B R], controls of all window slots but the newest group.
          seed: seed of all noise.
        """
        return self.enter(
            (self.world.tokenize(prompts), frames, np.asarray(symbols, np.int32)), seed
        )

    def enter(self, given: tuple, seed: int):
        """Carry of B streams from the batched inputs of the world's `condition`."""
        keys = jax.random.split(jax.random.key(seed), len(given[0]))
        return self._init(self.params, self._condition(self.params, *given), keys)

    def follow(
        self,
        frames,
        texts: Sequence[Sequence[str]],
        seed: int,
        progress: Callable = lambda steps: steps,
        prompts: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Frames uint8 [B F H W 3] of whole videos; arguments as for `play`."""
        return np.concatenate(list(self.play(frames, texts, seed, progress, prompts)), axis=1)

    def play(
        self,
        frames,
        texts: Sequence[Sequence[str]],
        seed: int,
        progress: Callable = lambda steps: steps,
        prompts: Sequence[str] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields frames uint8 [B f H W 3] of each step, under known controls of any vocabulary.

        Args:
          frames: start clips [B F' H W 3] of the world's size and length.
          texts: controls of each video, as many as the world needs for its length.
          seed: seed of all noise.
          progress: wraps the range of steps, such as `tqdm`.
          prompts: prompt of each video; the world's by default.
        """
        known, steps = zip(*map(self.world.split_controls, texts), strict=True)
        prompts = prompts or [self.world.cfg.prompt] * len(texts)
        given = [
            self.world.inputs(prompt, clip, one)[0]
            for prompt, clip, one in zip(prompts, frames, known, strict=True)
        ]
        carry = self.enter(tuple(map(np.concatenate, zip(*given, strict=True))), seed)
        encode = self.world.vocabulary.encode
        for index in progress(range(len(steps[0]))):
            step = self._step if index else self._first
            carry, made = step(self.params, carry, np.stack([encode(one[index]) for one in steps]))
            yield np.asarray(made)

    def run(self, carry, keys: Callable, shifts: int, progress: Callable = lambda steps: steps):
        """Frames uint8 [B F H W 3] of `shifts` shifts with controls chosen on the way.

        Args:
          keys: `(shift, frames of the shift before [B f H W 3] or None) -> int [B group_frames]`.
          progress: wraps the range of shifts, such as `tqdm`.
        """
        shown, newest = [], None
        for index in progress(range(shifts)):
            symbols = jnp.asarray(keys(index, newest), jnp.int32)
            carry, frames = self._step(self.params, carry, symbols)
            newest = np.asarray(frames)
            shown.append(newest)
        return np.concatenate(shown, axis=1)

    def pace(self, carry, first, control, steps: int) -> dict[str, float]:
        """Frames per second and milliseconds per step: the median of `steps` steps.

        Args:
          first: control of the first step, which may take another number of them.
          control: control of the other steps.
        """
        took = [time.perf_counter()]
        for index in range(5 + steps):
            step, given = (self._step, control) if index else (self._first, first)
            carry, frames = step(self.params, carry, given)
            np.asarray(frames)
            took.append(time.perf_counter())
        median = float(np.median(np.diff(took)[5:]))
        return {'fps': frames.shape[1] / median, 'shift_ms': 1000 * median}

    def script(
        self,
        prompts,
        frames,
        symbols,
        shifts: int,
        seed: int,
        progress: Callable = lambda steps: steps,
    ):
        """Frames uint8 [B F H W 3] of `shifts` shifts under controls known in advance.

        Args:
          prompts, frames, seed: as for `start`.
          symbols: int [B N], one per latent frame from the start of the window; the frames shown
            are those from index `context` on.
        """
        symbols = np.asarray(symbols, np.int32)
        short = swin.needed_controls(self.cfg, shifts) - symbols.shape[1]
        symbols = np.pad(symbols, ((0, 0), (0, max(short, 0))), mode='edge')
        first, steps = swin.split_controls(self.cfg, symbols, shifts)
        carry = self.start(prompts, frames, first, seed)
        return self.run(carry, lambda index, _: steps[index], shifts, progress)


def bar(name: str) -> Callable:
    """Wrapper of a range of steps in a progress bar that disappears at the end."""
    from tqdm import tqdm

    return partial(tqdm, desc=name, leave=False, dynamic_ncols=True)


def spread(clips, count: int) -> list[int]:
    """At most `count` indices of clips, evenly spaced from the first to the last."""
    return np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int).tolist()


def rebuild(world, params, clips, count: int, frames: int, context: int, group: int):
    """(reconstructed, original) frames uint8 [N F' H W 3] of evenly spaced clips.

    Args:
      clips: a sequence of recorded clips.
      count: largest number of clips.
      frames: frames of each clip.
      context, group: see `reconstruct`.
    """
    original = np.stack([clips[index].frames[:frames] for index in spread(clips, count)])
    made = reconstruct(world, params, original, context, group)
    return made, original[:, -made.shape[1] :]


def indices(keys: Sequence[str]) -> np.ndarray:
    """Control symbols -> int [N]."""
    return np.array([vocabulary.SYMBOLS.index(key) for key in keys])


def reconstruct(world, params, frames, context: int, group: int) -> np.ndarray:
    """Clips after the encoder and the streaming decoder.

    Args:
      frames: uint8 [B F H W 3], F = 1 + 8k.
      context: latent frames that the decoder starts with, which it does not return.
      group: latent frames decoded at once.

    Returns:
      uint8 [B F' H W 3], the last F' = 4 (T - context) frames.
    """
    decoder = world.decoder()
    encode, step = compilation.jit(world.encode_step), compilation.jit(decoder.step)
    # Chunks are called one by one: XLA's CPU convolutions are many times slower inside a loop.
    cache, latents = encode(params, None, frames[:, : 1 + CHUNK])
    made = [latents]
    for start in range(1 + CHUNK, frames.shape[1], CHUNK):
        cache, latents = encode(params, cache, frames[:, start : start + CHUNK])
        made.append(latents)
    latents = jnp.concatenate(made, axis=1)
    cache, _ = compilation.jit(decoder.prefill)(params, latents[:, :context])
    shown = []
    for start in range(context, latents.shape[1], group):
        cache, part = step(params, cache, latents[:, start : start + group])
        shown.append(np.asarray(part))
    return np.concatenate(shown, axis=1)


def psnr(pairs) -> float:
    """Peak signal-to-noise ratio in dB of pairs of uint8 frames, from their pooled error."""
    errors = [np.square(np.subtract(a, b, dtype=np.float32)) for a, b in pairs]
    total = sum(error.sum(dtype=np.float64) for error in errors)
    mean = total / sum(error.size for error in errors)
    return float(10 * np.log10(255**2 / mean)) if mean else float('inf')


def sheet(
    rows: Sequence[np.ndarray],
    times: Sequence[float],
    fps: int,
    keys: Sequence[Sequence] | None = None,
    width: int = 192,
) -> np.ndarray:
    """Contact sheet uint8 [H W 3]: a row per video, a column per time.

    Args:
      rows: videos uint8 [F H W 3].
      times: seconds from the first frame; times past the end show the last frame.
      fps: frames per second.
      keys: keys to draw, per frame of each video (`video.draw_keys`); None = draw none.
      width: width of each picture in pixels.
    """
    pictures = []
    for row, frames in enumerate(rows):
        for at in times:
            index = min(round(at * fps), len(frames) - 1)
            picture = video.enlarge(frames[index], width)
            pictures.append(video.draw_keys(picture, keys[row][index]) if keys else picture)
    return video.contact_sheet(pictures, len(times))


def by_second(values, fps: int) -> np.ndarray:
    """Means of whole seconds [... S] of values per frame [... F]."""
    values = np.asarray(values, np.float64)
    count = values.shape[-1] // fps
    return values[..., : count * fps].reshape(*values.shape[:-1], count, fps).mean(axis=-1)
