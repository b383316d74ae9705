"""Tables of `evals.revisit`."""

from __future__ import annotations

from matrix_jax.evals.markdown import table

VARIANTS = {'memory': 'with memory', 'no_memory': 'the same network without memory'}
MEASURES = {
    'turned': 'before and after the turn',
    'start': 'start picture and after the turn',
    'color': 'colour, Delta E',
    'sharpness': 'sharpness / start picture',
}
HEAD = (
    'world',
    'minute',
    'similarity before and after the turn',
    'to the start picture',
    'colour, Delta E',
    'sharpness / start picture',
    'before and after the turn, without memory',
    'VAE dB',
    'calls per step',
    'fps',
)


def report(results: dict) -> str:
    """The whole report."""
    ceiling, cfg, speed = results['ceiling'], results['config'], results['speed']
    rows = [
        [title, minute, *(f'{one[key]:.2f}' for key in MEASURES)]
        for name, title in VARIANTS.items()
        for minute, one in results[name]['visits'].items()
    ]
    for title, key in (
        ('true frames through the VAE (ceiling)', 'similarity'),
        ('start pictures of other places', 'other_places'),
    ):
        rows.append([title, '', f'{ceiling[key]:.2f}', '', '', ''])
    slopes = [
        [title, *(f'{results[name]["returns"]["slope"][key]:+.3f}' for key in list(MEASURES)[1:])]
        for name, title in VARIANTS.items()
    ]
    return '\n'.join(
        [
            *table(('similarity', 'minute', *MEASURES.values()), rows),
            *table(('change per minute at the first pose', *list(MEASURES.values())[1:]), slopes),
            f'{cfg["streams"]} streams, seed {cfg["seed"]}; VAE on held-out frames '
            f'{results["reconstruction"]["psnr"]:.1f} dB. One stream: {speed["fps"]:.1f} frames '
            f'per second on this machine ({speed["calls_per_shift"]} network calls per step).',
            '',
        ]
    )


def row(results: dict, real: bool) -> list[str]:
    """Row of a comparison under `HEAD`; `real` gives that of true frames."""
    if real:
        return ['', f'{results["ceiling"]["similarity"]:.2f}', *[''] * (len(HEAD) - 3)]
    minute, last = list(results['memory']['visits'].items())[-1]
    floor = results['no_memory']['visits'][minute]
    return [
        minute,
        *(f'{last[key]:.2f}' for key in MEASURES),
        f'{floor["turned"]:.2f}',
        f'{results["reconstruction"]["psnr"]:.1f}',
        str(results['speed']['calls_per_shift']),
        f'{results["speed"]["fps"]:.1f}',
    ]
