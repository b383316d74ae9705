import jax
import numpy as np

from matrix_jax import config, worlds
from matrix_jax.train.vae import rescaled
from matrix_jax.vae import cogvideox as vae

TINY = vae.Config(latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_groups=2,
                  temporal_compression=2, single_latent_frames=2, sample_height=16,
                  sample_width=24)


def test_rescaled_latents_make_the_same_frames():
    draws = np.random.default_rng(0)
    params = vae.init(TINY, seed=0)
    frames = draws.normal(size=(1, 4, 8, 12, 3)).astype(np.float32)
    std = np.array([0.5, 1, 2, 8], np.float32)
    scaled = rescaled(params, std)
    mean, logvar = jax.jit(lambda p: vae.encode(TINY, p, frames))(params)
    small, small_logvar = jax.jit(lambda p: vae.encode(TINY, p, frames))(scaled)
    np.testing.assert_allclose(small * std, mean, atol=1e-5)
    np.testing.assert_allclose(small_logvar + 2 * np.log(std), logvar, atol=1e-5)
    decode = jax.jit(lambda p, z: vae.decode(TINY, p, z))
    np.testing.assert_allclose(decode(scaled, small), decode(params, mean), atol=1e-4)


def test_the_loss_takes_the_example_of_a_dry_run():
    run = config.load('the_matrix:TINY_VAE', ['--stage.frames', '17'])
    world = worlds.build(run.world)
    example = run.stage.example(world, 3)
    assert example['frames'].shape == (3, 17, 32, 48, 3)
    params = run.stage.start(world, world.shapes(), 0)
    loss, metrics = jax.eval_shape(lambda p, b, k: run.stage.loss(world, p, b, k), params, example,
                                   jax.random.key(0))
    assert loss.shape == () and {one.shape for one in metrics.values()} == {()}
