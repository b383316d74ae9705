"""Scripts of keys, and the game under them."""

import numpy as np

from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.data.carracing import CarRacingGame
from matrix_jax.evals import driver, scripted


def test_scripts_are_of_their_length_and_mixed_ones_hold_every_symbol():
    assert scripted.script('left', 5, 0) == ['DL'] * 5
    mixed = scripted.script('mixed', 240, 1)
    assert len(mixed) == 240 and set(mixed) == set(SYMBOLS)
    assert mixed == scripted.script('mixed', 240, 1) != scripted.script('mixed', 240, 2)


def test_a_mirrored_game_turns_to_the_side_of_its_key():
    game = CarRacingGame()
    (start,) = driver.starts(game, 1, 12)
    plain, states, before = scripted.play(game, start, 3, ['DL'] * 6, mirror=False)
    turned, mirrored, keys = scripted.play(game, start, 3, ['DR'] * 6, mirror=True)
    np.testing.assert_array_equal(turned, plain[:, :, ::-1])
    np.testing.assert_allclose(mirrored[-4:, 1], -states[-4:, 1])
    assert states[-1, 1] > 0 and [scripted.mirrored([key])[0] for key in keys] == before
