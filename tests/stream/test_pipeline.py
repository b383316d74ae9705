"""Network and decoder on two meshes make the same frames as on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.config import Mesh
from matrix_jax.dit.cogvideox import ControlConfig
from matrix_jax.parallel import sharding
from matrix_jax.pipelines.stream_runner import StreamRunner
from matrix_jax.stream import base, pipeline, swin
from matrix_jax.stream.pipeline import Pipeline

SHIFTS = 4


def parts():
    """A stream whose latents count its steps, and a decoder that adds what it decoded before."""

    def init(params, cond, key):
        return jnp.full([1, 6], cond, jnp.float32)

    def step(params, carry, control):
        carry = carry + params['speed'] * control.sum()
        return carry, sharding.constrain(carry, 'batch', 'rows')

    def decode(params, past, latents):
        return past + latents, (past * params['scale'] + latents).astype(jnp.uint8)

    decoder = base.StreamDecoder(
        lambda params, latents: decode(params, 0 * latents, latents), decode
    )
    return {
        'stream': base.Stream(init, step, step),
        'decoder': decoder,
        'decoder_seed': lambda cond: jnp.full([1, 6], cond, jnp.float32),
    }


def run(step, params, carry):
    frames = []
    for shift in range(SHIFTS):
        carry, made = step(params, carry, np.int32([shift, 1]))
        frames.append(made)
    return frames


@pytest.fixture
def placed():
    """Parameters of network and decoder on two meshes."""
    meshes = sharding.make_meshes(Mesh(pipeline='6dit_2vae'))
    return tuple(
        jax.device_put(tree, sharding.replicated(mesh))
        for tree, mesh in zip([{'speed': 2.0}, {'scale': 3.0}], meshes)
    )


def test_only_latents_move_and_nothing_compiles_after_the_start(placed, monkeypatch):
    chained, params = base.chain(**parts()), {'speed': 2.0, 'scale': 3.0}
    wanted = run(jax.jit(chained.step), params, chained.init(params, 5.0, None))
    crossed, compiled, put = [], [], jax.device_put

    def seen(x, place):
        crossed.append((x.shape, x.sharding.is_fully_replicated, len(place.device_set)))
        return put(x, place)

    made = Pipeline(**parts(), params=placed)
    monkeypatch.setattr(jax, 'device_put', seen)
    carry = made.init(placed[0], 5.0, None)
    made.compile(placed[0], carry, np.int32([0, 1]))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    frames = run(made.step, placed[0], carry)
    jax.monitoring.clear_event_listeners()
    assert not compiled
    assert crossed == [((1, 6), True, 2)] * (1 + SHIFTS)
    for one, other in zip(frames, wanted, strict=True):
        assert one.sharding.device_set == set(jax.devices()[6:])
        np.testing.assert_array_equal(one, other)


def test_a_longer_first_step_fills_the_decoder(placed):
    """The first output has another shape; `init` makes it if it is given its control."""
    made = parts()

    def prefill(params, carry, control):
        return carry + params['speed'] * control.sum(), jnp.concatenate([carry, carry + 1])

    decoder = made['decoder']._replace(
        prefill=lambda params, latents: (latents[1:], (latents * params['scale']).astype(jnp.uint8))
    )
    given = {
        'stream': made['stream']._replace(prefill=prefill),
        'decoder': decoder,
        'decoder_seed': None,
    }
    params, first = {'speed': 2.0, 'scale': 3.0}, np.int32([1, 1])
    alone = base.chain(**given)
    carry, want = jax.jit(alone.prefill)(params, alone.init(params, 5.0, None), first)
    wanted = run(jax.jit(alone.step), params, carry)

    two = Pipeline(**given, params=placed)
    start = two.init(placed[0], 5.0, None)
    assert start.shape == (1, 6)
    carry, frames = two.prefill(placed[0], start, first)
    np.testing.assert_array_equal(frames, want)
    filled = Pipeline(**given, params=placed, first_control=first)
    starts = ((two, carry), (filled, filled.init(placed[0], 5.0, None)))
    for made, begun in starts:
        for one, other in zip(run(made.step, placed[0], begun), wanted, strict=True):
            assert one.sharding.device_set == set(jax.devices()[6:])
            np.testing.assert_array_equal(one, other)


def test_no_more_steps_are_in_flight_than_allowed(placed, monkeypatch):
    made, events = Pipeline(**parts(), params=placed, ahead=2), []
    wait = jax.block_until_ready
    monkeypatch.setattr(
        pipeline.jax,
        'block_until_ready',
        lambda frames: events.append(('waited', frames)) or wait(frames),
    )
    carry = made.init(placed[0], 5.0, None)
    for shift in range(SHIFTS):
        carry, frames = made.step(placed[0], carry, np.int32([shift, 1]))
        events.append(('sent', frames))
    assert [name for name, _ in events] == ['sent', 'sent', 'waited', 'sent', 'waited', 'sent']
    assert events[2][1] is events[0][1] and events[4][1] is events[1][1]


def real_world():
    """A small world; its ten rows of latents do not divide by the devices of the decoder."""
    cfg = recipes.load('the_matrix:TINY').world
    net = dataclasses.replace(cfg.dit, layers=1, control=ControlConfig(dim=16, start=0, end=1))
    vae = dataclasses.replace(
        cfg.vae,
        block_out_channels=(4, 8),
        layers_per_block=0,
        temporal_compression=2,
        single_latent_frames=2,
    )
    return worlds.build(dataclasses.replace(cfg, dit=net, vae=vae, height=20, width=8))


def test_frames_of_a_pipeline_equal_those_of_one_device():
    world = real_world()
    drawn, cfg = world.init(0, zero_init=False), world.cfg.stream
    noise = np.random.default_rng(0)
    cond = swin.Cond(
        *(
            jnp.asarray(noise.normal(size=shape).astype(np.float32))
            for shape in ((1, cfg.frames, 10, 4, 4), (1, 12, 16), (10, 16))
        ),
        jnp.zeros((1, cfg.known_controls), int),
    )
    placed = world.device_put(drawn, *sharding.make_meshes(Mesh(pipeline='5dit_3vae')))
    network, decoder = world.split_decoder(placed)
    assert world.split_decoder(drawn) == (drawn, None)
    made = Pipeline(**world.stages(), params=(network, decoder))
    alone, key = world.stream(), jax.random.key(0)
    mesh = jax.tree.leaves(network)[0].sharding.mesh
    cond_there = jax.device_put(cond, sharding.replicated(mesh))
    frames = []
    for init, step, params, given in (
        (made.init, made.step, network, cond_there),
        (jax.jit(alone.init), jax.jit(alone.step), drawn, cond),
    ):
        carry, shown = init(params, given, key), []
        for shift in range(3):
            carry, made_now = step(params, carry, np.full((1, cfg.group_frames), shift, np.int32))
            shown.append(made_now)
        frames.append(np.stack([np.asarray(one) for one in shown]).astype(int))
    assert frames[0].shape == (3, 1, 2 * cfg.group_frames, 20, 8, 3) and np.std(frames[1]) > 10
    # Rounding to whole grey levels can amplify the last bit of a float.
    assert np.abs(frames[0] - frames[1]).max() <= 1
    assert (frames[0] != frames[1]).mean() < 0.01


@pytest.mark.parametrize(
    'recipe, part, actions',
    [('matrix_game_2:TINY', 'vae', 33), ('matrix_game_3:TINY', 'vae_decoder', 29)],
)
def test_a_longer_first_output_on_two_meshes(recipe, part, actions):
    """Blocks of Matrix-Game 2.0, and segments of Matrix-Game 3.0 with a light decoder."""
    cfg = recipes.load(recipe).world
    world = worlds.build(cfg).shortened(1).with_tokenizers(None)
    drawn = world.init(0, zero_init=False)
    placed = world.device_put(drawn, *sharding.make_meshes(Mesh(pipeline='2dit_3vae')))
    network, decoder = world.split_decoder(placed)
    assert list(decoder) == [part] and 'decoder' not in network[part]
    picture = np.random.default_rng(0).integers(0, 255, (1, 16, 24, 3), np.uint8)
    made = []
    for params in (placed, drawn):
        runner = StreamRunner(world, params)
        known, steps = world.split_controls(['W+right'] * actions)
        carry, _ = runner.start('A castle', picture, known, seed=0)
        carry, first = runner.compile(carry, steps)
        shown = [first]
        for step in steps[1:]:
            carry, frames = runner.step(carry, step)
            shown.append(frames)
        made.append([np.asarray(frames)[0].astype(int) for frames in shown])
    pipelined, alone = (np.concatenate(frames) for frames in made)
    assert pipelined.shape == (actions, 16, 24, 3) and alone.std() > 5
    assert np.abs(pipelined - alone).max() <= 1 and (pipelined != alone).mean() < 0.01
