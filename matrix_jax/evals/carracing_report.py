"""Tables of `evals.carracing`."""

from __future__ import annotations

from matrix_jax.evals.markdown import by_minute, ends, table

MEASURES = {
    'road': 'road area',
    'car': 'car seen',
    'palette': 'palette',
    'sharpness': 'sharpness',
    'color': 'colour, Delta E',
    'motion': 'ground motion, pixels per frame',
}
# Seconds in which a car that is driven straight ahead has left the road, but not yet the meadow,
# behind which the game draws nothing that moves.
OFF_ROAD = slice(3, 8)
HEAD = (
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
)


def report(results: dict) -> str:
    """The whole report."""
    lines = [*_summary(results), *_obedience(results['obedience'])]
    if 'played' in results:  # older results lack it
        lines += _obedience(results['played'], 'script, as played')
    lines += _drift(results)
    if 'long' in results:
        lines += by_minute(results['long'], {'on_road': 'on the road', **_measured(results)})
    cfg, speed = results['config'], results['speed']
    return '\n'.join(
        [
            *lines,
            f'{cfg["streams"]} streams per row, every other one mirrored, {cfg["seconds"]} s '
            f'under scripted keys; seed {cfg["seed"]}; probe threshold '
            f'{results["probe"]["threshold"]:.2f} rad/s. The road detector agrees with the '
            f'telemetry on {100 * results["closed_loop"]["judge_agrees"]:.1f}% of real frames. One '
            f'stream: {speed["fps"]:.1f} frames per second on this machine '
            f'({speed["calls_per_shift"]} network calls per shift).',
            '',
        ]
    )


def row(results: dict, real: bool) -> list[str]:
    """Row of a comparison under `HEAD`; `real` gives that of the game itself."""
    kind, driven, suffix = ('real', 'game', '_real') if real else ('generated', 'world', '')
    both, loop = results['obedience']['all'], results['closed_loop']
    fidelity, speed = results['fidelity'], results['speed']
    drift = results['drive_drift'][driven]
    return [
        *(f'{both[kind][name]:.2f}' for name in ('balanced', 'left', 'right')),
        '1' if real else f'{both["gain"]:.2f}',
        '0' if real else f'{both["bias"]:+.2f}',
        f'{loop[driven]["seconds_on_road"]:.1f} of {loop["seconds"]}',
        *(f'{fidelity[name + suffix]:.2f}' for name in ('rfd', 'seams')),
        *(ends(drift[name]) for name in ('sharpness', 'color', 'road')),
        '' if real else str(speed['calls_per_shift']),
        '' if real else f'{speed["fps"]:.1f}',
    ]


def _summary(results: dict) -> list[str]:
    probe, both, fidelity = results['probe'], results['obedience']['all'], results['fidelity']
    loop, played = results['closed_loop'], results.get('played')
    road = {
        name: f'{found["seconds_on_road"]:.1f}'
        for name, found in loop.items()
        if isinstance(found, dict)
    }
    rows = [
        [
            'steering that the probe sees, balanced accuracy',
            f'{both["generated"]["balanced"]:.2f}',
            f'{both["real"]["balanced"]:.2f} (held-out clips {probe["real"]["balanced"]:.2f}, '
            f'through the VAE {probe["reconstructed"]["balanced"]:.2f})',
            f'{both["generated"]["shuffled"]:.2f} (keys shuffled)',
        ]
    ]
    if played:
        rows += [
            [
                'the same as played, from the moment of the key',
                *(f'{played["all"][kind]["balanced"]:.2f}' for kind in ('generated', 'real')),
                f'{played["all"]["generated"]["shuffled"]:.2f} (keys shuffled)',
            ],
            [
                'seconds until a key shows, as played',
                *(f'{played["delay_seconds"][kind]:.2f}' for kind in ('generated', 'real')),
                '',
            ],
        ]
    rows += [
        ['turn of a held key / that in the game', f'{both["gain"]:.2f}', '1', '0'],
        [
            f'seconds on the road of {loop["seconds"]}, driven from frames',
            road['world'],
            f'{road["game"]} ({road["game, late keys"]} with equally late keys)',
            f'{road["world, D held"]} (D held; in the game {road["game, D held"]})',
        ],
        [
            'RFD: Frechet distance on the features of the probe',
            f'{fidelity["rfd"]:.2f}',
            f'{fidelity["rfd_real"]:.2f} (held-out clips)',
            '',
        ],
        [
            'seams: change from shift to shift / inside one',
            *(f'{fidelity[name]:.2f}' for name in ('seams', 'seams_real')),
            '',
        ],
        *_reward(results),
        *_compared(results),
        ['VAE on held-out frames', f'{results["reconstruction"]["psnr"]:.1f} dB', '', ''],
    ]
    return table(['measure', 'generated', 'real game (ceiling)', 'floor'], rows)


def _reward(results: dict) -> list[list[str]]:
    """Row of the reward of agents; older results lack it."""
    if 'reward' not in results:
        return []
    through, real = (
        f'{found["off_road_accuracy"]:.3f}, {found["speed_error"]:.1f} units/s'
        for found in (results['reward'][kind] for kind in ('reconstructed', 'real'))
    )
    return [
        [
            'reward of agents: off the road as in the telemetry, error of the speed',
            f'{through} (held-out clips through the VAE)',
            f'{real} (held-out clips)',
            '',
        ]
    ]


def _obedience(obeyed: dict, heading: str = 'script') -> list[str]:
    rows = [
        [
            name,
            *(f'{one[kind]["accuracy"]:.2f}' for kind in ('generated', 'real')),
            *(f'{one[key]:.2f}' if key in one else '' for key in ('gain', 'bias')),
        ]
        for name, one in obeyed.items()
        if name not in ('all', 'delay_seconds')
    ]
    head = ('steering as commanded', 'in the game', 'turn / game')
    return table([heading, *head, 'turn without a key, less the game, rad/s'], rows)


def _measured(results: dict) -> dict[str, str]:
    """Names of the measures that the results have; older ones lack the motion of the ground."""
    found = results['drift']['straight']['generated']
    return {name: heading for name, heading in MEASURES.items() if name in found}


def _compared(results: dict) -> list[list[str]]:
    """Rows of the summary that compare a measure with the game's under the same keys."""

    def motion(kind: str) -> float:
        values = results['drift']['straight'][kind]['motion'][OFF_ROAD]
        return sum(values) / len(values)

    driven = results['drive_drift']
    last = [driven[kind]['sharpness'][-10:] for kind in ('world', 'game')]
    made, real = (sum(values) / len(values) for values in last)
    rows = [['sharpness of the last ten seconds, driven', f'{made:.2f}', f'{real:.2f}', '']]
    if 'motion' in _measured(results) and results['config']['seconds'] > OFF_ROAD.start:
        made, real = (motion(kind) for kind in ('generated', 'real'))
        rows.append(
            [
                f'motion of the ground, seconds {OFF_ROAD.start + 1} to {OFF_ROAD.stop}, straight '
                'ahead off the road, pixels per frame',
                f'{made:.2f}',
                f'{real:.2f}',
                '0 (a still picture)',
            ]
        )
    return rows


def _drift(results: dict) -> list[str]:
    cfg = results['config']
    seconds = sorted({min(int(at), cfg['seconds']) for at in cfg['times']})
    measures = _measured(results)
    rows = [
        [
            name,
            second,
            *(
                f'{one[kind][measure][second - 1]:.2f}'
                for measure in measures
                for kind in ('generated', 'real')
            ),
        ]
        for name, one in results['drift'].items()
        for second in seconds
    ]
    columns = [heading for name in measures.values() for heading in (name, 'game')]
    return table(['script', 'second', *columns], rows)
