"""Results as Markdown: the report of one world, and several worlds side by side.

Each judge has tables of its own, driving first and walking below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.evals.scripted import SCRIPTS

AXES = {'yaw': 'turn', 'pitch': 'tilt', 'ahead': 'W and S', 'side': 'A and D'}  # of `walk`
SCORES = ('accuracy', 'balanced', 'shuffled', 'slope', 'none')
FOOT = ('sharpness', 'color', 'change')
CAR = ('road', 'car', 'palette', 'sharpness', 'color')


def report(results: dict) -> str:
    """The results of `report.evaluate` as Markdown tables."""
    return _kind(results).report(results)


def compare(folders: Sequence[str]) -> str:
    """Results that lie in folders, one row each, and the real game last; a table for each judge.

    Raises:
      UsageError: a folder without results, or with those of another version.
    """
    tables: dict[ReportTables, list] = {}
    real = {}
    for folder in folders:
        path = Path(folder) / 'results.json'
        try:
            results = json.loads(path.read_text())
            kind = _kind(results)
            tables.setdefault(kind, []).append([Path(folder).name, *kind.row(results, False)])
            real[kind] = ['real game', *kind.row(results, True)]
        except (OSError, ValueError) as error:
            raise UsageError(f'--compare: {path}: {error}') from None
        except KeyError as error:
            raise UsageError(
                f'--compare: {path}: has no {error}; expected the results of a finished evaluation'
            ) from None
    return '\n'.join(
        line for kind, rows in tables.items() for line in table(kind.head, [*rows, real[kind]])
    )


def table(head, rows) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [head, ['---'] * len(head), *rows]
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in lines] + ['']


def _ends(values) -> str:
    """How seconds begin and end: means of their first and last third."""
    third = max(len(values) // 3, 1)
    return f'{np.mean(values[:third]):.2f} to {np.mean(values[-third:]):.2f}'


# --- driving -------------------------------------------------------------------------------------


def _driving(results: dict) -> str:
    probe, obeyed, loop = results['probe'], results['obedience'], results['closed_loop']
    both, cfg, real = obeyed['all'], results['config'], results['fidelity']
    road = {
        name: f'{value["seconds_on_road"]:.1f}'
        for name, value in loop.items()
        if isinstance(value, dict)
    }
    steer = [
        f'{both["generated"]["balanced"]:.2f}',
        f'{both["real"]["balanced"]:.2f} (held-out clips {probe["real"]["balanced"]:.2f}, '
        f'through the VAE {probe["reconstructed"]["balanced"]:.2f})',
        f'{both["generated"]["shuffled"]:.2f} (keys shuffled)',
    ]
    drive = [
        road['world'],
        f'{road["game"]} ({road["game, late keys"]} with keys as late)',
        f'{road["world, D held"]} (D held; in the game {road["game, D held"]})',
    ]
    drift = [
        [
            name,
            second,
            *(
                f'{results["drift"][name][kind][measure][second - 1]:.2f}'
                for measure in CAR
                for kind in ('generated', 'real')
            ),
        ]
        for name in SCRIPTS
        for second in sorted({min(int(at), cfg['seconds']) for at in cfg['times']})
    ]
    each = [
        [
            name,
            *(f'{obeyed[name][kind]["accuracy"]:.2f}' for kind in ('generated', 'real')),
            *(
                f'{obeyed[name][key]:.2f}' if key in obeyed[name] else ''
                for key in ('gain', 'bias')
            ),
        ]
        for name in SCRIPTS
    ]
    lines = [
        *table(
            ['measure', 'generated', 'real game (ceiling)', 'floor'],
            [
                ['steering that the probe sees, balanced accuracy', *steer],
                ['turn of a held key / that in the game', f'{both["gain"]:.2f}', '1', '0'],
                [f'seconds on the road of {loop["seconds"]}, driven from frames', *drive],
                [
                    'RFD: Frechet distance on the features of the probe',
                    f'{real["rfd"]:.2f}',
                    f'{real["rfd_real"]:.2f} (held-out clips)',
                    '',
                ],
                [
                    'seams: change from shift to shift / inside one',
                    f'{real["seams"]:.2f}',
                    f'{real["seams_real"]:.2f}',
                    '',
                ],
                ['VAE on held-out frames', f'{results["reconstruction"]["psnr"]:.1f} dB', '', ''],
            ],
        ),
        *table(
            [
                'script',
                'steering as commanded',
                'in the game',
                'turn / game',
                'turn without a key, less the game, rad/s',
            ],
            each,
        ),
        *table(
            [
                'script',
                'second',
                'road area',
                'game',
                'car seen',
                'game',
                'palette',
                'game',
                'sharpness',
                'game',
                'colour, Delta E',
                'game',
            ],
            drift,
        ),
    ]
    if 'long' in results:
        long = results['long']
        names = ('on_road', *CAR)
        lines += table(
            [
                'minute',
                'on the road',
                'road area',
                'car seen',
                'palette',
                'sharpness',
                'colour, Delta E',
            ],
            [
                [minute + 1, *(f'{long[name][minute]:.2f}' for name in names)]
                for minute in range(len(long['road']))
            ],
        )
    speed = results['speed']
    return '\n'.join(
        [
            *lines,
            f'{cfg["streams"]} streams per row, every other one mirrored, {cfg["seconds"]} s '
            f'under scripted keys; seed {cfg["seed"]}; probe threshold {probe["threshold"]:.2f} rad/s. '
            'The judge of the road agrees with the telemetry on '
            f'{100 * loop["judge_agrees"]:.1f}% of real frames. One stream: {speed["fps"]:.1f} frames '
            f'per second on this machine ({speed["calls_per_shift"]} network calls per shift).',
            '',
        ]
    )


def _driving_row(results: dict, real: bool) -> list[str]:
    kind, driven, suffix = ('real', 'game', '_real') if real else ('generated', 'world', '')
    all_, loop = results['obedience']['all'], results['closed_loop']
    fidelity, speed = results['fidelity'], results['speed']
    drift = results['drive_drift'][driven]
    return [
        f'{all_[kind]["balanced"]:.2f}',
        f'{all_[kind]["left"]:.2f}',
        f'{all_[kind]["right"]:.2f}',
        '1' if real else f'{all_["gain"]:.2f}',
        '0' if real else f'{all_["bias"]:+.2f}',
        f'{loop[driven]["seconds_on_road"]:.1f} of {loop["seconds"]}',
        f'{fidelity["rfd" + suffix]:.2f}',
        f'{fidelity["seams" + suffix]:.2f}',
        *(_ends(drift[name]) for name in ('sharpness', 'color', 'road')),
        '' if real else str(speed['calls_per_shift']),
        '' if real else f'{speed["fps"]:.1f}',
    ]


# --- walking -------------------------------------------------------------------------------------


def _walking(results: dict) -> str:
    probe, cfg, fidelity = results['probe'], results['config'], results['fidelity']
    obeyed, drift, real = results['obedience'], results['drift'], probe['real']
    mixed = obeyed['mixed']['all']
    axes = [
        [
            named,
            *(f'{one[axis]["balanced"]:.2f}' for one in (mixed, real, probe['reconstructed'])),
            f'{mixed[axis]["shuffled"]:.2f}',
            _gain(mixed, real, axis),
        ]
        for axis, named in AXES.items()
    ]
    parts = list(dict.fromkeys(part for one in obeyed.values() for part in one if part != 'all'))
    scripts = [
        [
            name,
            AXES[axis],
            *(
                f'{one[part][axis]["balanced"]:.2f}' if _asked(one, part, axis) else ''
                for part in parts
            ),
            _of_sides(real[axis], one['all'][axis]),
            _gain(one['all'], real, axis),
            _still(one['all']),
        ]
        for name, one in obeyed.items()
        for axis in AXES
        if _asked(one, 'all', axis)
    ]
    seconds = [
        [name, second, *(f'{one[measure][second - 1]:.2f}' for measure in FOOT)]
        for name, one in drift.items()
        for second in sorted({int(part.partition('-')[2]) for part in parts})
        if second <= len(one['sharpness'])
    ]
    lines = [
        *table(
            [
                'mixed: what the probe sees, balanced accuracy',
                'generated',
                'recordings (ceiling)',
                'recordings through the VAE',
                'shuffled (floor)',
                'movement / that of recordings',
            ],
            axes,
        ),
        *table(
            [
                'script',
                'asked',
                *(f'seen at {part} s' for part in parts),
                'in recordings',
                'movement / that of recordings',
                'axes not asked, still',
            ],
            scripts,
        ),
        *table(
            ['measure', 'generated', 'recordings'],
            [
                *(
                    [
                        f'RFD at {part} s: Frechet distance on the features of the probe',
                        f'{value:.2f}',
                        f'{fidelity["rfd_real"]:.2f} (half of them to the rest)',
                    ]
                    for part, value in fidelity['rfd'].items()
                ),
                [
                    'seams: change from block to block / inside one',
                    f'{fidelity["seams"]:.2f}',
                    f'{fidelity["seams_real"]:.2f}',
                ],
                ['VAE on held-out frames', f'{results["reconstruction"]["psnr"]:.1f} dB', ''],
            ],
        ),
        *table(['script', 'second', 'sharpness', 'colour, Delta E', 'change a frame'], seconds),
    ]
    if 'long' in results:
        long = results['long']
        lines += table(
            ['minute', 'sharpness', 'colour, Delta E', 'change a frame'],
            [
                [minute + 1, *(f'{long[name][minute]:.2f}' for name in FOOT)]
                for minute in range(len(long['sharpness']))
            ],
        )
    speed = results['speed']
    return '\n'.join(
        [
            *lines,
            f'{cfg["streams"]} streams per script, {cfg["seconds"]} s, `mixed` '
            f'{cfg["drive_seconds"]} s under what was pressed in the recordings; seed {cfg["seed"]}; '
            f'RFD of {fidelity["windows"]} windows. One stream: {speed["fps"]:.1f} frames per second '
            f'on this machine ({speed["calls_per_shift"]} network calls per block).',
            '',
        ]
    )


def _asked(one: dict, part: str, axis: str) -> bool:
    return part in one and 'slope' in one[part][axis]


def _of_sides(real: dict, found: dict) -> str:
    """How often recordings show those sides of an axis that a script asks for."""
    asked = [real[side] for side in found if side not in SCORES and side in real]
    return f'{np.mean(asked):.2f}' if asked else ''


def _gain(made: dict, real: dict, axis: str) -> str:
    if 'slope' not in made[axis] or 'slope' not in real[axis]:
        return ''
    return f'{made[axis]["slope"] / real[axis]["slope"]:.2f}'


def _still(found: dict) -> str:
    """Share of windows in which an axis that nobody asked for does not move."""
    still = [one['accuracy'] for one in found.values() if 'slope' not in one]
    return f'{np.mean(still):.2f}' if still else ''


def _walking_row(results: dict, real: bool) -> list[str]:
    recorded, fidelity, speed = results['probe']['real'], results['fidelity'], results['speed']
    mixed, mouse = (results['obedience'][name]['all'] for name in ('mixed', 'mouse'))
    found = recorded if real else mixed
    drift = results['drift']['real' if real else 'mixed']
    rfd = list(fidelity['rfd'].values())
    ends = [fidelity['rfd_real']] if real else [rfd[0], rfd[-1]]
    return [
        *(f'{found[axis]["balanced"]:.2f}' for axis in AXES),
        '1' if real else _gain(mouse, recorded, 'yaw'),
        ' to '.join(f'{value:.2f}' for value in ends),
        f'{fidelity["seams_real" if real else "seams"]:.2f}',
        *(_ends(drift[name]) for name in FOOT),
        '' if real else f'{results["reconstruction"]["psnr"]:.1f}',
        '' if real else str(speed['calls_per_shift']),
        '' if real else f'{speed["fps"]:.1f}',
    ]


# --- what there is -------------------------------------------------------------------------------


class ReportTables(NamedTuple):
    """The tables of a judge: its report, and the head and a row of comparisons."""

    report: Callable[[dict], str]
    head: tuple[str, ...]
    row: Callable[[dict, bool], list[str]]


KINDS = {
    'driving': ReportTables(
        _driving,
        (
            'world',
            'steering seen',
            'left',
            'right',
            'turn / game',
            'turn without a key',
            'on the road',
            'RFD',
            'seams',
            'sharpness',
            'colour, Delta E',
            'road area',
            'calls per shift',
            'fps',
        ),
        _driving_row,
    ),
    'walking': ReportTables(
        _walking,
        (
            'world',
            *(f'{named} seen' for named in AXES.values()),
            'mouse turn / recordings',
            'RFD',
            'seams',
            'sharpness',
            'colour, Delta E',
            'change a frame',
            'VAE dB',
            'calls per block',
            'fps',
        ),
        _walking_row,
    ),
}


def _kind(results: dict) -> ReportTables:
    # The first results do not say whose they are: there was one judge.
    return KINDS[results.get('judge', 'driving')]
