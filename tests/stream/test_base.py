import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.stream import base


def counting():
    """A stream whose latents count its steps, scaled by the control."""

    def init(params, cond, key):
        return jnp.int32(cond)

    def step(params, carry, control):
        latents = params * (carry * 10 + control)[..., None, None, None].astype(jnp.float32)
        return carry + 1, latents

    return base.Stream(init, step, step)


def decoder():
    """Doubles time, and adds the last latent, which is its cache, to the next frames."""

    def decode(last, latents):
        return latents[:, -1:], jnp.repeat(latents, 2, axis=1) + last

    return base.StreamDecoder(
        lambda params, latents: decode(0.0, latents),
        lambda params, cache, latents: decode(cache, latents),
    )


def test_a_prefilled_stream_has_made_and_dropped_its_first_output():
    stream, first = base.chain(counting(), decoder()), np.array([[5, 6]])
    live = base.prefilled(stream, first)
    assert stream.prefill is not stream.step is live.step is live.prefill
    assert base.prefilled(live, first) is live
    want, _ = stream.prefill(1.0, stream.init(1.0, 0, None), first)
    got = live.init(1.0, 0, None)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))
    assert not all(
        map(
            np.array_equal,
            jax.tree.leaves(got),
            jax.tree.leaves(base.prefilled(stream, 1 + first).init(1.0, 0, None)),
        )
    )


def test_chain_decodes_what_the_latent_stream_makes():
    latents, frames = counting(), base.chain(counting(), decoder())
    controls = np.arange(8).reshape(4, 1, 2)
    _, expected = base.rollout(latents, 1.0, latents.init(1.0, 0, None), controls)
    expected = np.asarray(base.join(expected))
    carry, first = frames.prefill(1.0, frames.init(1.0, 0, None), controls[0])
    carry, rest = jax.jit(lambda carry: base.rollout(frames, 1.0, carry, controls[1:]))(carry)
    got = np.concatenate([first, base.join(rest)], axis=1)
    last = np.concatenate([0 * expected[:, :1], expected[:, 1:-1:2]], axis=1)
    assert np.array_equal(got, np.repeat(expected, 2, axis=1) + np.repeat(last, 4, axis=1))
    assert carry[0] == 4


def test_a_seeded_decoder_makes_every_step_alike():
    frames = base.chain(
        counting(), decoder(), decoder_seed=lambda cond: jnp.full([1, 1, 1, 1, 1], cond)
    )
    assert frames.prefill is frames.step
    carry, first = frames.step(1.0, frames.init(1.0, 7, None), np.array([[1]]))
    assert first[0, :, 0, 0, 0].tolist() == [78, 78] and carry[0] == 8


@pytest.mark.parametrize('steps', [1, 3])
def test_rollout_is_step_by_step(steps):
    stream, controls = counting(), np.ones([steps, 1, 2], np.int32)
    carry, outputs = base.rollout(stream, 2.0, stream.init(2.0, 0, None), controls)
    again = stream.init(2.0, 0, None)
    for index in range(steps):
        again, output = stream.step(2.0, again, controls[index])
        assert np.array_equal(output, outputs[index])
    assert carry == again
