"""Runs of equal layers: names, order, and that they cover every layer once."""

import pytest

from matrix_jax.dit.segments import segments


@pytest.mark.parametrize(
    'chosen, want',
    [
        ((), {'before': (0, 6)}),
        (range(6), {'own': (0, 6)}),
        (range(2), {'own': (0, 2), 'after': (2, 6)}),
        (range(2, 4), {'before': (0, 2), 'own': (2, 4), 'after': (4, 6)}),
        (
            (0, 2, 5),
            {
                'own': (0, 1),
                'between': (1, 2),
                'own_2': (2, 3),
                'between_2': (3, 5),
                'own_3': (5, 6),
            },
        ),
        (
            (1, 3),
            {'before': (0, 1), 'own': (1, 2), 'between': (2, 3), 'own_2': (3, 4), 'after': (4, 6)},
        ),
    ],
)
def test_runs_are_named_and_in_order(chosen, want):
    runs = segments(6, chosen, 'own')
    assert list(runs.items()) == list(want.items())
    layers = [layer for start, stop in runs.values() for layer in range(start, stop)]
    assert layers == list(range(6))
