"""Places of players whose network and decoder lie on devices of their own, and the engine that
keeps both busy. The world here is cheap; tests/stream/test_pipeline.py has a real one."""

import functools
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from matrix_jax import recipes
from matrix_jax.config import Mesh
from matrix_jax.controls.driving import DrivingVocabulary
from matrix_jax.parallel import sharding, spatial
from matrix_jax.pipelines import generate
from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.runtime.batched_stream import Slots
from matrix_jax.serve.runtime.engine import Engine, Flight, Seat
from matrix_jax.serve.web import app
from matrix_jax.serve.web.metrics import Meters
from matrix_jax.stream.base import Decoder
from matrix_jax.worlds.the_matrix import World


class Cheap(World):
    """Everything but the queue of latents is a product or a sum."""

    made_ready = 0

    def precompute(self, params):
        self.made_ready += 1
        return params

    def embed_ids(self, params, ids):
        return ids[..., None] * params['text_encoder']['scale']

    def embed_controls(self, params):
        return jnp.arange(10.0)[:, None] * jnp.ones([1, 16])

    def encode_frames(self, params, frames):
        small = frames[:, ::4, ::8, ::8].astype(jnp.float32) / 255
        return jnp.concatenate([small, small[..., :1]], axis=-1) * params['vae']['encoder']['scale']

    def denoise(self, params, x, level, text, control):
        steered = control.mean(-1) + text.mean((1, 2))[:, None] / 64
        return x * params['transformer']['scale'] + steered[..., None, None, None] / 8

    def decoder(self):
        def run(params, past, x):
            y = x if past is None else x + past
            y = repeat(y[..., :3], 'b t h w c -> b (t f) (h p) (w q) c', f=4, p=8, q=8)
            return x[:, -1:], y

        def step(params, cache, latents):
            cache, y = spatial.split(run, {}, cache, latents * params['vae']['decoder']['scale'])
            return cache, (jnp.clip(y, 0, 1) * 255).astype(jnp.uint8)

        return Decoder(lambda params, latents: step(params, None, latents), step)


def opened(mesh):
    """(world, params) on a mesh; of three devices of the decoder, the last has no row."""
    world = Cheap(recipes.load('the_matrix:TINY').world).with_tokenizers(None)
    network, decoder = map(sharding.replicated, sharding.make_meshes(mesh))
    scale = {'scale': np.float32(0.5)}
    params = jax.device_put({'transformer': scale, 'text_encoder': scale}, network)
    return world, params | {
        'vae': {
            'encoder': jax.device_put(scale, network),
            'decoder': jax.device_put(scale, decoder),
        }
    }


def drive(slots):
    """Frames of two players, of whom one rests, changes its prompt and goes back."""
    noise = np.random.default_rng(0)
    size = slots.start_frames, slots.world.cfg.height, slots.world.cfg.width, 3
    for index in range(2):
        cond, _ = slots.condition('a road', noise.integers(0, 255, size).astype(np.uint8))
        slots.write(index, slots.begin(cond, seed=index))
    kept, shown = slots.read(1), []
    for shift, active in enumerate([(True, True), (True, False), (False, True)]):
        if shift == 1:
            slots.retext(0, slots.embed('snow')[0])
        if shift == 2:
            slots.write(1, kept)
        symbols = np.full((2, slots.group), shift, np.int32)
        shown.append(slots.step(symbols, np.array(active)))
    assert all(np.asarray(finite).all() for _, finite in shown)
    return np.stack([np.asarray(frames) for frames, _ in shown])


@pytest.fixture(scope='module')
def alone():
    slots = Slots(*opened(Mesh()), count=2).compile()
    frames = drive(slots)
    assert frames.std() > 10 and not frames[1, 1].any() and not frames[2, 0].any()
    return slots.fingerprint(), frames


@pytest.mark.parametrize('mesh', [Mesh(seq=2), Mesh(pipeline='5dit_3vae')], ids=str)
def test_places_on_any_devices_show_the_same(mesh, alone):
    slots, compiled = Slots(*opened(mesh), count=2).compile(), []
    assert slots.ahead == bool(mesh.parts)
    first = drive(slots)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    again = drive(slots)
    jax.monitoring.clear_event_listeners()
    assert not compiled and slots.fingerprint() == alone[0]
    assert slots.world.made_ready == 1  # not per player, nor per step
    for frames in (first, again):
        assert (np.abs(frames.astype(int) - alone[1]) <= 1).all()
        assert (frames != alone[1]).mean() < 0.01


def test_a_video_on_any_devices_is_the_same(start_image):
    made = []
    for mesh in (Mesh(), Mesh(pipeline='6dit_2vae')):
        frames, _ = generate.generate(*opened(mesh), folder='', length=1, image=str(start_image))
        made.append(np.stack(list(frames)).astype(int))
    assert made[0].shape[0] == 16 and made[0].std() > 10
    assert np.abs(made[1] - made[0]).max() <= 1


class Frames:
    """What a step gives: nothing looks at it before the next step, if that may come first."""

    def __init__(self, slots, number):
        self.slots, self.number = slots, number

    def is_ready(self):
        return False

    def __array__(self, *_, **__):
        self.slots.events.append(('frames', self.number))
        return np.full((1, 2, 1, 1, 3), self.number % 256, np.uint8)


class Steps:
    """A place whose steps are counted."""

    count, group, frames, lag, ahead = 1, 1, 2, 0, 1
    world = types.SimpleNamespace(cfg=types.SimpleNamespace(fps=1000), vocabulary=DrivingVocabulary())
    idle = np.zeros(1, np.int32)

    def __init__(self):
        self.events, self.steps = [], 0

    def encode(self, control):
        return self.idle

    def step(self, symbols, active):
        self.events.append(('step', self.steps))
        self.steps += 1
        return Frames(self, self.steps - 1), np.ones(1, bool)

    def peek(self, index):
        return np.array(self.steps)

    def read(self, index):
        self.events.append(('read', self.steps))
        return self.peek(index)

    def write(self, index, carry):
        self.steps = int(carry)


def test_the_engine_hands_in_a_shift_before_the_last_one_has_its_frames():
    slots, shown, enough = Steps(), [], threading.Event()

    def deliver(pictures):
        shown.extend(picture.data for picture in pictures)
        if len(shown) >= 12:
            enough.set()

    engine = Engine(slots, lambda frame: int(frame.flat[0]))
    timeline = session_log.Log(
        recipe='', fingerprint='', slots=1, together=1, entry='early', prompt='', seed=0, start=''
    )
    seat = Seat(0, timeline, deliver, None)
    engine.start()
    engine.seat(seat, np.array(0)).result(30)
    assert enough.wait(30)
    log, carry = engine.moment(seat).result(30)
    events = list(slots.events)
    engine.stop()
    assert shown[:12] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # One shift is always ahead, never two; but for the moment, which all frames come before.
    place = {event: index for index, event in enumerate(events)}
    for number in range(5):
        assert place['step', number + 1] < place['frames', number] < place['step', number + 2]
    taken = events.index(('read', int(carry)))
    assert len(log.symbols) == carry and ('frames', int(carry) - 1) in events[:taken]
    assert [moment.shifts for moment in seat.past][:6] == [
        int(moment.carry) for moment in seat.past
    ][:6]


def test_frames_a_second_are_counted_by_what_lies_between_shifts(monkeypatch):
    """Shifts of 1 s each that overlap by half: two frames every half second."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    meters, slots = Meters(), Steps()
    engine = Engine(slots, None)
    engine.observe = functools.partial(
        app.Server._observe, types.SimpleNamespace(meters=meters, engine=engine)
    )
    for shift in range(12):
        engine._flying.append(Flight(0.5 * shift, [], np.zeros(1), np.ones(1, bool)))
        now[0] = 0.5 * shift + 1
        engine._land(now[0])
    engine._encoder.shutdown()
    text = meters.text()[0].decode()
    assert '\nmatrix_jax_step_seconds_sum 12.0' in text
    fps = float(text.split('\nmatrix_jax_world_fps ')[1].split()[0])
    assert 3.5 < fps <= 4
