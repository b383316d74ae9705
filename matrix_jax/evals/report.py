"""Evaluation of a world: obedience, reconstruction, drift, speed and pictures.

Every figure stands beside a ceiling (the real game or its recordings) and, where there is one, a
floor. Writes `results.json` after each section and `report.md` at the end.

An evaluator is a module with `NAME`, `Config` (a `settings.EvaluationSettings`) and

    recorded(world, data, cfg)      sequence of held-out clips; raises if the world cannot be judged
    shape(world)                    latent frames of a stream's start, and of each of its steps
    recorded_controls(world, clip, count)      controls of a recorded clip after that start
    sections(world, params, data, held_out, rebuilt, cfg, out)      yields (name, results)
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from matrix_jax.config import UsageError
from matrix_jax.evals import blind as blind_test
from matrix_jax.evals import carracing, first_person, revisit, tables
from matrix_jax.evals.video import psnr, rebuild

EVALUATORS = {'carracing': carracing, 'first_person': first_person, 'revisit': revisit}


def evaluator(world):
    """The evaluator that a world names (`BaseWorld.evaluator`)."""
    return EVALUATORS[world.evaluator]


def settings(world, quick: bool = False, **given):
    """The `Config` of a world's evaluator.

    Args:
      quick: evaluate in a few minutes; the figures are rough.
      given: fields of the `Config` to override.

    Raises:
      UsageError: the evaluator has no such setting.
    """
    cfg = evaluator(world).Config()
    for name in given:
        if not hasattr(cfg, name):
            raise UsageError(
                f'--{name.replace("_", "-")}: is not a setting of the evaluation of '
                f'{world.cfg.name}'
            )
    return dataclasses.replace(cfg.quick() if quick else cfg, **given)


def blind(world, params, data: str, out, cfg, count: int, seconds: float = 4) -> Path:
    """Writes `blind.html` to `out`, on which a person looks for generated clips; see `evals.blind`.

    Args:
      world, params, data, out, cfg: as of `evaluate`.
      count: number of pairs.
      seconds: length of each clip.

    Raises:
      UsageError: the world or the data cannot be judged; nothing is written.
    """
    ours = evaluator(world)
    held_out = ours.recorded(world, data, cfg)
    shown = blind_test.pairs(world, params, ours, held_out, count, seconds, cfg.seed)
    path = Path(out) / 'blind.html'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(blind_test.page(world.cfg.name, shown, world.cfg.fps), encoding='utf-8')
    return path


def evaluate(world, params, data: str, out, cfg, log=print) -> dict:
    """Runs all sections, writes them to `out` and returns the results.

    Args:
      world, params: from `worlds.open_run`.
      data: folder of recorded clips; the probe trains on its train split.
      out: folder to write to.
      cfg: from `settings`.
      log: prints a line.

    Raises:
      UsageError: the world or the data cannot be judged; nothing is written.
    """
    if world.cfg.clip is not None:
        raise UsageError('world.clip: got a model of whole clips, expected one that streams')
    ours = evaluator(world)
    held_out = ours.recorded(world, data, cfg)
    out, began = Path(out), time.perf_counter()
    results = {'judge': ours.NAME, 'config': dataclasses.asdict(cfg)}
    out.mkdir(parents=True, exist_ok=True)

    def done(name, value):
        results[name] = value
        (out / 'results.json').write_text(json.dumps(results, indent=1))
        log(f'[{time.perf_counter() - began:5.0f} s] {name}: {json.dumps(value)[:400]}')

    rebuilt, originals = rebuild(
        world, params, held_out, cfg.clips, cfg.clip_frames, *ours.shape(world)
    )
    done('reconstruction', {'psnr': psnr(zip(originals, rebuilt, strict=True))})
    for name, value in ours.sections(world, params, data, held_out, rebuilt, cfg, out):
        done(name, value)
    (out / 'report.md').write_text(tables.report(results))
    return results
