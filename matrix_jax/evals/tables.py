"""Results as Markdown: the report of one world, and several worlds side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matrix_jax.config import UsageError
from matrix_jax.evals.scripted import SCRIPTS

MEASURES = ('road', 'car', 'palette', 'sharpness', 'color')


def report(results: dict) -> str:
    """The results of `report.evaluate` as Markdown tables."""
    probe, obeyed, loop = results['probe'], results['obedience'], results['closed_loop']
    both, cfg, real = obeyed['all'], results['config'], results['fidelity']
    road = {name: f'{value["seconds_on_road"]:.1f}' for name, value in loop.items()
            if isinstance(value, dict)}
    steer = [f'{both["generated"]["balanced"]:.2f}',
             f'{both["real"]["balanced"]:.2f} (held-out clips {probe["real"]["balanced"]:.2f}, '
             f'through the VAE {probe["reconstructed"]["balanced"]:.2f})',
             f'{both["generated"]["shuffled"]:.2f} (keys shuffled)']
    drive = [road['world'], f'{road["game"]} ({road["game, late keys"]} with keys as late)',
             f'{road["world, D held"]} (D held; in the game {road["game, D held"]})']
    drift = [[name, second, *(f'{results["drift"][name][kind][measure][second - 1]:.2f}'
                              for measure in MEASURES for kind in ('generated', 'real'))]
             for name in SCRIPTS
             for second in sorted({min(int(at), cfg['seconds']) for at in cfg['times']})]
    each = [[name, *(f'{obeyed[name][kind]["accuracy"]:.2f}' for kind in ('generated', 'real')),
             *(f'{obeyed[name][key]:.2f}' if key in obeyed[name] else ''
               for key in ('gain', 'bias'))] for name in SCRIPTS]
    lines = [
        *table(['measure', 'generated', 'real game (ceiling)', 'floor'], [
            ['steering that the probe sees, balanced accuracy', *steer],
            ['turn of a held key / that in the game', f'{both["gain"]:.2f}', '1', '0'],
            [f'seconds on the road of {loop["seconds"]}, driven from frames', *drive],
            ['RFD: Frechet distance on the features of the probe', f'{real["rfd"]:.2f}',
             f'{real["rfd_real"]:.2f} (held-out clips)', ''],
            ['seams: change from shift to shift / inside one', f'{real["seams"]:.2f}',
             f'{real["seams_real"]:.2f}', ''],
            ['VAE on held-out frames', f'{results["reconstruction"]["psnr"]:.1f} dB', '', '']]),
        *table(['script', 'steering as commanded', 'in the game', 'turn / game',
                'turn without a key, less the game, rad/s'], each),
        *table(['script', 'second', 'road area', 'game', 'car seen', 'game', 'palette', 'game',
                'sharpness', 'game', 'colour, Delta E', 'game'], drift)]
    if 'long' in results:
        long = results['long']
        names = ('on_road', *MEASURES)
        lines += table(['minute', 'on the road', 'road area', 'car seen', 'palette', 'sharpness',
                        'colour, Delta E'],
                       [[minute + 1, *(f'{long[name][minute]:.2f}' for name in names)]
                        for minute in range(len(long['road']))])
    speed = results['speed']
    return '\n'.join([
        *lines, f'{cfg["streams"]} streams per row, every other one mirrored, {cfg["seconds"]} s '
        f'under scripted keys; seed {cfg["seed"]}; probe threshold {probe["threshold"]:.2f} rad/s. '
        'The judge of the road agrees with the telemetry on '
        f'{100 * loop["judge_agrees"]:.1f}% of real frames. One stream: {speed["fps"]:.1f} frames '
        f'per second on this machine ({speed["calls_per_shift"]} network calls per shift).', ''])


def compare(folders: Sequence[str]) -> str:
    """Results that lie in folders, one row each, and the real game last.

    Raises:
      UsageError: a folder without results, or with those of another version.
    """
    head = ['world', 'steering seen', 'left', 'right', 'turn / game', 'turn without a key',
            'on the road', 'RFD', 'seams', 'sharpness', 'colour, Delta E', 'road area',
            'calls per shift', 'fps']
    rows, last = [], None
    for folder in folders:
        path = Path(folder) / 'results.json'
        try:
            last = json.loads(path.read_text())
            rows.append([Path(folder).name, *_row(last, 'generated', 'world')])
        except (OSError, ValueError) as error:
            raise UsageError(f'--compare: {path}: {error}') from None
        except KeyError as error:
            raise UsageError(f'--compare: {path}: has no {error}; expected the results of a '
                             'finished evaluation') from None
    rows.append(['real game', *_row(last, 'real', 'game')])
    return '\n'.join(table(head, rows))


def _row(results: dict, kind: str, driven: str) -> list[str]:
    all_, loop = results['obedience']['all'], results['closed_loop']
    real, speed, drift = results['fidelity'], results['speed'], results['drive_drift'][driven]
    made = kind == 'generated'
    suffix = '' if made else '_real'

    def ends(name):
        values = drift[name]
        third = max(len(values) // 3, 1)
        return f'{np.mean(values[:third]):.2f} to {np.mean(values[-third:]):.2f}'

    return [f'{all_[kind]["balanced"]:.2f}', f'{all_[kind]["left"]:.2f}',
            f'{all_[kind]["right"]:.2f}', f'{all_["gain"]:.2f}' if made else '1',
            f'{all_["bias"]:+.2f}' if made else '0',
            f'{loop[driven]["seconds_on_road"]:.1f} of {loop["seconds"]}',
            f'{real["rfd" + suffix]:.2f}', f'{real["seams" + suffix]:.2f}',
            ends('sharpness'), ends('color'), ends('road'),
            str(speed['calls_per_shift']) if made else '', f'{speed["fps"]:.1f}' if made else '']


def table(head, rows) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [head, ['---'] * len(head), *rows]
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in lines] + ['']
