"""Replays recorded PyTorch tensors through the shipped loaders and networks, and compares.

`record` reads the recordings; the other modules have one replay function for each kind of them.
Everything runs in float32 with full-precision matrix products.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from matrix_jax.parity import (
    camera,
    layers,
    segments,
    streaming,
    the_matrix,
    umt5,
    wan,
    wan22,
    wan_dit,
    wan_memory,
)
from matrix_jax.parity.record import BadInput, Record, read

SYSTEMS = (
    ('the_matrix', the_matrix),
    ('matrix_game_2', wan),
    ('matrix_game_2', wan_dit),
    ('matrix_game_2', streaming),
    ('matrix_game_3', layers),
    ('matrix_game_3', wan22),
    ('matrix_game_3', camera),
    ('matrix_game_3', wan_memory),
    ('matrix_game_3', umt5),
    ('matrix_game_3', segments),
)
REPLAYS = {
    (system, kind): function
    for system, replays in SYSTEMS
    for kind, function in replays.REPLAYS.items()
}

INTERMEDIATE = 'inter'  # prefix of activations that help to bisect and are not compared
HEADER = f'{"file":<34} {"output":<44} {"max abs":>9} {"max rel":>9} {"tolerance":>12}  ok'


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One output: the largest error, also relative to the largest recorded value."""

    output: str
    max_abs: float
    max_rel: float
    tolerance: str
    ok: bool
    note: str = ''


def tolerance(record: Record, name: str, want: np.ndarray) -> tuple[float, float, str]:
    """(atol, rtol, text) of an output: those of the file, or fixed ones for its kind."""
    if want.dtype.kind not in 'fc':
        return 0.0, 0.0, 'exact'
    for kind, pattern, value in ABSOLUTE:
        if record.kind == kind and re.match(pattern, name):
            return value, 0.0, f'abs {value:.0e}'
    for kind, pattern, value in RELATIVE:
        if record.kind == kind and re.match(pattern, name):
            return value * float(np.abs(want).max(initial=0)), 0.0, f'rel {value:.0e}'
    return record.atol, record.rtol, f'{record.atol:.0e}'


ABSOLUTE = (
    ('schedulers', 'table_alphas_cumprod', 2e-6),
    ('embeddings', 'pos3d_', 1e-6),
    ('embeddings', 'timestep_', 1e-4),
    ('embeddings', 'guidance_', 2e-3),
)
# Losses and gradients have no scale of their own.
RELATIVE = (
    ('train_loss', 'table_(loss|per_sample_loss)', 1e-4),
    ('train_loss', 'table_weights|table_grad|grad_norm', 1e-3),
)


def compare(record: Record, got: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compares all recorded outputs but the intermediate ones."""
    rows = []
    for name, want in sorted(record.outputs.items()):
        if name.startswith(INTERMEDIATE):
            continue
        if name not in got:
            rows.append(
                Comparison(name, np.nan, np.nan, '-', False, 'this library does not make it')
            )
            continue
        want, ours = np.asarray(want), np.asarray(got[name])
        if want.dtype.kind not in 'fciu':  # strings, or None
            wrong = sum(a != b for a, b in zip(want, ours, strict=True))
            rows.append(
                Comparison(
                    name,
                    wrong,
                    wrong / len(want),
                    'exact',
                    not wrong,
                    f'{wrong} of {len(want)} differ' if wrong else '',
                )
            )
            continue
        atol, rtol, limit = tolerance(record, name, want)
        if ours.shape != want.shape:
            rows.append(
                Comparison(
                    name, np.nan, np.nan, limit, False, f'shape {ours.shape}, recorded {want.shape}'
                )
            )
            continue
        want = want.astype(np.float64)
        error = np.abs(ours.astype(np.float64) - want)
        # NaN compares as false, so it fails.
        ok = bool(np.all(error <= atol + rtol * np.abs(want)))
        largest = error.max(initial=0)
        scale = np.abs(want).max(initial=0)
        rows.append(Comparison(name, largest, largest / scale if scale else largest, limit, ok))
    return rows


def replay(record: Record) -> list[Comparison]:
    """Runs the replay function of a recording and compares its outputs.

    Raises:
      BadInput: there is no replay function, or the file lacks an input.
      ValueError: weights or configuration do not fit our networks.
    """
    function = REPLAYS.get((record.system, record.kind))
    if function is None:
        known = ', '.join('/'.join(pair) for pair in sorted(REPLAYS))
        raise BadInput(
            f'{record.path}: cannot replay {record.system}/{record.kind}, expected one of {known}'
        )
    with jax.default_matmul_precision('highest'):
        return compare(record, function(record))


def run(paths: Sequence[str | Path], out=None, err=None) -> int:
    """Replays files and prints a table.

    Returns:
      Exit code: 0 all outputs hold, 1 some do not, 2 a file cannot be read.
    """
    out, err = out or sys.stdout, err or sys.stderr
    code, total, failed = 0, 0, []
    print(HEADER, file=out)
    for path in paths:
        name = Path(path).name.removesuffix('.safetensors')
        try:
            record = read(path)
            rows = replay(record)
        except BadInput as error:
            print(f'error: {_one_line(error)}', file=err)
            code = 2
            continue
        except ValueError as error:
            print(f'{name:<34} FAILED: {_one_line(error)}', file=out)
            failed.append(name)
            continue
        for row in rows:
            print(
                f'{name:<34} {row.output:<44} {row.max_abs:>9.1e} {row.max_rel:>9.1e} '
                f'{row.tolerance:>12}  {"ok" if row.ok else "FAILED"} {row.note}'.rstrip(),
                file=out,
                flush=True,
            )
            failed += [] if row.ok else [f'{name}: {row.output}']
        total += len(rows)
    print(
        f'{total} outputs of {len(paths)} files: '
        + (
            f'{len(failed)} FAILED ({"; ".join(failed)})'
            if failed
            else 'not all could be read'
            if code
            else 'all hold'
        ),
        file=out,
    )
    return code or (1 if failed else 0)


def _one_line(error) -> str:
    return ' '.join(str(error).split())
