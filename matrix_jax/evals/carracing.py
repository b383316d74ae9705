"""The judge of worlds that are driven by the nine controls: obedience and the closed loop.

The ceiling is the real game, CarRacing, under the same keys from the same place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls.driving import FRAMES_PER_CONTROL, SYMBOLS
from matrix_jax.data.carracing import THEMES
from matrix_jax.data.loader import Clips
from matrix_jax.evals import control, driver
from matrix_jax.evals import drift as drifts
from matrix_jax.evals import scripted as scripts
from matrix_jax.evals.scripted import ScriptedDrives
from matrix_jax.evals.video import Streams, bar, by_second, indices, sheet, spread

NAME = 'driving'


@dataclasses.dataclass(frozen=True)
class Config:
    """How much is evaluated.

    Attributes:
      seconds: length of streams under scripted keys.
      drive_seconds: length of driven streams.
      long_seconds: length of one more driven stream; 0 = none.
      streams: streams per script, and driven ones; themes in turn, every other one mirrored.
      clips, clip_frames: held-out clips for the reconstruction, and frames of each, 1 + 8k.
      windows: most windows of real clips that the probe is tested on.
      settle: latent frames at the start that are not judged: the window knows the real ones.
      times: seconds that the contact sheets show.
      cruise: speed of the driver.
      seed: of starts, scripts and noise.
      probe: the inverse-dynamics probe.
    """

    seconds: int = 30
    drive_seconds: int = 60
    long_seconds: int = 0
    streams: int = 6
    clips: int = 15
    clip_frames: int = 97
    windows: int = 3000
    settle: int = 4
    times: tuple[float, ...] = (1.0, 4.0, 15.0, 30.0)
    cruise: float = 18.0
    seed: int = 0
    probe: control.Config = control.Config()


def quick(cfg: Config) -> Config:
    """A look in a few minutes; the numbers are rough."""
    return dataclasses.replace(
        cfg, seconds=8, drive_seconds=15, streams=2, clips=3, times=(1.0, 4.0, 8.0)
    )


def recorded(world, data: str, cfg: Config) -> Clips:
    """Held-out clips; those of other origin, which say nothing about the car, are left aside.

    Raises:
      UsageError: a world that cannot be judged.
    """
    stream = world.cfg.stream
    if stream.group_frames != 1:
        raise UsageError(
            f'stream.group_frames: got {stream.group_frames}, expected 1: the driver '
            'presses a key per latent frame'
        )
    return Clips(data, 'heldout', cfg.clip_frames, THEMES, cache=False)


def shape(world) -> tuple[int, int]:
    """Latent frames that a stream shows nothing of, and those of each step."""
    return world.cfg.stream.context, world.cfg.stream.group_frames


def sections(world, params, data: str, held_out: Clips, rebuilt, cfg: Config, out: Path):
    """Yields (name, results) of each section of the report, and draws its pictures.

    Args:
      data: folder of recorded clips; its train split trains the probe.
      held_out: from `recorded`.
      rebuilt: frames of some of them behind the autoencoder, from `video.rebuild`.
    """
    context = world.cfg.stream.context
    probe, real = probes(cfg, data, held_out, list(rebuilt), context, out)
    yield 'probe', real
    game = driver.carracing.new_game()
    starts = driver.starts(game, cfg.streams, 8 + world.cfg.stream.frames, cfg.seed)
    yield 'speed', speed(world, params, game, starts[0], cfg)
    scripted = scripts.run(world, params, game, starts, cfg.seconds, cfg.seed, bar)
    yield 'obedience', obedience(cfg, probe, scripted, context)
    yield 'drift', drift(scripted, starts, world.cfg.fps)
    yield 'fidelity', fidelity(cfg, probe, scripted, held_out, context)
    draw_scripts(scripted, cfg, world.cfg.fps, out)
    loop, drives = closed_loop(world, params, game, starts, cfg)
    yield 'closed_loop', loop
    measures = [driver.measures(start.theme) for start in starts]
    yield (
        'drive_drift',
        {
            name: drifts.seconds(
                [frames for frames, _ in drives[name]],
                [frames for frames, _ in drives['game']],
                measures,
                world.cfg.fps,
            )
            for name in ('world', 'game')
        },
    )
    draw_drives(drives, cfg, world.cfg.fps, out)
    if cfg.long_seconds:
        yield 'long', long_drive(world, params, game, starts[:1], cfg, out)


# --- the probe -------------------------------------------------------------------------------


def probes(cfg: Config, data: str, held_out: Clips, rebuilt, context: int, out: Path):
    """((params, threshold), scores on real frames); a trained probe is kept in `out`."""
    path, found = out / 'probe.msgpack', control.load(out / 'probe.msgpack', cfg.probe)
    if found is None:
        recorded = Clips(data, 'train', themes=THEMES, cache=False)
        train = control.examples(cfg.probe, map(_example, _each(recorded)))
        params = control.train(cfg.probe, train, bar('probe'))
        some = control.sample(train, cfg.windows)
        limit = control.threshold(
            control.read(cfg.probe, params, some)[:, 0], control.STEER[some.controls]
        )
        control.save(path, cfg.probe, params, limit)
        found = params, limit
    params, limit = found
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


def _each(clips: Clips):
    return (clips[index] for index in range(len(clips)))


def _example(clip):
    return clip.frames, clip.controls, clip.telemetry


def _rebuilt_examples(clips, rebuilt, context: int, cfg: Config):
    first = FRAMES_PER_CONTROL * (context - 1) + 1
    for index, frames in zip(spread(clips, len(rebuilt)), rebuilt, strict=True):
        clip = clips[index]
        yield (
            np.concatenate([clip.frames[:first], frames]),
            clip.controls[: cfg.clip_frames],
            clip.telemetry[: cfg.clip_frames],
        )


# --- scripted keys ---------------------------------------------------------------------------


def obedience(cfg: Config, probe, scripted: dict[str, ScriptedDrives], context: int) -> dict:
    """Scores of each script and of all together, in the world and in the game."""
    params, limit = probe
    result, pooled = {}, {'generated': [], 'real': [], 'controls': [], 'truth': []}
    for name, one in scripted.items():
        seen = {}
        for kind, frames in (('generated', one.made), ('real', one.real)):
            clips = list(zip(frames, map(indices, one.keys), one.telemetry, strict=True))
            data = control.examples(cfg.probe, clips, context + cfg.settle)
            seen[kind] = control.read(cfg.probe, params, data)
        result[name] = _obeyed(seen['generated'], seen['real'], data.controls, limit)
        for key, value in (*seen.items(), ('controls', data.controls), ('truth', data.truth)):
            pooled[key].append(value)
    made, real, keys, _ = map(np.concatenate, pooled.values())
    return {'all': _obeyed(made, real, keys, limit), **result}


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
    """Per script, for the world and the game: `drift.seconds` of what comes after the context."""
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
    """RFD, the Frechet distance on the probe's own features, and seams; each with its ceiling.

    The ceiling of the RFD is that of held-out clips to the game under the same keys.
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
    """Frames per second of one stream on this machine, after compilation, decoder included."""
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


# --- the closed loop -------------------------------------------------------------------------


def closed_loop(world, params, game, starts, cfg: Config):
    """(scores, videos): the frame-only driver and a held `D`, in the game and in the world."""
    stream, fps = world.cfg.stream, world.cfg.fps
    streams, holds = Streams(world, params, 'head'), cfg.drive_seconds * fps // FRAMES_PER_CONTROL
    plain = driver.Config(cruise=cfg.cruise)
    lagged = dataclasses.replace(plain, lag=streams.lag)
    drives, truth, seen = {}, [], []
    # The world is entered where its window's newest clean frame is: the same place in the game.
    ahead = stream.frames - stream.context
    for name, way, key in (
        ('game', plain, None),
        ('game, late keys', lagged, None),
        ('game, D held', plain, 'D'),
    ):
        drives[name] = []
        for start in starts:
            place = dataclasses.replace(start, keys=start.keys[: len(start.keys) - ahead + way.lag])
            frames, telemetry, keys = driver.drive_game(game, place, way, holds, key)
            drives[name].append((frames, keys))
            truth.append(telemetry[:, 0] >= 0.5)
            seen.append(driver.on_road(frames, start.theme))
    begun = [driver.begin(game, start, stream.frames) for start in starts]
    for name, key in (('world', None), ('world, D held', 'D')):
        drives[name] = drive_world(streams, starts, begun, lagged, holds, key, cfg.seed)
    scores = {
        name: _mean(
            [
                driver.judge(frames, start.theme)
                for (frames, _), start in zip(videos, starts, strict=True)
            ]
        )
        for name, videos in drives.items()
    }
    scores['judge_agrees'] = float(np.mean(np.concatenate(truth) == np.concatenate(seen)))
    scores['seconds'] = cfg.drive_seconds
    return scores, drives


def drive_world(
    streams: Streams, starts, begun, cfg: driver.Config, holds: int, key: str | None, seed: int
):
    """Drives the world from starts -> per stream (frames uint8 [F H W 3], keys).

    Args:
      begun: what `driver.begin` gives for each start, of as many latent frames as the window.
      key: hold this key in place of driving.
    """
    context, lag, per = streams.cfg.context, cfg.lag, FRAMES_PER_CONTROL
    clips = np.stack([frames for frames, _, _ in begun])
    symbols = [keys for _, keys, _ in begun]
    last = per * (context - 1)
    drivers = [
        driver.FrameDriver(cfg, start.theme, keys[context : context + lag], states[last, 2])
        for start, keys, (_, _, states) in zip(starts, symbols, begun, strict=True)
    ]
    pressed = [keys[context : context + lag] for keys in symbols]

    def choose(_, newest):
        views = clips[:, last] if newest is None else newest[:, -1]
        for one, keys, view in zip(drivers, pressed, views, strict=True):
            keys.append(key or one.key(view))
        return np.stack([indices(keys[-1:]) for keys in pressed])

    prompts = [driver.THEMES[start.theme].captions[0] for start in starts]
    first = np.stack([indices(keys[: streams.cfg.known_controls]) for keys in symbols])
    shown = streams.run(streams.start(prompts, clips, first, seed), choose, holds, bar('drive'))
    return [(frames, keys[:holds]) for frames, keys in zip(shown, pressed, strict=True)]


def long_drive(world, params, game, starts, cfg: Config, out: Path) -> dict:
    """One stream that is driven from its frames for long: what each minute shows."""
    fps, stream = world.cfg.fps, world.cfg.stream
    streams = Streams(world, params, 'head')
    lagged = driver.Config(cruise=cfg.cruise, lag=streams.lag)
    holds = cfg.long_seconds * fps // FRAMES_PER_CONTROL
    begun = [driver.begin(game, start, stream.frames) for start in starts]
    ((frames, _),) = drive_world(streams, starts, begun, lagged, holds, None, cfg.seed)
    found = drifts.seconds([frames], [begun[0][0]], [driver.measures(starts[0].theme)], fps)
    found['on_road'] = by_second(driver.on_road(frames, starts[0].theme), fps).tolist()
    times = np.linspace(2, cfg.long_seconds, 16)
    video.write_image(out / 'long.png', sheet([frames], times, fps, width=160))
    return {
        'seconds': cfg.long_seconds,
        **{
            name: [
                round(float(np.mean(values[at : at + 60])), 3)
                for at in range(0, cfg.long_seconds, 60)
            ]
            for name, values in found.items()
        },
    }


def _mean(scores: list[dict]) -> dict:
    mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return mean | {'each': [round(score['seconds_on_road'], 1) for score in scores]}


# --- pictures --------------------------------------------------------------------------------


def draw_scripts(scripted: dict[str, ScriptedDrives], cfg: Config, fps: int, out: Path):
    """One contact sheet per start: a row per script, a column per time; and those of the game."""
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


def draw_drives(drives, cfg: Config, fps: int, out: Path):
    """A contact sheet of all driven streams, and the first as a video."""
    times = np.linspace(2, cfg.drive_seconds, 8)
    rows = [frames for frames, _ in drives['world']]
    drawn = [np.repeat(keys, FRAMES_PER_CONTROL).tolist() for _, keys in drives['world']]
    video.write_image(out / 'drive.png', sheet(rows, times, fps, drawn, width=160))
    video.write_video(out / 'drive.mp4', rows[0], fps, drawn[0])
