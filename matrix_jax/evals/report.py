"""What a world is worth: obedience, reconstruction, drift, speed and pictures.

Each section gives plain numbers next to a ceiling, what the real game or its recordings score, and
a floor. `results.json` is written after each section and `report.md` at the end.

A judge is a module with `Config`, `quick(Config)`, `NAME`, and

    recorded(world, data, cfg)      held-out clips, in a sequence; raises what cannot be judged
    shape(world)                    latent frames of a stream's start, and of each of its steps
    sections(world, params, data, held_out, rebuilt, cfg, out)      yields (name, results)
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from matrix_jax.config import UsageError
from matrix_jax.controls.driving import DrivingVocabulary
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.evals import carracing, first_person, tables
from matrix_jax.evals.video import psnr, rebuild

# What can be pressed says what there is to obey.
JUDGES = {DrivingVocabulary: carracing, KeyboardMouseVocabulary: first_person}


def judge(world):
    """The judge of a world."""
    return JUDGES[type(world.vocabulary)]


def settings(world, quick: bool = False, **given):
    """How much of a world is evaluated: its judge's `Config`.

    Args:
      quick: a look in a few minutes; the numbers are rough.
      given: fields of the `Config` that are not the usual ones.
    """
    cfg = judge(world).Config()
    return dataclasses.replace(judge(world).quick(cfg) if quick else cfg, **given)


def evaluate(world, params, data: str, out, cfg, log=print) -> dict:
    """Runs all sections and writes them to `out` -> the results.

    Args:
      world, params: from `worlds.open_run`.
      data: folder of recorded clips; its train split trains the probe.
      cfg: from `settings`.

    Raises:
      UsageError: what cannot be judged; nothing is written.
    """
    if world.cfg.clip is not None:
        raise UsageError('world.clip: got a model of whole clips, expected one that streams')
    ours = judge(world)
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
