"""Evaluation of worlds driven by the nine controls: obedience, drift, fidelity and the closed loop.

The ceiling is the real game, CarRacing, under the same keys from the same place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls.driving import FRAMES_PER_CONTROL, SYMBOLS, decode
from matrix_jax.data.carracing import THEMES
from matrix_jax.data.loader import Clips
from matrix_jax.evals import closed_loop, control, driver
from matrix_jax.evals import drift as drifts
from matrix_jax.evals import scripted as scripts
from matrix_jax.evals.scripted import ScriptedDrives
from matrix_jax.evals.settings import EvaluationSettings
from matrix_jax.evals.video import Streams, bar, check_clips, indices, sheet, spread
from matrix_jax.rewards import model
from matrix_jax.train import reward as training

NAME = 'driving'


@dataclasses.dataclass(frozen=True)
class Config(EvaluationSettings):
    """Settings of the evaluation; every other stream is mirrored, and themes take turns.

    Attributes:
      settle: latent frames at the start that are not judged, as the start clip shows them.
      cruise: speed of the driver in units/s.
      reward: the reward of agents, a bundled name or a folder.
    """

    probe: control.Config = control.Config()
    settle: int = 4
    cruise: float = 18.0
    reward: str = 'carracing_reward'


def recorded(world, data: str, cfg: Config) -> Clips:
    """Held-out clips of the game.

    Raises:
      UsageError: the world cannot be driven, or the clips have another size or rate.
    """
    stream = world.cfg.stream
    if stream.group_frames != 1:
        raise UsageError(
            f'stream.group_frames: got {stream.group_frames}, expected 1: the driver '
            'presses a key per latent frame'
        )
    clips = Clips(data, 'heldout', cfg.clip_frames, THEMES, cache=False)
    check_clips(world, clips, data)
    return clips


def shape(world) -> tuple[int, int]:
    """(latent frames of the condition, latent frames of a step)."""
    return world.cfg.stream.context, world.cfg.stream.group_frames


def recorded_controls(world, clip, count: int) -> list[str]:
    """The first `count` symbols of a recorded clip after the context of a stream.

    Raises:
      UsageError: the clip has no symbols, or too few.
    """
    context = world.cfg.stream.context
    found = decode(clip.controls[::FRAMES_PER_CONTROL])[context : context + count]
    if len(found) < count or not clip.labelled:
        raise UsageError(f'--data: got {len(found)} symbols in a clip, expected {count}')
    return found


def sections(world, params, data: str, held_out: Clips, rebuilt, cfg: Config, out: Path):
    """Yields (name, results) of each section of the report, and writes its pictures to `out`.

    Args:
      data: folder of recorded clips; the probe trains on its train split.
      held_out: from `recorded`.
      rebuilt: some of them after the autoencoder, from `video.rebuild`.
    """
    context = world.cfg.stream.context
    probe, real = probes(cfg, data, held_out, list(rebuilt), context, out)
    yield 'probe', real
    yield 'reward', rewards(cfg, list(_each(held_out)), rebuilt, context)
    game = driver.carracing.new_game()
    starts = driver.starts(game, cfg.streams, 8 + world.cfg.stream.frames, cfg.seed)
    yield 'speed', speed(world, params, game, starts[0], cfg)
    scripted = scripts.run(world, params, game, starts, cfg.seconds, cfg.seed, bar)
    yield 'obedience', obedience(cfg, probe, scripted, context + cfg.settle)
    live = scripts.run_played(world, params, game, starts, cfg.seconds, cfg.seed, bar)
    yield 'played', played(cfg, probe, live, context, world.cfg)
    yield 'drift', drift(scripted, starts, world.cfg.fps)
    yield 'fidelity', fidelity(cfg, probe, scripted, held_out, context)
    draw_scripts(scripted, cfg, world.cfg.fps, out)
    yield from closed_loop.sections(world, params, game, starts, cfg, out)


# --- the probe -------------------------------------------------------------------------------


def probes(cfg: Config, data: str, held_out: Clips, rebuilt, context: int, out: Path):
    """((params, threshold), scores on real frames); reads or writes the probe in `out`."""

    def train():
        recorded = Clips(data, 'train', themes=THEMES, cache=False)
        examples = control.examples(cfg.probe, map(_example, _each(recorded)))
        params = control.train(cfg.probe, examples, bar('probe'))
        some = control.sample(examples, cfg.windows)
        turn = control.read(cfg.probe, params, some)[:, 0]
        return params, control.threshold(turn, control.STEER[some.controls])

    found = params, limit = control.trained(out / 'probe.msgpack', cfg.probe, train)
    clips = list(_each(held_out))
    scores = {}
    for name, given in (
        ('real', [_example(clip) for clip in clips]),
        ('reconstructed', _rebuilt_examples(clips, rebuilt, context, cfg)),
    ):
        test = control.sample(control.examples(cfg.probe, given), cfg.windows)
        seen = control.read(cfg.probe, params, test)
        error = seen - test.truth
        fit = float(np.sum(seen[:, 0] * test.truth[:, 0]) / np.sum(test.truth[:, 0] ** 2))
        side = control.STEER[test.controls]
        scores[name] = {
            **control.score(seen[:, 0], side, limit),
            'yaw_slope': fit,
            'yaw_error': float(np.abs(error[:, 0]).mean()),
            'speed_error': float(np.abs(error[:, 1]).mean()),
        }
    return found, {'threshold': limit, **scores}


def rewards(cfg: Config, clips, rebuilt, context: int) -> dict:
    """Scores of the reward of agents on held-out clips, and on those after the autoencoder."""
    reward = model.load(cfg.reward)
    through = zip(spread(clips, len(rebuilt)), rebuilt, strict=True)
    given = {
        'real': [(clip, clip.frames) for clip in clips],
        'reconstructed': [
            (clips[index], _after_context(clips[index], frames, context))
            for index, frames in through
        ],
    }
    return {name: training.scores(reward, pairs) for name, pairs in given.items()}


def _each(clips: Clips):
    return (clips[index] for index in range(len(clips)))


def _example(clip):
    return clip.frames, clip.controls, clip.telemetry


def _rebuilt_examples(clips, rebuilt, context: int, cfg: Config):
    for index, frames in zip(spread(clips, len(rebuilt)), rebuilt, strict=True):
        clip = clips[index]
        yield (
            _after_context(clip, frames, context),
            clip.controls[: cfg.clip_frames],
            clip.telemetry[: cfg.clip_frames],
        )


def _after_context(clip, frames, context: int) -> np.ndarray:
    """The true frames of the context of a clip, and those that an autoencoder made after it."""
    first = FRAMES_PER_CONTROL * (context - 1) + 1
    return np.concatenate([clip.frames[:first], frames])


# --- scripted keys ---------------------------------------------------------------------------


def obedience(cfg: Config, probe, scripted: dict[str, ScriptedDrives], skip: int) -> dict:
    """Scores of each script and of all together, in the world and in the game.

    Args:
      skip: latent frames at the start that are not judged.
    """
    params, limit = probe
    result, pooled = {}, {'generated': [], 'real': [], 'controls': [], 'truth': []}
    for name, one in scripted.items():
        seen = {}
        for kind, frames in (('generated', one.made), ('real', one.real)):
            clips = list(zip(frames, map(indices, one.keys), one.telemetry, strict=True))
            data = control.examples(cfg.probe, clips, skip)
            seen[kind] = control.read(cfg.probe, params, data)
        result[name] = _obeyed(seen['generated'], seen['real'], data.controls, limit)
        for key, value in (*seen.items(), ('controls', data.controls), ('truth', data.truth)):
            pooled[key].append(value)
    made, real, keys, _ = map(np.concatenate, pooled.values())
    return {'all': _obeyed(made, real, keys, limit), **result}


def played(cfg: Config, probe, live: dict[str, ScriptedDrives], context: int, world) -> dict:
    """`obedience` of scripts as played, judged from the moment of each key, and `delay_seconds`:
    the delay at which the steering seen fits the keys best.

    Args:
      live: from `scripted.run_played`.
      context: latent frames before the first key.
      world: the world's config.
    """
    seconds = FRAMES_PER_CONTROL / world.fps
    return {
        **obedience(cfg, probe, live, context),
        'delay_seconds': {
            kind: seconds
            * delay(cfg, probe, frames, live['mixed'].keys, context, world.stream.frames)
            for kind, frames in (('generated', live['mixed'].made), ('real', live['mixed'].real))
        },
    }


def delay(cfg: Config, probe, frames, keys: list[list[str]], skip: int, most: int) -> int:
    """Latent frames by which the steering seen in streams lags behind their keys, at most `most`.

    Args:
      frames: uint8 [B F H W 3].
      keys: per stream, one symbol per latent frame.
      skip: latent frames at the start that are not judged.
    """
    params, limit = probe
    clips = [(one, indices(held), None) for one, held in zip(frames, keys, strict=True)]
    data = control.examples(cfg.probe, clips, skip)
    seen = control.steers(control.read(cfg.probe, params, data)[:, 0], limit)
    count = len(seen) // len(keys)

    def agreement(late: int) -> float:
        shifted = [[held[0]] * late + held[: len(held) - late] for held in keys]
        sides = [control.STEER[indices(held)][-count:] for held in shifted]
        return control.balanced(seen, np.concatenate(sides))

    return max(range(most + 1), key=agreement)


def _obeyed(made, real, controls, limit) -> dict:
    pedals = np.array([SYMBOLS[index][0] for index in controls])
    speeds = {
        pedal: [float(seen[pedals == pedal, 1].mean()) for seen in (made, real)]
        for pedal in np.unique(pedals)
    }
    side = control.STEER[controls]
    return {
        'generated': control.score(made[:, 0], side, limit),
        'real': control.score(real[:, 0], side, limit),
        **control.gain(made[:, 0], real[:, 0], side),
        'speed': speeds,
    }


def drift(scripted: dict[str, ScriptedDrives], starts, fps: int) -> dict:
    """`drift.seconds` after the context, per script, of the world and of the game."""
    measures = [driver.measures(start.theme) for start in starts]
    result = {}
    for name, one in scripted.items():
        made, real = one.made[:, one.context :], one.real[:, one.context :]
        result[name] = {
            'generated': drifts.seconds(made, real, measures, fps),
            'real': drifts.seconds(real, real, measures, fps),
        }
    return result


def fidelity(
    cfg: Config, probe, scripted: dict[str, ScriptedDrives], held_out: Clips, context: int
) -> dict:
    """Frechet distance on the features of the probe (RFD), and seams, each with its ceiling.

    The ceiling of the RFD is the distance of held-out clips from the game under the same keys.
    """
    params, _ = probe

    def features(clips, skip):
        data = control.examples(cfg.probe, clips, skip)
        return control.features(cfg.probe, params, control.sample(data, cfg.windows, cfg.seed))

    found = {}
    for kind in ('made', 'real'):
        found[kind] = features(
            [
                (frames, indices(keys), None)
                for one in scripted.values()
                for frames, keys in zip(getattr(one, kind), one.keys, strict=True)
            ],
            context + cfg.settle,
        )
    clips = features(map(_example, _each(held_out)), 0)
    shift = FRAMES_PER_CONTROL
    return {
        'rfd': drifts.frechet(found['made'], found['real']),
        'rfd_real': drifts.frechet(clips, found['real']),
        **{
            name: drifts.seams(
                getattr(scripted['mixed'], kind)[:, scripted['mixed'].context :], shift
            )
            for name, kind in (('seams', 'made'), ('seams_real', 'real'))
        },
    }


def speed(world, params, game, start, cfg: Config, shifts: int = 40) -> dict:
    """Frames per second of one stream on this machine, decoder included, without compilation."""
    streams = Streams(world, params, 'head')
    frames, keys, _ = driver.begin(game, start, world.cfg.stream.frames)
    carry = streams.start(
        [driver.THEMES[start.theme].captions[0]],
        frames[None],
        indices(keys[: streams.cfg.known_controls])[None],
        cfg.seed,
    )
    straight = np.full((1, 1), SYMBOLS.index('D'), np.int32)
    found = streams.pace(carry, straight, straight, shifts)
    return {
        'fps': found['fps'],
        'calls_per_shift': world.cfg.stream.steps // world.cfg.stream.groups,
        'shift_ms': found['shift_ms'],
    }


def draw_scripts(scripted: dict[str, ScriptedDrives], cfg: Config, fps: int, out: Path):
    """Per start, a contact sheet of the world and one of the game: a row per script."""
    per = FRAMES_PER_CONTROL
    keys = {
        name: [np.repeat(keys, per)[per - 1 :] for keys in one.keys]
        for name, one in scripted.items()
    }
    for index in range(len(scripted['left'].made)):
        rows = [one.made[index, one.context :] for one in scripted.values()]
        drawn = [list(keys[name][index][one.context :]) for name, one in scripted.items()]
        video.write_image(out / f'scripts-{index}.png', sheet(rows, cfg.times, fps, drawn))
        rows = [one.real[index, one.context :] for one in scripted.values()]
        video.write_image(out / f'scripts-{index}-real.png', sheet(rows, cfg.times, fps, drawn))
