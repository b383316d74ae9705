import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes
from matrix_jax.diffusion import schedules
from matrix_jax.stream import swin
from matrix_jax.train.denoise import denoise_loss
from matrix_jax.train.swin_dpm import SwinDPM, controls_in_play, grouped_levels
from matrix_jax.train.vae import Autoencode

SCHEDULE = schedules.make(schedules.SchedulerConfig())


def test_levels_climb_from_group_to_group():
    levels = grouped_levels(jnp.array([0, 249]), 4, 2, jnp.array([[0], [7]]))
    np.testing.assert_array_equal(
        levels,
        [[0, 0, 0, 250, 250, 500, 500, 750, 750], [7, 249, 249, 499, 499, 749, 749, 999, 999]],
    )


def test_the_published_loss_is_a_plain_error_of_v():
    keys = jax.random.split(jax.random.key(0), 3)
    clean, noise, guess = (jax.random.normal(key, (2, 3, 2, 2, 4)) for key in keys)
    levels = jnp.array([[0, 250, 999], [10, 600, 700]])
    counted = jnp.array([0.0, 1.0, 1.0])
    loss, aux = denoise_loss(SCHEDULE, lambda x, t: guess, clean, noise, levels, counted)
    target = schedules.velocity(SCHEDULE, clean, noise, levels)
    np.testing.assert_allclose(loss, jnp.square(guess - target)[:, 1:].mean(), rtol=1e-4)
    perfect, _ = denoise_loss(SCHEDULE, lambda x, t: target, clean, noise, levels, counted)
    assert float(perfect) < 1e-9
    np.testing.assert_allclose(aux['x0'].shape, clean.shape)


def test_recycling_puts_own_errors_on_condition_frames_only():
    keys = jax.random.split(jax.random.key(1), 3)
    clean, noise = (jax.random.normal(key, (32, 5, 2, 2, 1)) for key in keys[:2])
    levels = jnp.broadcast_to(jnp.array([0, 100, 350, 600, 850]), (32, 5))

    def seen(denoise):
        return SwinDPM(recycle=1.0)._recycled(SCHEDULE, denoise, clean, noise, levels, 1, keys[2])

    target = schedules.velocity(SCHEDULE, clean, noise, levels)
    np.testing.assert_allclose(seen(lambda x, t: target), clean, atol=1e-4)
    wrong = seen(lambda x, t: target + 1)
    np.testing.assert_array_equal(wrong[:, 1:], clean[:, 1:])
    moved = np.any(np.abs(wrong[:, 0] - clean[:, 0]) > 1e-3, axis=(1, 2, 3))
    assert 6 < moved.sum() < 26  # half of the samples


@pytest.mark.parametrize(
    'path, alone, together',
    [
        ('transformer/patch/kernel', True, True),
        ('text_encoder/embedding', False, True),
        ('control_encoder/projection/kernel', False, True),
        ('vae/encoder/conv_in/kernel', False, False),
    ],
)
def test_what_trains(path, alone, together):
    assert SwinDPM().trainable(path) is alone
    assert SwinDPM(train_encoders=True).trainable(path) is together


def test_a_decoder_can_train_alone():
    assert not Autoencode(train_encoder=False).trainable('vae/encoder/conv_in/kernel')
    assert Autoencode(train_encoder=False).trainable('vae/decoder/conv_in/kernel')
    assert Autoencode().trainable('vae/encoder/conv_in/kernel')


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: SwinDPM(control_dropout=1.5), 'stage.control_dropout: got 1.5'),
        (lambda: SwinDPM(condition_noise=250), 'stage.condition_noise: got 250'),
        (lambda: SwinDPM(recycle=-1.0), 'stage.recycle: got -1'),
        (lambda: Autoencode(frames=12), 'stage.frames: got 12'),
        (lambda: Autoencode(ema=1.0), 'stage.ema: got 1'),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_late_binding_holds_the_control_of_the_entry_slot():
    controls = jnp.arange(9)[None]
    stream = swin.Config(groups=4, group_frames=2, context=1, control_binding='early', head_group=1)
    np.testing.assert_array_equal(controls_in_play(stream, controls), [[0, 1, 2, 3, 4, 4, 4, 4, 4]])
    tail = swin.Config(groups=4, group_frames=2, context=1)
    np.testing.assert_array_equal(controls_in_play(tail, controls), controls)


def test_groups_are_as_wide_as_the_batch():
    run, seen = recipes.load('the_matrix:STAGE3'), {}

    def denoise(params, noisy, levels, text, control):
        seen['levels'] = levels
        return jnp.zeros_like(noisy)

    world = types.SimpleNamespace(
        cfg=run.world,
        schedule=SCHEDULE,
        denoise=denoise,
        empty_ids=np.zeros((1, 2), np.int32),
        embed_ids=lambda params, ids: ids,
        embed_controls=lambda params: jnp.ones((10, 1)),
    )
    assert run.stage.lengths(world) == (9, 17) and SwinDPM().lengths(world) == (17,)
    for frames in run.stage.lengths(world):
        batch = {
            'latents': np.zeros((1, frames, 2, 2, 1), np.float16),
            'ids': np.ones((1, 2), np.int32),
            'controls': np.zeros((1, frames), np.int32),
        }
        run.stage.loss(world, {}, batch, jax.random.key(0))
        steps = np.diff(np.asarray(seen['levels'])[0, 1:])
        np.testing.assert_array_equal(np.flatnonzero(steps) + 1, frames // 4 * np.arange(1, 4))
    with pytest.raises(ValueError, match='got 21, which is 6 latent frames, expected context = 1'):
        SwinDPM(clip_frames=(33, 21)).lengths(world)
