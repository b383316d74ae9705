"""Evaluation of first-person worlds: obedience to keyboard and mouse, drift and fidelity.

Streams begin with the first pictures of held-out clips. The script `mixed` repeats the actions of
those clips and of the next ones, so the recordings show what the real game makes of them; `mouse`
turns and tilts by random amounts; `route` walks, turns, walks and turns back; `idle` holds nothing;
each other script holds one action. The ceiling of obedience is the score of the probe on held-out
clips, walls included; the floor is that under shuffled actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from matrix_jax import video
from matrix_jax.config import UsageError
from matrix_jax.data.loader import Clips
from matrix_jax.data.records import FRAMES_PER_LATENT, KEYS, Clip
from matrix_jax.evals import action_probe, control, walks_in_game
from matrix_jax.evals import drift as drifts
from matrix_jax.evals.settings import EvaluationSettings
from matrix_jax.evals.video import Streams, bar, check_clips, sheet, spread

NAME = 'walking'
HELD = {
    'forward': 'W',
    'turn left': 'left',
    'turn right': 'right',
    'strafe left': 'A',
    'strafe right': 'D',
    'idle': 'idle',
}
# Turns right, then further left, so that what was ahead comes into view again.
ROUTE = 'W*24,right*24,W*48,left*36,W*36'
SCRIPTS = (*HELD, 'route', 'mouse', 'mixed')
SPANS = (4, 15, 30)  # seconds at which a stream is split to score its obedience
LONG_SPANS = (15, 30)  # the same for the RFD, which needs many windows
SHORTEST = 4  # seconds of the shortest part
TURNS = (0.04, 0.2)  # mouse in the script `mouse`: about half to twice a turning key
MEASURES = {'change': drifts.change}


@dataclasses.dataclass(frozen=True)
class Config(EvaluationSettings):
    """Settings of the evaluation; `clip_frames` is 1 + 24k."""

    streams: int = 4
    times: tuple[float, ...] = (0.5, 4.0, 15.0, 30.0)
    probe: action_probe.Config = action_probe.Config()


@dataclasses.dataclass(frozen=True)
class ScriptedWalks:
    """Streams of one script.

    Attributes:
      texts: per stream, one action per frame.
      asked: the same along `action_probe.AXES`, float32 [B F 4].
      frames: uint8 [B F H W 3].
    """

    texts: list[list[str]]
    asked: np.ndarray
    frames: np.ndarray


class LabelledClips:
    """Sequence of the clips with known keys and mouse; each is read when it is accessed."""

    def __init__(self, clips: Clips):
        self.clips, self.lengths = clips, {}
        for index in range(len(clips)):
            clip = clips[index]
            if clip.knows('keyboard') and clip.knows('mouse'):
                self.lengths[index] = len(clip.frames)
        self.places = list(self.lengths)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index: int) -> Clip:
        return self.clips[self.places[index]]

    def __iter__(self) -> Iterator[Clip]:
        return (self.clips[place] for place in self.places)


def recorded(world, data: str, cfg: Config) -> LabelledClips:
    """Held-out clips with known keys and mouse.

    Raises:
      UsageError: the world has other actions, or the clips have another size or rate.
    """
    mode = world.vocabulary.mode
    if mode.keys != KEYS or not mode.mouse:
        raise UsageError(
            f'world.mode: got {mode.name}, expected one of the keys '
            f'{" ".join(KEYS)} and a mouse: the probe reads these'
        )
    clips = LabelledClips(Clips(data, 'heldout', cfg.clip_frames, cache=False))
    if not len(clips):
        raise UsageError(f'--data: {data}: no held-out clip whose keys and mouse are known')
    check_clips(world, clips, data)
    return clips


def shape(world) -> tuple[int, int]:
    """(latent frames of the condition, latent frames of a block)."""
    return world.cfg.stream.context, world.cfg.stream.frames


def recorded_controls(world, clip: Clip, count: int) -> list[str]:
    """The first `count` recorded actions of a clip.

    Raises:
      UsageError: the clip has too few.
    """
    vectors = np.concatenate([clip.keyboard, clip.mouse], axis=1)[:count]
    if len(vectors) < count:
        raise UsageError(f'--data: got {len(vectors)} actions in a clip, expected {count}')
    return world.vocabulary.decode(vectors)


def sections(world, params, data: str, held_out: LabelledClips, rebuilt, cfg: Config, out: Path):
    """Yields (name, results) of each section of the report, and writes its pictures to `out`.

    Args:
      data: folder of recorded clips; the probe trains on its train split.
      held_out: from `recorded`.
      rebuilt: some of them after the autoencoder, from `video.rebuild`.
    """
    fps = world.cfg.fps
    probe, real = probes(cfg, data, held_out, rebuilt, out)
    yield 'probe', real
    streams = Streams(world, params)
    starts = begin(held_out, cfg.streams)
    yield 'speed', speed(streams, held_out[starts[0]])
    walks = {
        name: follow(
            streams,
            held_out,
            starts,
            name,
            cfg.drive_seconds if name == 'mixed' else cfg.seconds,
            cfg.seed,
        )
        for name in SCRIPTS
    }
    yield 'obedience', {name: obedience(cfg, probe, one, fps) for name, one in walks.items()}
    shown = [held_out[index].frames for index in starts]
    yield 'drift', drift(walks, shown, fps)
    clips = [held_out[index] for index in starts]
    if walks_in_game.can_play(clips):
        yield (
            'game',
            {
                name: drifts.seconds(played, shown, [MEASURES] * len(shown), fps)
                for name, played in game_videos(world.vocabulary, clips, walks, out, cfg, fps)
            },
        )
    yield 'fidelity', fidelity(cfg, probe, walks['mixed'], held_out, shown, world.cfg.stream, fps)
    draw(world.vocabulary, walks, shown, cfg, fps, out)
    if cfg.long_seconds:
        yield 'long', long_walk(streams, held_out, starts[:1], cfg, out)


# --- the probe -----------------------------------------------------------------------------------


def probes(cfg: Config, data: str, held_out: LabelledClips, rebuilt, out: Path):
    """((params, limits), scores on real frames); reads or writes the probe in `out`."""

    def train():
        clips = action_probe.recorded(LabelledClips(Clips(data, cache=False)))
        examples = action_probe.examples(cfg.probe, clips)
        return action_probe.train(cfg.probe, examples, cfg.windows, bar('probe'))

    found = control.trained(out / 'probe.msgpack', cfg.probe, train)
    behind = zip((held_out[index] for index in spread(held_out, cfg.clips)), rebuilt, strict=True)
    given = {
        'real': action_probe.recorded(held_out),
        'reconstructed': [
            (
                np.concatenate([clip.frames[: cfg.clip_frames - len(frames)], frames]),
                action_probe.axes(clip.keyboard, clip.mouse)[: cfg.clip_frames],
            )
            for clip, frames in behind
        ],
    }
    scores = {
        name: action_probe.obedience(
            cfg.probe, found, control.sample(action_probe.examples(cfg.probe, clips), cfg.windows)
        )
        for name, clips in given.items()
    }
    return found, {'limits': list(map(float, found[1])), **scores}


# --- streams -------------------------------------------------------------------------------------


def begin(clips: LabelledClips, count: int) -> list[int]:
    """At most `count` indices of start clips, among the longest ones."""
    longest = max(clips.lengths.values())
    best = [index for index, place in enumerate(clips.places) if clips.lengths[place] == longest]
    return [best[index] for index in spread(best, count)]


def script(
    vocabulary, clips: LabelledClips, start: int, name: str, count: int, seed: int
) -> list[str]:
    """`count` actions, one per frame, that change between latent frames.

    Args:
      vocabulary: vocabulary of the world.
      clips: held-out clips.
      start: index of the clip that the stream begins with.
      name: one of SCRIPTS.
      count: number of actions.
      seed: seed of random scripts.
    """
    if name in HELD:
        return [vocabulary.canonical(HELD[name])] * count
    if name == 'mixed':
        return recorded_actions(vocabulary, clips, start, count)
    if name == 'route':
        route = vocabulary.parse(ROUTE)
        return ['idle', *route * -(-count // len(route))][:count]
    rng, texts = np.random.default_rng(seed), ['idle']
    while len(texts) < count:
        # Turns both ways equally long, so that the view returns.
        turn, way = rng.uniform(*TURNS), rng.permutation(['left', 'right'])
        for word, amount, holds in (
            *((one, turn, int(rng.integers(4, 9))) for one in way),
            ('up', TURNS[0], 2),
            ('down', TURNS[0], 2),
        ):
            texts += [vocabulary.canonical(f'{word}:{amount:.2f}')] * (FRAMES_PER_LATENT * holds)
    return texts[:count]


def recorded_actions(vocabulary, clips: LabelledClips, start: int, count: int) -> list[str]:
    """The first `count` recorded actions of a clip and those after it."""
    vectors, index = [], start
    while sum(map(len, vectors)) < count:
        clip = clips[index % len(clips)]
        # Skip the first frame of each further clip, which alone fills a latent frame.
        vectors.append(np.concatenate([clip.keyboard, clip.mouse], axis=1)[bool(vectors) :])
        index += 1
    return vocabulary.decode(np.concatenate(vectors)[:count])


def follow(
    streams: Streams, clips: LabelledClips, starts: list[int], name: str, seconds: int, seed: int
) -> ScriptedWalks:
    """Runs the streams of a script."""
    world, count = streams.world, streams.world.controls_for_seconds(seconds)
    texts = [
        script(world.vocabulary, clips, start, name, count, seed + index)
        for index, start in enumerate(starts)
    ]
    pictures = np.stack([clips[start].frames[: world.start_frames] for start in starts])
    frames = streams.follow(pictures, texts, seed, bar(name))
    vectors = np.stack([world.vocabulary.encode(one) for one in texts])
    keys = len(KEYS)
    asked = np.stack([action_probe.axes(one[:, :keys], one[:, keys:]) for one in vectors])
    return ScriptedWalks(texts, asked, frames)


def speed(streams: Streams, clip: Clip, steps: int = 20) -> dict:
    """Frames per second of one stream on this machine, decoder included, without compilation."""
    world = streams.world
    given, _ = world.inputs(world.cfg.prompt, clip.frames[: world.start_frames], [])
    first, others = (
        world.vocabulary.encode(['W'] * count)[None]
        for count in (world.first_step_controls, world.cfg.stream.controls_per_step)
    )
    return {
        **streams.pace(streams.enter(given, 0), first, others, steps),
        'calls_per_shift': world.cfg.stream.passes,
    }


# --- what is measured ----------------------------------------------------------------------------


def spans(seconds: float, at: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) second of each part of a stream that is split at the seconds `at`."""
    ends = [0, *(end for end in at if end + SHORTEST <= seconds), int(seconds)]
    return list(zip(ends, ends[1:], strict=False))


def windows(cfg: Config, one: ScriptedWalks, fps: int, first: int = 0, last: int | None = None):
    """Windows of the probe between two seconds of streams."""
    per = FRAMES_PER_LATENT
    end = len(one.frames[0]) if last is None else 1 + last * fps // per * per
    return action_probe.examples(
        cfg.probe,
        [(frames[:end], asked[:end]) for frames, asked in zip(one.frames, one.asked, strict=True)],
        -(-first * fps // per),
    )


def obedience(cfg: Config, probe, one: ScriptedWalks, fps: int) -> dict:
    """`action_probe.obedience` of whole streams (`all`) and of parts such as `0-4` seconds."""
    return {
        'all': action_probe.obedience(cfg.probe, probe, windows(cfg, one, fps)),
        **{
            f'{first}-{last}': action_probe.obedience(
                cfg.probe, probe, windows(cfg, one, fps, first, last)
            )
            for first, last in spans(one.frames.shape[1] / fps, SPANS)
        },
    }


def drift(walks: dict[str, ScriptedWalks], shown, fps: int) -> dict:
    """`drift.seconds` per script, with the start clips `shown` as colour reference, and that of the
    start clips (`real`)."""
    own = [MEASURES] * len(shown)
    return {
        **{name: drifts.seconds(one.frames, shown, own, fps) for name, one in walks.items()},
        'real': drifts.seconds(shown, shown, own, fps),
    }


def game_videos(vocabulary, clips, walks: dict[str, ScriptedWalks], out: Path, cfg: Config, fps):
    """Yields (script, frames uint8 [B F H W 3]) of the real game under the same actions, and writes
    `scripts-I-game.png` of each start, a row per script."""
    rows = [[] for _ in clips]
    for name, one in walks.items():
        count = one.frames.shape[1]
        vectors = np.stack([vocabulary.encode(texts)[:count] for texts in one.texts])
        frames = walks_in_game.play(clips, vectors)
        for row, played in zip(rows, frames, strict=True):
            row.append(played[[min(round(at * fps), count - 1) for at in cfg.times]])
        yield name, frames
    for index, row in enumerate(rows):
        shown = sheet(row, range(len(cfg.times)), 1)
        video.write_image(out / f'scripts-{index}-game.png', shown)


def fidelity(
    cfg: Config, probe, mixed: ScriptedWalks, held_out: LabelledClips, shown, stream, fps: int
) -> dict:
    """Frechet distance on the features of the probe (RFD) between parts of streams and held-out
    clips, and seams.

    The ceiling of the RFD is the distance between two halves of the held-out clips. All distances
    use the same number of windows, as fewer samples give larger distances.
    """
    params, _ = probe
    clips = list(action_probe.recorded(held_out))
    parts = {
        f'{first}-{last}': windows(cfg, mixed, fps, first, last)
        for first, last in spans(len(mixed.frames[0]) / fps, LONG_SPANS)
    }
    halves = [action_probe.examples(cfg.probe, half) for half in (clips[::2], clips[1::2] or clips)]
    count = min(cfg.windows, *(len(data.ends) for data in (*parts.values(), *halves)))

    def features(data):
        return control.features(cfg.probe, params, control.sample(data, count, cfg.seed))

    real = features(action_probe.examples(cfg.probe, clips))
    first = stream.first_actions
    return {
        'rfd': {name: drifts.frechet(features(data), real) for name, data in parts.items()},
        'rfd_real': drifts.frechet(*map(features, halves)),
        'windows': count,
        'seams': drifts.seams(mixed.frames[:, first:], stream.block_actions),
        'seams_real': drifts.seams([frames[first:] for frames in shown], stream.block_actions),
    }


def long_walk(
    streams: Streams, held_out: LabelledClips, starts: list[int], cfg: Config, out: Path
) -> dict:
    """One long stream: means of each minute."""
    fps = streams.world.cfg.fps
    one = follow(streams, held_out, starts, 'mixed', cfg.long_seconds, cfg.seed)
    found = drifts.seconds(one.frames, [held_out[starts[0]].frames], [MEASURES], fps)
    video.write_image(
        out / 'long.png', sheet(one.frames, np.linspace(2, cfg.long_seconds, 16), fps, width=160)
    )
    return {'seconds': cfg.long_seconds, **drifts.minutes(found)}


# --- pictures ------------------------------------------------------------------------------------


def draw(vocabulary, walks: dict[str, ScriptedWalks], shown, cfg: Config, fps: int, out: Path):
    """Writes `scripts-I.png` of each start, a row per script; `mixed.png`, streams above their
    recordings; `drive.png`, all streams of `mixed`; and the first of them as a video."""
    held = {
        name: [[vocabulary.overlay(text) for text in texts] for texts in one.texts]
        for name, one in walks.items()
    }
    for index in range(len(shown)):
        video.write_image(
            out / f'scripts-{index}.png',
            sheet(
                [one.frames[index] for one in walks.values()],
                cfg.times,
                fps,
                [one[index] for one in held.values()],
            ),
        )
    mixed, keys = walks['mixed'].frames, held['mixed']
    length = min(len(frames) for frames in (*shown, *mixed))
    pairs = [frames[:length] for both in zip(mixed, shown, strict=True) for frames in both]
    video.write_image(
        out / 'mixed.png',
        sheet(
            pairs, np.linspace(0.5, length / fps, 6), fps, [one for one in keys for _ in range(2)]
        ),
    )
    video.write_image(
        out / 'drive.png',
        sheet(mixed, np.linspace(2, len(mixed[0]) / fps, 8), fps, keys, width=160),
    )
    video.write_video(out / 'mixed.mp4', mixed[0], fps, keys[0])
