"""The closed loop of CarRacing: a driver that sees only frames keeps the car on the road.

It drives the game, the game with keys as late as in a stream, and the world. A held `D` is the
floor.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.controls.driving import FRAMES_PER_CONTROL
from matrix_jax.evals import drift as drifts
from matrix_jax.evals import driver
from matrix_jax.evals.video import Streams, bar, by_second, indices, sheet


def sections(world, params, game, starts, cfg, out: Path):
    """Yields (name, results) of the driven streams, and writes their pictures to `out`.

    Args:
      starts: from `driver.starts`.
      cfg: a `carracing.Config`.
    """
    fps = world.cfg.fps
    loop, drives = closed_loop(world, params, game, starts, cfg)
    yield 'closed_loop', loop
    measures = [driver.measures(start.theme) for start in starts]
    shown = {name: [frames for frames, _ in drives[name]] for name in ('world', 'game')}
    yield (
        'drive_drift',
        {
            name: drifts.seconds(frames, shown['game'], measures, fps)
            for name, frames in shown.items()
        },
    )
    draw_drives(drives['world'], cfg, fps, out)
    if cfg.long_seconds:
        yield 'long', long_drive(world, params, game, starts[:1], cfg, out)


def closed_loop(world, params, game, starts, cfg):
    """Drives the game and the world -> (scores, name -> [(frames uint8 [F H W 3], keys)])."""
    stream, fps = world.cfg.stream, world.cfg.fps
    streams, holds = Streams(world, params, 'early'), cfg.drive_seconds * fps // FRAMES_PER_CONTROL
    plain = driver.Config(cruise=cfg.cruise)
    lagged = dataclasses.replace(plain, lag=streams.lag)
    drives, truth, seen = {}, [], []
    # The game starts where the newest clean frame of the world's window is.
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
      begun: `driver.begin` of each start, for the latent frames of the window.
      cfg: settings of the driver.
      holds: number of key holds.
      key: key to hold instead of driving.
      seed: seed of the noise.
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


def long_drive(world, params, game, starts, cfg, out: Path) -> dict:
    """One long driven stream: means of each minute."""
    fps, stream = world.cfg.fps, world.cfg.stream
    streams = Streams(world, params, 'early')
    lagged = driver.Config(cruise=cfg.cruise, lag=streams.lag)
    holds = cfg.long_seconds * fps // FRAMES_PER_CONTROL
    begun = [driver.begin(game, start, stream.frames) for start in starts]
    ((frames, _),) = drive_world(streams, starts, begun, lagged, holds, None, cfg.seed)
    found = drifts.seconds([frames], [begun[0][0]], [driver.measures(starts[0].theme)], fps)
    found['on_road'] = by_second(driver.on_road(frames, starts[0].theme), fps).tolist()
    times = np.linspace(2, cfg.long_seconds, 16)
    video.write_image(out / 'long.png', sheet([frames], times, fps, width=160))
    return {'seconds': cfg.long_seconds, **drifts.minutes(found)}


def draw_drives(drives, cfg, fps: int, out: Path):
    """Writes a contact sheet of driven streams, and the first one as a video."""
    times = np.linspace(2, cfg.drive_seconds, 8)
    rows = [frames for frames, _ in drives]
    keys = [np.repeat(keys, FRAMES_PER_CONTROL).tolist() for _, keys in drives]
    video.write_image(out / 'drive.png', sheet(rows, times, fps, keys, width=160))
    video.write_video(out / 'drive.mp4', rows[0], fps, keys[0])


def _mean(scores: list[dict]) -> dict:
    mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return mean | {'each': [round(score['seconds_on_road'], 1) for score in scores]}
