"""Tables of `evals.first_person`."""

from __future__ import annotations

import numpy as np

from matrix_jax.evals.markdown import by_minute, ends, table

# The axes of `evals.action_probe`.
AXES = {'yaw': 'turn', 'pitch': 'tilt', 'ahead': 'W and S', 'side': 'A and D'}
SCORES = ('accuracy', 'balanced', 'shuffled', 'slope', 'none')
MEASURES = {'sharpness': 'sharpness', 'color': 'colour, Delta E', 'change': 'change per frame'}
HEAD = (
    'world',
    *(f'{name} seen' for name in AXES.values()),
    'mouse turn / recordings',
    'RFD',
    'seams',
    *MEASURES.values(),
    'VAE dB',
    'calls per block',
    'fps',
)


def report(results: dict) -> str:
    """The whole report."""
    obeyed = results['obedience']
    parts = list(dict.fromkeys(part for one in obeyed.values() for part in one if part != 'all'))
    lines = [
        *_mixed(results),
        *_scripts(results, parts),
        *_fidelity(results),
        *_seconds(results, parts),
        *(_against_game(results) if 'game' in results else []),
    ]
    if 'long' in results:
        lines += by_minute(results['long'], MEASURES)
    cfg, speed = results['config'], results['speed']
    return '\n'.join(
        [
            *lines,
            f'{cfg["streams"]} streams per script, {cfg["seconds"]} s; `mixed` '
            f'{cfg["drive_seconds"]} s under the recorded actions; seed {cfg["seed"]}; RFD over '
            f'{results["fidelity"]["windows"]} windows. One stream: {speed["fps"]:.1f} frames per '
            f'second on this machine ({speed["calls_per_shift"]} network calls per block).',
            '',
        ]
    )


def row(results: dict, real: bool) -> list[str]:
    """Row of a comparison under `HEAD`; `real` gives that of the recordings."""
    recorded, fidelity, speed = results['probe']['real'], results['fidelity'], results['speed']
    mixed, mouse = (results['obedience'][name]['all'] for name in ('mixed', 'mouse'))
    found = recorded if real else mixed
    drift = results['drift']['real' if real else 'mixed']
    rfd = list(fidelity['rfd'].values())
    shown = [fidelity['rfd_real']] if real else [rfd[0], rfd[-1]]
    return [
        *(f'{found[axis]["balanced"]:.2f}' for axis in AXES),
        '1' if real else _gain(mouse, recorded, 'yaw'),
        ' to '.join(f'{value:.2f}' for value in shown),
        f'{fidelity["seams_real" if real else "seams"]:.2f}',
        *(ends(drift[name]) for name in MEASURES),
        '' if real else f'{results["reconstruction"]["psnr"]:.1f}',
        '' if real else str(speed['calls_per_shift']),
        '' if real else f'{speed["fps"]:.1f}',
    ]


def _mixed(results: dict) -> list[str]:
    probe, mixed = results['probe'], results['obedience']['mixed']['all']
    rows = [
        [
            name,
            *(
                f'{one[axis]["balanced"]:.2f}'
                for one in (mixed, probe['real'], probe['reconstructed'])
            ),
            f'{mixed[axis]["shuffled"]:.2f}',
            _gain(mixed, probe['real'], axis),
        ]
        for axis, name in AXES.items()
    ]
    head = (
        'mixed: what the probe sees, balanced accuracy',
        'generated',
        'recordings (ceiling)',
        'recordings through the VAE',
        'shuffled (floor)',
        'movement / that of recordings',
    )
    return table(head, rows)


def _scripts(results: dict, parts: list[str]) -> list[str]:
    real = results['probe']['real']
    rows = [
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
        for name, one in results['obedience'].items()
        for axis in AXES
        if _asked(one, 'all', axis)
    ]
    head = (
        'script',
        'asked',
        *(f'seen at {part} s' for part in parts),
        'in recordings',
        'movement / that of recordings',
        'axes not asked, still',
    )
    return table(head, rows)


def _fidelity(results: dict) -> list[str]:
    fidelity = results['fidelity']
    rows = [
        [
            f'RFD at {part} s: Frechet distance on the features of the probe',
            f'{value:.2f}',
            f'{fidelity["rfd_real"]:.2f} (half of them to the rest)',
        ]
        for part, value in fidelity['rfd'].items()
    ]
    rows += [
        [
            'seams: change from block to block / inside one',
            *(f'{fidelity[name]:.2f}' for name in ('seams', 'seams_real')),
        ],
        ['VAE on held-out frames', f'{results["reconstruction"]["psnr"]:.1f} dB', ''],
    ]
    return table(['measure', 'generated', 'recordings'], rows)


def _seconds(results: dict, parts: list[str]) -> list[str]:
    marks = sorted({int(part.partition('-')[2]) for part in parts})
    rows = [
        [name, second, *(f'{one[measure][second - 1]:.2f}' for measure in MEASURES)]
        for name, one in results['drift'].items()
        for second in marks
        if second <= len(one['sharpness'])
    ]
    return table(['script', 'second', *MEASURES.values()], rows)


def _against_game(results: dict) -> list[str]:
    """Each script against the real game under the same actions, second by second."""
    rows = []
    for name, game in results['game'].items():
        made = results['drift'][name]
        ratio = np.divide(made['sharpness'], np.maximum(game['sharpness'], 1e-6))
        rows.append(
            [
                name,
                f'{ratio.min():.2f} (second {int(ratio.argmin()) + 1})',
                f'{ratio.mean():.2f}',
                *(f'{one[key][-1]:.2f}' for key in ('color', 'change') for one in (made, game)),
            ]
        )
    head = (
        'script',
        'lowest sharpness / game',
        'mean',
        'colour at the end, Delta E',
        'game',
        'change per frame at the end',
        'game',
    )
    return table(head, rows)


def _asked(one: dict, part: str, axis: str) -> bool:
    """Whether a script asks for movement along an axis in a part of it."""
    return part in one and 'slope' in one[part][axis]


def _of_sides(real: dict, found: dict) -> str:
    """How often the probe sees, in recordings, the sides of an axis that a script asks for."""
    asked = [real[side] for side in found if side not in SCORES and side in real]
    return f'{np.mean(asked):.2f}' if asked else ''


def _gain(made: dict, real: dict, axis: str) -> str:
    """Movement per unit asked, over that in recordings."""
    if 'slope' not in made[axis] or 'slope' not in real[axis]:
        return ''
    return f'{made[axis]["slope"] / real[axis]["slope"]:.2f}'


def _still(found: dict) -> str:
    """Share of windows in which the axes that the script does not ask for stay still."""
    still = [one['accuracy'] for one in found.values() if 'slope' not in one]
    return f'{np.mean(still):.2f}' if still else ''
