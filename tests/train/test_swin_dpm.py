import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes
from matrix_jax.config import UsageError
from matrix_jax.diffusion import schedules
from matrix_jax.stream import swin
from matrix_jax.train.denoise import denoise_loss
from matrix_jax.train.swin_dpm import (
    SwinDPM,
    check_binding_groups,
    controls_before,
    controls_in_play,
    draw_binding_group,
    grouped_levels,
)
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
    stage = SwinDPM(recycle=1.0)

    def seen(denoise):
        error = stage._error(SCHEDULE, denoise, clean, noise, levels)
        return stage._recycled(clean, error, 1, keys[2])

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


def test_slots_after_the_binding_group_hold_its_control():
    controls = jnp.broadcast_to(jnp.arange(9), (3, 9))
    stream = swin.Config(groups=4, group_frames=2, context=1, control_binding='early', head_group=1)
    group = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(
        controls_in_play(stream, controls, group),
        [[0, 1, 2, 2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 4, 4, 4, 4], np.arange(9)],
    )
    np.testing.assert_array_equal(
        controls_before(stream, controls, group),
        [[0] * 9, [0, 1, 2, 2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6, 6, 6]],
    )
    # The same as the stream does at its own binding group.
    known, newest = controls[:1, : stream.known_controls], controls[:1, 3:5]
    np.testing.assert_array_equal(
        swin.bind(stream, known, newest), controls_in_play(stream, controls[:1], stream.lag)
    )


def test_binding_groups_are_drawn_from_the_choice_or_from_the_stream():
    stream = swin.Config(groups=4, group_frames=1, context=1, control_binding='early', head_group=2)
    drawn = draw_binding_group(stream, (0, 1), jax.random.key(0), 64)
    assert set(np.asarray(drawn).tolist()) == {0, 1}
    assert set(np.asarray(draw_binding_group(stream, (), jax.random.key(0), 8)).tolist()) == {2}


@pytest.mark.parametrize('stale', [0.0, 1.0])
def test_stale_frames_are_predictions_under_the_control_before(stale):
    """Only frames from the binding group on carry them, and the targets stay clean."""
    seen = []

    def denoise(params, noisy, levels, text, control):
        seen.append((noisy, levels, control))
        return jnp.zeros_like(noisy)

    cfg = recipes.load('the_matrix:TINY_SWIN').world
    stream = dataclasses.replace(cfg.stream, groups=4, group_frames=1, context=1)
    world = types.SimpleNamespace(
        cfg=dataclasses.replace(cfg, stream=stream),
        schedule=SCHEDULE,
        denoise=denoise,
        empty_ids=np.zeros((1, 2), np.int32),
        embed_ids=lambda params, ids: ids,
        embed_controls=lambda params: jnp.arange(10.0)[:, None],
    )
    latents = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 1))
    batch = {
        'latents': latents,
        'ids': np.ones((2, 2), np.int32),
        'controls': np.array([[1, 2, 3, 4, 5]] * 2, np.int32),
    }
    stage = SwinDPM(control_dropout=0.0, late_binding=1.0, binding_groups=(1,), stale=stale)
    stage.loss(world, {}, batch, jax.random.key(0))
    noisy, levels, control = seen[-1]
    np.testing.assert_array_equal(control[..., 0], [[1, 2, 3, 3, 3]] * 2)
    assert len(seen) == 1 + bool(stale)
    if not stale:
        return
    early, raised, before = seen[0]
    np.testing.assert_array_equal(before[..., 0], [[1, 2, 2, 2, 2]] * 2)
    np.testing.assert_array_equal(raised[:, 1:], np.minimum(levels[:, 1:] + 250, 999))
    assert (np.asarray(levels)[:, 1] >= 125).all()
    predicted = schedules.x0_from_v(SCHEDULE, early, jnp.zeros_like(early), raised)
    signal = jnp.sqrt(SCHEDULE.alphas_cumprod[levels])[..., None, None, None]
    noise_left = noisy - signal * jnp.where(
        (jnp.arange(5) >= 2)[:, None, None, None], predicted, latents
    )
    sigma = jnp.sqrt(1 - SCHEDULE.alphas_cumprod[raised])[..., None, None, None]
    raised_signal = jnp.sqrt(SCHEDULE.alphas_cumprod[raised])[..., None, None, None]
    noise = (early - raised_signal * latents) / sigma
    expected = noise * jnp.sqrt(1 - SCHEDULE.alphas_cumprod[levels])[..., None, None, None]
    np.testing.assert_allclose(noise_left[:, 1:], expected[:, 1:], atol=1e-4)


def test_binding_groups_must_be_groups_of_the_stream():
    stage = SwinDPM(binding_groups=(0, 4))
    with pytest.raises(UsageError, match=r'stage.binding_groups: got \(0, 4\), expected .* 0 to 3'):
        check_binding_groups(stage.binding_groups, swin.Config(groups=4))


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
