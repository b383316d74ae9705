"""Results as Markdown: the report of one world, and several worlds side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matrix_jax.config import UsageError
from matrix_jax.evals import carracing_report, first_person_report, revisit_report
from matrix_jax.evals.markdown import table

# The names are those in `results.json`.
REPORTS = {'driving': carracing_report, 'walking': first_person_report, 'revisit': revisit_report}


def report(results: dict) -> str:
    """Results of `report.evaluate` as Markdown tables."""
    return REPORTS[_name(results)].report(results)


def compare(folders: Sequence[str]) -> str:
    """Results in folders, one row each, and the real game last; one table per evaluator.

    Raises:
      UsageError: a folder without results, or with results of another version.
    """
    rows: dict[str, list] = {}
    real = {}
    for folder in folders:
        path = Path(folder) / 'results.json'
        try:
            results = json.loads(path.read_text())
            name = _name(results)
            rows.setdefault(name, []).append(
                [Path(folder).name, *REPORTS[name].row(results, False)]
            )
            real[name] = ['real game', *REPORTS[name].row(results, True)]
        except (OSError, ValueError) as error:
            raise UsageError(f'--compare: {path}: {error}') from None
        except KeyError as error:
            raise UsageError(
                f'--compare: {path}: has no {error}; expected the results of a finished evaluation'
            ) from None
    return '\n'.join(
        line for name in rows for line in table(REPORTS[name].HEAD, [*rows[name], real[name]])
    )


def _name(results: dict) -> str:
    # The oldest results do not name their evaluator; there was one.
    return results.get('judge', 'driving')
