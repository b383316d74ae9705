"""What a world is worth: obedience, the closed loop, reconstruction, drift, speed and pictures.

Each section gives plain numbers next to a ceiling (the real game under the same keys) and a floor.
`results.json` is written after each section, `report.md` and the sheets at the end.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.controls import FRAMES_PER_CONTROL, SYMBOLS
from matrix_jax.data.carracing import THEMES
from matrix_jax.data.loader import Clips
from matrix_jax.evals import control, driver, tables
from matrix_jax.evals import drift as drifts
from matrix_jax.evals import scripted as scripts
from matrix_jax.evals.scripted import Scripted
from matrix_jax.evals.video import Streams, by_second, indices, psnr, reconstruct, sheet


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
    return dataclasses.replace(cfg, seconds=8, drive_seconds=15, streams=2, clips=3,
                               times=(1.0, 4.0, 8.0))


def evaluate(world, params, data: str, out, cfg: Config, log=print) -> dict:
    """Runs all sections and writes them to `out` -> the results.

    Args:
      world, params: from `worlds.open_run`.
      data: folder of recorded clips; its train split trains the probe. Clips of other origin, which
        say nothing about the car, are left aside.
    """
    stream = world.cfg.stream
    if stream.group_frames != 1:
        raise UsageError(f'stream.group_frames: got {stream.group_frames}, expected 1: the driver '
                         'presses a key per latent frame')
    out, results, began = Path(out), {'config': dataclasses.asdict(cfg)}, time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def done(name, value):
        results[name] = value
        (out / 'results.json').write_text(json.dumps(results, indent=1))
        log(f'[{time.perf_counter() - began:5.0f} s] {name}: {json.dumps(value)[:400]}')

    held_out = Clips(data, 'heldout', cfg.clip_frames, THEMES, cache=False)
    rebuilt, originals = rebuild(world, params, held_out, cfg)
    done('reconstruction', {'psnr': psnr(zip(originals, rebuilt, strict=True))})
    probe, real = probes(cfg, data, held_out, list(rebuilt), stream.context, out)
    done('probe', real)
    game = driver.carracing.Game()
    starts = driver.starts(game, cfg.streams, 8 + stream.frames, cfg.seed)
    done('speed', speed(world, params, game, starts[0], cfg))
    scripted = scripts.run(world, params, game, starts, cfg.seconds, cfg.seed, _bar)
    done('obedience', obedience(cfg, probe, scripted, stream.context))
    done('drift', drift(scripted, starts, world.cfg.fps))
    done('fidelity', fidelity(cfg, probe, scripted, held_out, stream.context))
    draw_scripts(scripted, cfg, world.cfg.fps, out)
    loop, drives = closed_loop(world, params, game, starts, cfg)
    done('closed_loop', loop)
    done('drive_drift', {name: drifts.seconds(
        [frames for frames, _ in drives[name]], [frames for frames, _ in drives['game']],
        [start.theme for start in starts], world.cfg.fps) for name in ('world', 'game')})
    draw_drives(drives, cfg, world.cfg.fps, out)
    if cfg.long_seconds:
        done('long', long_drive(world, params, game, starts[:1], cfg, out))
    (out / 'report.md').write_text(tables.report(results))
    return results


# --- reconstruction and the probe ------------------------------------------------------------


def rebuild(world, params, clips: Clips, cfg: Config):
    """(reconstructed, original) frames uint8 [N F' H W 3] of clips, spread over the split."""
    chosen = np.linspace(0, len(clips) - 1, min(cfg.clips, len(clips))).round().astype(int)
    frames = np.stack([clips[int(index)].frames[:cfg.clip_frames] for index in chosen])
    made = reconstruct(world, params, frames)
    return made, frames[:, -made.shape[1]:]


def probes(cfg: Config, data: str, held_out: Clips, rebuilt, context: int, out: Path):
    """((params, threshold), scores on real frames); a trained probe is kept in `out`."""
    path, found = out / 'probe.msgpack', control.load(out / 'probe.msgpack', cfg.probe)
    if found is None:
        recorded = Clips(data, 'train', themes=THEMES, cache=False)
        train = control.examples(cfg.probe, map(_example, _each(recorded)))
        params = control.train(cfg.probe, train, _bar('probe'))
        some = control.sample(train, cfg.windows)
        limit = control.threshold(control.read(cfg.probe, params, some)[:, 0],
                                  control.STEER[some.controls])
        control.save(path, cfg.probe, params, limit)
        found = params, limit
    params, limit = found
    clips = list(_each(held_out))
    scores = {}
    for name, given in (('real', [_example(clip) for clip in clips]),
                        ('reconstructed', _rebuilt_examples(clips, rebuilt, context, cfg))):
        test = control.sample(control.examples(cfg.probe, given), cfg.windows)
        seen = control.read(cfg.probe, params, test)
        error = seen - test.truth
        fit = float(np.sum(seen[:, 0] * test.truth[:, 0]) / np.sum(test.truth[:, 0] ** 2))
        side = control.STEER[test.controls]
        scores[name] = {**control.score(seen[:, 0], side, limit), 'yaw_slope': fit,
                        'yaw_error': float(np.abs(error[:, 0]).mean()),
                        'speed_error': float(np.abs(error[:, 1]).mean())}
    return found, {'threshold': limit, **scores}


def _each(clips: Clips):
    return (clips[index] for index in range(len(clips)))


def _example(clip):
    return clip.frames, clip.controls, clip.telemetry


def _rebuilt_examples(clips, rebuilt, context: int, cfg: Config):
    chosen = np.linspace(0, len(clips) - 1, len(rebuilt)).round().astype(int)
    first = FRAMES_PER_CONTROL * (context - 1) + 1
    for index, frames in zip(chosen, rebuilt, strict=True):
        clip = clips[int(index)]
        yield (np.concatenate([clip.frames[:first], frames]), clip.controls[:cfg.clip_frames],
               clip.telemetry[:cfg.clip_frames])


# --- scripted keys ---------------------------------------------------------------------------


def obedience(cfg: Config, probe, scripted: dict[str, Scripted], context: int) -> dict:
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
    speeds = {pedal: [float(seen[pedals == pedal, 1].mean()) for seen in (made, real)]
              for pedal in np.unique(pedals)}
    side = control.STEER[controls]
    return {'generated': control.score(made[:, 0], side, limit),
            'real': control.score(real[:, 0], side, limit),
            **control.gain(made[:, 0], real[:, 0], side), 'speed': speeds}


def drift(scripted: dict[str, Scripted], starts, fps: int) -> dict:
    """Per script, for the world and the game: `drift.seconds` of what comes after the context."""
    themes = [start.theme for start in starts]
    result = {}
    for name, one in scripted.items():
        made, real = one.made[:, one.context:], one.real[:, one.context:]
        result[name] = {'generated': drifts.seconds(made, real, themes, fps),
                        'real': drifts.seconds(real, real, themes, fps)}
    return result


def fidelity(cfg: Config, probe, scripted: dict[str, Scripted], held_out: Clips,
             context: int) -> dict:
    """RFD, the Frechet distance on the probe's own features, and seams; each with its ceiling.

    The ceiling of the RFD is that of held-out clips to the game under the same keys.
    """
    params, _ = probe

    def features(clips, skip):
        data = control.examples(cfg.probe, clips, skip)
        return control.features(cfg.probe, params, control.sample(data, cfg.windows, cfg.seed))

    found = {}
    for kind in ('made', 'real'):
        found[kind] = features([(frames, indices(keys), None) for one in scripted.values()
                                for frames, keys in zip(getattr(one, kind), one.keys, strict=True)],
                               context + cfg.settle)
    clips = features(map(_example, _each(held_out)), 0)
    shift = FRAMES_PER_CONTROL
    return {'rfd': drifts.frechet(found['made'], found['real']),
            'rfd_real': drifts.frechet(clips, found['real']),
            **{name: drifts.seams(getattr(scripted['mixed'], kind)[:, scripted['mixed'].context:],
                                  shift)
               for name, kind in (('seams', 'made'), ('seams_real', 'real'))}}


def speed(world, params, game, start, cfg: Config, shifts: int = 40) -> dict:
    """Frames per second of one stream on this machine, after compilation, decoder included."""
    streams = Streams(world, params, 'head')
    frames, keys, _ = driver.begin(game, start, world.cfg.stream.frames)
    carry = streams.start([driver.THEMES[start.theme].captions[0]], frames[None],
                          indices(keys[:streams.cfg.remembered])[None], cfg.seed)
    straight = np.full((1, 1), SYMBOLS.index('D'))
    took = []

    def key(shift, newest):
        took.append(time.perf_counter())
        return straight

    shown = streams.run(carry, key, 5 + shifts)
    steps = np.diff(took)[4:]
    return {'fps': float(shown.shape[1] / (5 + shifts) / np.median(steps)),
            'calls_per_shift': world.cfg.stream.steps // world.cfg.stream.groups,
            'shift_ms': float(1000 * np.median(steps))}


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
    for name, way, key in (('game', plain, None), ('game, late keys', lagged, None),
                           ('game, D held', plain, 'D')):
        drives[name] = []
        for start in starts:
            place = dataclasses.replace(start, keys=start.keys[:len(start.keys) - ahead + way.lag])
            frames, telemetry, keys = driver.drive_game(game, place, way, holds, key)
            drives[name].append((frames, keys))
            truth.append(telemetry[:, 0] >= 0.5)
            seen.append(driver.on_road(frames, start.theme))
    begun = [driver.begin(game, start, stream.frames) for start in starts]
    for name, key in (('world', None), ('world, D held', 'D')):
        drives[name] = drive_world(streams, starts, begun, lagged, holds, key, cfg.seed)
    scores = {name: _mean([driver.judge(frames, start.theme)
                           for (frames, _), start in zip(videos, starts, strict=True)])
              for name, videos in drives.items()}
    scores['judge_agrees'] = float(np.mean(np.concatenate(truth) == np.concatenate(seen)))
    scores['seconds'] = cfg.drive_seconds
    return scores, drives


def drive_world(streams: Streams, starts, begun, cfg: driver.Config, holds: int, key: str | None,
                seed: int):
    """Drives the world from starts -> per stream (frames uint8 [F H W 3], keys).

    Args:
      begun: what `driver.begin` gives for each start, of as many latent frames as the window.
      key: hold this key in place of driving.
    """
    context, lag, per = streams.cfg.context, cfg.lag, FRAMES_PER_CONTROL
    clips = np.stack([frames for frames, _, _ in begun])
    symbols = [keys for _, keys, _ in begun]
    last = per * (context - 1)
    drivers = [driver.FrameDriver(cfg, start.theme, keys[context:context + lag], states[last, 2])
               for start, keys, (_, _, states) in zip(starts, symbols, begun, strict=True)]
    pressed = [keys[context:context + lag] for keys in symbols]

    def choose(_, newest):
        views = clips[:, last] if newest is None else newest[:, -1]
        for one, keys, view in zip(drivers, pressed, views, strict=True):
            keys.append(key or one.key(view))
        return np.stack([indices(keys[-1:]) for keys in pressed])

    prompts = [driver.THEMES[start.theme].captions[0] for start in starts]
    first = np.stack([indices(keys[:streams.cfg.remembered]) for keys in symbols])
    shown = streams.run(streams.start(prompts, clips, first, seed), choose, holds,
                        _bar('drive'))
    return [(frames, keys[:holds]) for frames, keys in zip(shown, pressed, strict=True)]


def long_drive(world, params, game, starts, cfg: Config, out: Path) -> dict:
    """One stream that is driven from its frames for long: what each minute shows."""
    fps, stream = world.cfg.fps, world.cfg.stream
    streams = Streams(world, params, 'head')
    lagged = driver.Config(cruise=cfg.cruise, lag=streams.lag)
    holds = cfg.long_seconds * fps // FRAMES_PER_CONTROL
    begun = [driver.begin(game, start, stream.frames) for start in starts]
    (frames, _), = drive_world(streams, starts, begun, lagged, holds, None, cfg.seed)
    found = drifts.seconds([frames], [begun[0][0]], [starts[0].theme], fps)
    found['on_road'] = by_second(driver.on_road(frames, starts[0].theme), fps).tolist()
    times = np.linspace(2, cfg.long_seconds, 16)
    video.write_image(out / 'long.png', sheet([frames], times, fps, width=160))
    return {'seconds': cfg.long_seconds, **{
        name: [round(float(np.mean(values[at:at + 60])), 3)
               for at in range(0, cfg.long_seconds, 60)] for name, values in found.items()}}


def _bar(name: str):
    """What wraps a range of steps in a progress bar that vanishes at its end."""
    from tqdm import tqdm
    return partial(tqdm, desc=name, leave=False, dynamic_ncols=True)


def _mean(scores: list[dict]) -> dict:
    mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return mean | {'each': [round(score['seconds_on_road'], 1) for score in scores]}


# --- pictures --------------------------------------------------------------------------------


def draw_scripts(scripted: dict[str, Scripted], cfg: Config, fps: int, out: Path):
    """One contact sheet per start: a row per script, a column per time; and those of the game."""
    per = FRAMES_PER_CONTROL
    keys = {name: [np.repeat(keys, per)[per - 1:] for keys in one.keys]
            for name, one in scripted.items()}
    for index in range(len(scripted['left'].made)):
        rows = [one.made[index, one.context:] for one in scripted.values()]
        drawn = [list(keys[name][index][one.context:]) for name, one in scripted.items()]
        video.write_image(out / f'scripts-{index}.png', sheet(rows, cfg.times, fps, drawn))
        rows = [one.real[index, one.context:] for one in scripted.values()]
        video.write_image(out / f'scripts-{index}-real.png', sheet(rows, cfg.times, fps, drawn))


def draw_drives(drives, cfg: Config, fps: int, out: Path):
    """A contact sheet of all driven streams, and the first as a video."""
    times = np.linspace(2, cfg.drive_seconds, 8)
    rows = [frames for frames, _ in drives['world']]
    drawn = [np.repeat(keys, FRAMES_PER_CONTROL).tolist() for _, keys in drives['world']]
    video.write_image(out / 'drive.png', sheet(rows, times, fps, drawn, width=160))
    video.write_video(out / 'drive.mp4', rows[0], fps, drawn[0])
