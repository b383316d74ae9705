"""Scripts of keys, and the game under them."""

import dataclasses
from unittest import mock

import jax.numpy as jnp
import numpy as np

from matrix_jax.controls.driving import SYMBOLS
from matrix_jax.data.carracing import CarRacingGame
from matrix_jax.evals import carracing, control, driver, scripted
from matrix_jax.evals.video import indices
from tests.evals.test_video import World


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


class Shown(World):
    """Frames of the size of the game whose grey level is ten times the control they stand under."""

    def stream(self, control_binding):
        plain = super().stream(control_binding)

        def step(params, carry, control):
            carry, frames = plain.step(params, carry, control)
            return carry, jnp.broadcast_to(
                frames[:, :, :1, :1], (*frames.shape[:2], 64, 96, 3)
            ) * 10

        return plain._replace(step=step)


def test_as_played_a_key_shows_after_the_lag_of_its_binding():
    """Known in advance, frames stand under their own keys, wherever keys bind."""
    game = CarRacingGame()
    starts = driver.starts(game, 2, 12)
    for group in (0, 2):
        world = Shown(groups=4, group_frames=1, context=3, head_group=group)
        known = scripted.run(world, None, game, starts, 2, 0)['mixed']
        live = scripted.run_played(world, None, game, starts, 2, 0)['mixed']
        for drives, lag in ((known, 0), (live, group)):
            assert drives.made.shape == drives.real.shape == (2, 9 + 4 * 8, 64, 96, 3)
            assert [len(keys) for keys in drives.keys] == [3 + 8] * 2
            seen = drives.made[:, 9 + 4 * lag :: 4, 0, 0, 0] // 10
            pressed = np.stack([indices(keys)[3 : 11 - lag] for keys in drives.keys])
            np.testing.assert_array_equal(seen, pressed)
        # The game obeys at once; both begin at the same frame.
        np.testing.assert_array_equal(live.made[:, :9], live.real[:, :9])
    start = starts[0]
    place = dataclasses.replace(start, keys=start.keys[:-4])
    frames, _, before = scripted.play(game, place, 3, live.keys[0][3:], mirror=False)
    np.testing.assert_array_equal(live.real[0], frames)
    assert live.keys[0][:3] == before


def test_the_delay_is_that_of_the_turns():
    """A bar that turns with a key, some latent frames late, read by the threshold alone."""
    cfg = carracing.Config()
    keys = [scripted.script('mixed', 200, seed) for seed in range(2)]
    turns = np.concatenate([control.STEER[indices(one)][:-2] for one in keys])

    def read(*given):
        return np.stack([turns, turns], axis=1).astype(np.float32)

    with (
        mock.patch.object(control, 'read', read),
        mock.patch.object(control, 'examples', lambda *given: None),
    ):
        # Steering seen at frame i is that of key i - 2.
        assert carracing.delay(cfg, (None, 0.5), [None] * 2, keys, 2, 7) == 2
