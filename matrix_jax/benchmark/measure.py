"""Timing: frames per second of the whole and of each part, jitter, and key-to-picture latency."""

from __future__ import annotations

import dataclasses
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from matrix_jax.benchmark import target as targets
from matrix_jax.config import UsageError, at_least
from matrix_jax.parallel import compilation, sharding
from matrix_jax.stream.pipeline import Pipeline
from matrix_jax.stream.swin_window import BINDING_NAMES, CONTROL_BINDINGS

VISIBLE = 1.0  # mean difference, in grey levels of 255, that counts as visible
SETTLE = 2  # steps before a key changes, besides the warm-up of the stream
KIB = 2**10


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
      steps: timed steps of the stream.
      warmup: untimed steps before them.
      entries: control bindings whose latency is measured; None = all that the stream has.
      seed: seed of the stream's noise and of random weights.
      peak_tflops: peak of one device, to report the share reached; None = not reported.
    """

    steps: int = 30
    warmup: int = 3
    entries: tuple[str, ...] | None = None
    seed: int = 0
    peak_tflops: float | None = None

    def __post_init__(self):
        at_least('--steps', self.steps, 1)
        at_least('--warmup', self.warmup, 1)
        at_least('--seed', self.seed, 0)
        unknown = [name for name in self.entries or () if name not in BINDING_NAMES]
        if unknown:
            raise ValueError(
                f'--entries: got {unknown[0]!r}, expected some of '
                f'{", ".join(CONTROL_BINDINGS)}, or none'
            )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float('inf'):
            raise ValueError(f'--peak-tflops: got {self.peak_tflops}, expected more than 0')


def control_bindings(stream, wanted: tuple[str, ...] | None) -> list[str]:
    """Control bindings to measure, as a stream's config names them.

    Raises:
      UsageError: the stream lacks a binding in `wanted`.
    """
    found = []
    for binding in CONTROL_BINDINGS if wanted is None else wanted:
        try:
            found.append(stream.with_control_binding(binding).control_binding)
        except ValueError as error:
            if wanted is not None:
                raise UsageError(f'--entries {binding}: {error}') from error
    return list(dict.fromkeys(found))


class CompiledProgram:
    """A compiled function `(params, carry, ...) -> (carry, output)` to run repeatedly.

    Args:
      target: the target it belongs to.
      function: the function; its carry is donated.
      carry: carry at the start of a run; it is kept.
      given: further arguments of every call.

    Attributes:
      programs: the compiled programs.
      seconds: time to trace and compile.
    """

    def __init__(self, target, function, carry, *given):
        self.params, self.given, self._start = target.params, given, carry
        with target.within():
            step = compilation.jit(function, donate_argnums=1)
            if target.mesh.size > 1:
                # The carry must keep its sharding from step to step.
                self._start = step(self.params, self.start(), *given)[0]
                step = compilation.jit(
                    function,
                    donate_argnums=1,
                    out_shardings=(sharding.tree_shardings(self._start), None),
                )
            began = time.perf_counter()
            self._step = step.lower(self.params, self._start, *given).compile()
            self.seconds = time.perf_counter() - began
        self.programs = (self._step,)

    def start(self):
        """Returns a new carry to begin a run with."""
        return jax.tree.map(jnp.copy, self._start)

    def __call__(self, carry, *given):
        return self._step(self.params, carry, *(given or self.given))


class PipelinedProgram(CompiledProgram):
    """A step as two concurrent programs, network and decoder, each on its own devices
    (`stream.pipeline`)."""

    def __init__(self, target, control_binding: str | None, seed: int):
        self.params, decoder = target.world.split_decoder(target.params)
        self.given = target.controls[:1]
        pipeline = Pipeline(
            **target.world.stages(control_binding),
            params=(self.params, decoder),
            first_control=targets.first_control(target.world),
        )
        self._start = pipeline.init(self.params, target.cond, player(seed))
        began = time.perf_counter()
        pipeline.compile(self.params, self._start, *self.given)
        self.seconds = time.perf_counter() - began
        self._step, self.programs = pipeline.step, pipeline.programs


def player(seed: int):
    """PRNG key [1] of a single player."""
    return jax.random.split(jax.random.key(seed), 1)


def whole(target, control_binding: str | None = None, seed: int = 0) -> CompiledProgram:
    """The whole step, controls to uint8 frames: the network and the decoder."""
    if target.decoder != target.mesh:
        return PipelinedProgram(target, control_binding, seed)
    stream = targets.stream(target.world, control_binding)
    carry = target.run(stream.init, target.params, target.cond, player(seed))
    return CompiledProgram(target, stream.step, carry, target.controls[0])


def network(target, seed: int = 0) -> CompiledProgram:
    """The step without the decoder."""
    target, _ = target.split
    stream = targets.network_stream(target.world)

    def step(params, carry, control):
        carry, made = stream.step(params, carry, control)
        return carry, made[0, -1, 0, 0]  # cheap to copy, and ready only when the step is done

    carry = target.run(stream.init, target.params, target.cond, player(seed))
    return CompiledProgram(target, step, carry, target.controls[0])


def decoder(target) -> CompiledProgram:
    """The decoder alone, uint8 conversion included."""
    _, target = target.split
    world = target.world
    part, stream = world.decoder(), world.cfg.stream
    # Replicated, as the network returns them.
    before, latents = (
        target.run(partial(targets.clip_noise, world, count))
        for count in (stream.context, stream.step_frames)
    )
    cache = target.run(lambda *given: part.prefill(*given)[0], target.params, before)
    return CompiledProgram(target, part.step, cache, latents)


def intervals(program: CompiledProgram, settings: Settings, warmup_steps: int = 0) -> np.ndarray:
    """Seconds between consecutive outputs on the host [steps].

    As in a player, each output is copied to the host while the next step runs.

    Args:
      program: the program to time.
      settings: numbers of steps.
      warmup_steps: steps until the memory of the stream is full, before `settings.warmup`.
    """
    carry, waiting, stamps = program.start(), None, []
    for _ in range(warmup_steps + settings.warmup + settings.steps + 1):
        carry, output = program(carry)
        if waiting is not None:
            np.asarray(waiting)
            stamps.append(time.perf_counter())
        waiting = output
    jax.block_until_ready(carry)
    return np.diff(stamps)[-settings.steps :]


def spread(seconds: np.ndarray) -> dict[str, float]:
    """Median, 95th and 99th percentile, mean and jitter (mean change between steps), in ms."""
    jitter = np.abs(np.diff(seconds)).mean() if len(seconds) > 1 else 0.0
    return {
        name: float(1e3 * value)
        for name, value in (
            ('p50_ms', np.median(seconds)),
            ('p95_ms', np.quantile(seconds, 0.95)),
            ('p99_ms', np.quantile(seconds, 0.99)),
            ('mean_ms', seconds.mean()),
            ('jitter_ms', jitter),
        )
    }


# --- from a key to a frame -------------------------------------------------------------------


def latency(target, program: CompiledProgram) -> dict:
    """Measures how long a key takes to show, from two equal runs and one whose key changes.

    Args:
      target: the target.
      program: `whole` with the control binding in question.

    Returns:
      'noise': largest difference of the equal runs, of 255.
      'changed': the first frame that differs by more than the noise, or None.
      'visible': the first frame whose mean difference is at least one grey level, or None.
      Both are dicts of 'steps' (1 = the step that took the key), 'frame' (index within that step)
      and 'ms' (from passing the key to having that step on the host).
    """
    settle = SETTLE + target.world.warmup_steps
    key, other = target.controls
    after = target.world.cfg.stream.with_control_binding('late').lag + 4
    held, pressed = ([key] * settle + [one] * after for one in (key, other))
    (base, _), (again, _), (other, times) = (_play(program, keys) for keys in (held, held, pressed))
    noise = int(np.abs(base - again).max())
    difference = np.abs(other - base)[settle:]  # [steps B F H W 3]
    axes = (1, 3, 4, 5)
    seen = {'changed': difference.max(axes) > noise, 'visible': difference.mean(axes) >= VISIBLE}
    return {'noise': noise} | {name: _first(found, times[settle:]) for name, found in seen.items()}


def _play(program: CompiledProgram, keys):
    """(frames int16 [steps B F H W 3], [(time of the key, time of its frames)] of each step)."""
    carry, frames, times = program.start(), [], []
    for symbols in keys:
        began = time.perf_counter()
        carry, made = program(carry, symbols)
        frames.append(np.asarray(made).astype(np.int16))
        times.append((began, time.perf_counter()))
    return np.stack(frames), times


def _first(found, times):
    """Where found [steps F] is first true and how long that took; None if nowhere."""
    if not found.any():
        return None
    step, frame = np.unravel_index(np.argmax(found), found.shape)
    began, ended = times[0][0], times[step][1]
    return {'steps': int(step) + 1, 'frame': int(frame), 'ms': 1e3 * (ended - began)}


# --- the machine -----------------------------------------------------------------------------


def peak_memory() -> dict[str, float]:
    """Peak bytes so far: of the process, and of the fullest device if its backend reports that."""
    used = {'process': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max((one.get('peak_bytes_in_use', 0) for one in stats), default=0)
    return used | ({'device': device} if device else {})


def ceilings(dit: str, vae: str, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of a large matrix product and of a large convolution on one device: upper bounds.

    Args:
      dit, vae: dtypes of the network and of the decoder.
      seconds: how long to time each.
    """
    cpu = jax.default_backend() == 'cpu'
    size, calls = (1024, 1) if cpu else (8192, 8)
    a = jax.random.normal(jax.random.key(0), (size, size), dit)
    frames, height, width, channels = (2, 32, 48, 64) if cpu else (4, 240, 360, 256)
    x = jax.random.normal(jax.random.key(1), (1, frames, height, width, channels), vae)
    kernel = jax.random.normal(jax.random.key(2), (3, 3, 3, channels, channels), vae)

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
        )

    return {
        'matmul': 2 * size**3 / fastest(jnp.matmul, (a, a), calls, seconds),
        'conv': 2 * x.size * 27 * channels / fastest(conv, (x, kernel), calls, seconds),
    }


def fastest(function, given, calls: int, seconds: float) -> float:
    """Shortest time of a call in seconds, timed in batches of `calls`."""
    call = compilation.jit(function).lower(*given).compile()
    jax.block_until_ready(call(*given))
    best, until = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        jax.block_until_ready([call(*given) for _ in range(calls)])
        best = min(best, (time.perf_counter() - began) / calls)
    return best
