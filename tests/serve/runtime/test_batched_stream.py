"""Streams whose network and decoder have devices of their own, and the engine that keeps both busy.

The world here is cheap; tests/stream/test_pipeline.py has a real one.
"""

import functools
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from prometheus_client import generate_latest

from matrix_jax import recipes
from matrix_jax.config import Mesh
from matrix_jax.controls.driving import DrivingVocabulary
from matrix_jax.parallel import sharding, spatial
from matrix_jax.pipelines import generate
from matrix_jax.serve.runtime import session_log
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.engine import Engine, InFlightStep
from matrix_jax.serve.runtime.slot_state import SlotState
from matrix_jax.serve.web.hosted_world import HostedWorld
from matrix_jax.serve.web.metrics import Metrics
from matrix_jax.stream.base import StreamDecoder
from matrix_jax.worlds.the_matrix import World


class Cheap(World):
    """Everything but the queue of latents is a product or a sum."""

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
            cache, y = spatial.split_rows(
                run, {}, cache, latents * params['vae']['decoder']['scale']
            )
            return cache, (jnp.clip(y, 0, 1) * 255).astype(jnp.uint8)

        return StreamDecoder(lambda params, latents: step(params, None, latents), step)


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


def drive(stream):
    """Frames of two players, of whom one rests, changes its prompt and goes back."""
    noise = np.random.default_rng(0)
    size = stream.start_frames, stream.world.cfg.height, stream.world.cfg.width, 3
    for index in range(2):
        cond, _ = stream.condition('a road', noise.integers(0, 255, size).astype(np.uint8))
        stream.write(index, stream.init(cond, seed=index))
    kept, shown = stream.read(1), []
    for step, active in enumerate([(True, True), (True, False), (False, True)]):
        if step == 1:
            stream.set_prompt(0, stream.embed_prompt('snow')[0])
        if step == 2:
            stream.write(1, kept)
        symbols = np.full((2, stream.controls_per_step), step, np.int32)
        shown.append(stream.step(symbols, np.array(active)))
    assert all(np.asarray(finite).all() for _, finite in shown)
    return np.stack([np.asarray(frames) for frames, _ in shown])


@pytest.fixture(scope='module')
def alone():
    stream = BatchedStream(*opened(Mesh()), num_slots=2).compile()
    frames = drive(stream)
    assert frames.std() > 10 and not frames[1, 1].any() and not frames[2, 0].any()
    return stream.fingerprint(), frames


@pytest.mark.parametrize('mesh', [Mesh(seq=2), Mesh(pipeline='5dit_3vae')], ids=str)
def test_places_on_any_devices_show_the_same(mesh, alone):
    stream, compiled = BatchedStream(*opened(mesh), num_slots=2).compile(), []
    assert stream.steps_ahead == bool(mesh.parts)
    first = drive(stream)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    again = drive(stream)
    jax.monitoring.clear_event_listeners()
    assert not compiled and stream.fingerprint() == alone[0]
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

    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def is_ready(self):
        return False

    def __array__(self, *_, **__):
        self.stream.events.append(('frames', self.number))
        return np.full((1, 2, 1, 1, 3), self.number % 256, np.uint8)


class Steps:
    """A stream whose steps are counted."""

    num_slots, frames_per_step, lag, steps_ahead = 1, 2, 0, 1
    world = types.SimpleNamespace(
        cfg=types.SimpleNamespace(fps=1000), vocabulary=DrivingVocabulary()
    )
    idle = np.zeros(1, np.int32)

    def __init__(self):
        self.events, self.steps = [], 0

    def encode(self, control):
        return self.idle

    def step(self, symbols, active):
        self.events.append(('step', self.steps))
        self.steps += 1
        return Frames(self, self.steps - 1), np.ones(1, bool)

    def read_async(self, index):
        return np.array(self.steps)

    def read(self, index):
        self.events.append(('read', self.steps))
        return self.read_async(index)

    def write(self, index, carry):
        self.steps = int(carry)


def test_the_engine_hands_in_a_shift_before_the_last_one_has_its_frames():
    stream, shown, enough = Steps(), [], threading.Event()

    def deliver(frames):
        shown.extend(frame.data for frame in frames)
        if len(shown) >= 12:
            enough.set()

    engine = Engine(stream, lambda frame: int(frame.flat[0]))
    timeline = session_log.Log(
        recipe='',
        fingerprint='',
        num_slots=1,
        together=1,
        control_binding='early',
        prompt='',
        seed=0,
        start='',
    )
    slot = SlotState(0, timeline, deliver, None)
    engine.start()
    engine.call(engine.add, slot, np.array(0)).result(30)
    assert enough.wait(30)
    log, carry = engine.call(engine.snapshot, slot).result(30)
    events = list(stream.events)
    engine.stop()
    assert shown[:12] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # One step is always ahead, never two. A snapshot waits for all frames before it.
    place = {event: index for index, event in enumerate(events)}
    for number in range(5):
        assert place['step', number + 1] < place['frames', number] < place['step', number + 2]
    taken = events.index(('read', int(carry)))
    assert len(log.controls) == carry and ('frames', int(carry) - 1) in events[:taken]
    assert [entry.steps for entry in slot.history][:6] == [
        int(entry.carry) for entry in slot.history
    ][:6]


def test_frames_a_second_are_counted_by_what_lies_between_shifts(monkeypatch):
    """Steps of 1 s each that overlap by half: two frames every half second."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    metrics, stream = Metrics(), Steps()
    engine = Engine(stream, None)
    engine.on_step = functools.partial(
        HostedWorld._record_step, types.SimpleNamespace(metrics=metrics, engine=engine)
    )
    for step in range(12):
        engine._in_flight.append(InFlightStep(0.5 * step, [], np.zeros(1), np.ones(1, bool)))
        now[0] = 0.5 * step + 1
        engine._collect()
    engine._encoder.shutdown()
    text = generate_latest(metrics.registry).decode()
    assert '\nmatrix_jax_step_seconds_sum 12.0' in text
    fps = float(text.split('\nmatrix_jax_world_fps ')[1].split()[0])
    assert 3.5 < fps <= 4
