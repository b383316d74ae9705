"""A world of segments with memory: keys, mouse, prompt, picture, saving and replaying."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from matrix_jax import recipes
from matrix_jax.serve.runtime import replay, session_log
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.weights import converter
from tests.serve.conftest import open_fast

RECIPE = 'matrix_game_3:TINY'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Random weights of this world, with one layer."""
    folder = tmp_path_factory.mktemp('weights') / 'tiny'
    converter.write_random(recipes.load(RECIPE).world, str(folder), seed=0, layers=1)
    return folder


@pytest.fixture(scope='module')
def stream(tiny):
    return BatchedStream(*open_fast(RECIPE, tiny), num_slots=1).compile()


def test_a_player_walks_looks_around_and_says_what_to_see(serving, stream, tiny):
    server = serving()
    player = server.join(prompt='A castle')
    offered = player.welcome['controls']
    assert offered['mouse'] and player.welcome['reads_text']
    assert {'W', 'A', 'S', 'D', 'look left'} <= {button['name'] for button in offered['buttons']}
    player.send(type='keys', id=1, symbol='W+left:0.3')
    while 1 not in player.keys:
        player.read()
    assert player.keys[1] % stream.frames_per_step == 0 and stream.frames_per_step == 8
    player.send(type='keys', id=2, symbol='hop')
    assert "unknown action 'hop'" in player.wait('error')['message']
    file = io.BytesIO()
    Image.new('RGB', (40, 50), (200, 30, 30)).save(file, 'PNG')
    assert player.ask('picture', file.getvalue())[0] == 200
    player.wait('state')
    player.watch(16)
    log = session_log.from_json(json.loads(player.ask('replay')[1]))
    assert log.picture and set(log.controls) == {'W+left:0.3'} and log.prompt == 'A castle'
    status, world = player.ask('world')
    assert status == 200 and player.ask('world', world)[0] == 200
    text = server.http('/metrics')[1].decode()
    assert '\nmatrix_jax_recompilations_total 0.0' in text
    made = np.stack(list(replay.frames(stream.empty_copy(), tiny, log)))
    assert made.shape == (8 * len(log.controls), 16, 24, 3) and made.std() > 3


def test_a_saved_world_continues_with_its_memory(stream):
    """Another slot that gets the carry makes the same frames, retrieved ones included."""
    cfg = stream.world.cfg
    picture = np.random.default_rng(0).integers(0, 255, (1, cfg.height, cfg.width, 3), np.uint8)
    stream.write(0, stream.init(stream.condition('A castle', picture)[0], 3))
    controls, active = stream.encode('W+right')[None], np.ones(1, bool)
    for _ in range(3):
        stream.step(controls, active)
    saved = stream.read(0)
    frames = [np.asarray(stream.step(controls, active)[0]) for _ in range(2)]
    stream.write(0, saved)
    again = [np.asarray(stream.step(controls, active)[0]) for _ in range(2)]
    np.testing.assert_array_equal(frames, again)
    bank = saved[0].bank
    assert int(saved[0].segment) == 4 and bank.latents.shape[1] == cfg.stream.capacity
    assert np.abs(bank.poses[0, 1:10]).max() > 0
