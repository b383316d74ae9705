"""A world in one file, as docs/adding_a_world.md builds it, and the commands that run it."""

from __future__ import annotations

import dataclasses
import sys
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from matrix_jax import config, recipes, video, worlds
from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.stream.base import Stream, StreamDecoder, rollout
from matrix_jax.weights import conversion
from matrix_jax.weights.diffusers_layout import CheckpointError
from matrix_jax.worlds.base import BaseWorld
from matrix_jax.worlds.networks import Component
from tests.cli.command import run as run_command

# --- worlds/toy.py -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetConfig:
    """Sizes of the network; `width` comes from the weights folder, `dtype` from the recipe."""

    width: int = 8
    dtype: str = 'float32'

    def to_released(self):
        return {'_class_name': 'ToyNet', 'width': self.width}

    @classmethod
    def from_released(cls, released):
        if released.get('_class_name') != 'ToyNet':
            raise ValueError(f'_class_name: got {released.get("_class_name")}, expected ToyNet')
        return cls(width=released['width'])


class Net(nn.Module):
    """x + W silu(U x + V a): the next latents [B H W C] from the last ones and an action [B A]."""

    cfg: NetConfig

    @nn.compact
    def __call__(self, x, action):
        h = nn.Dense(self.cfg.width, name='embed')(x)
        h = h + nn.Dense(self.cfg.width, name='action')(action)[:, None, None]
        return x + nn.Dense(x.shape[-1], name='out')(nn.silu(h))


def weights(cfg):
    names = ('embed', 'action', 'out')
    kernels = (conversion.Row(f'{name}.weight', f'{name}/kernel', 'o i -> i o') for name in names)
    return (*kernels, *(conversion.Row(f'{name}.bias', f'{name}/bias', 'o -> o') for name in names))


def shapes(cfg):
    x, action = jnp.zeros([1, 1, 1, CHANNELS]), jnp.zeros([1, 6])
    return jax.eval_shape(Net(cfg).init, jax.random.key(0), x, action)['params']


PATCH, CHANNELS = 4, 48  # pixels of a latent, and 3 * PATCH**2


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """One latent frame per step; an action shows at once."""

    frames: ClassVar[int] = 1
    context: ClassVar[int] = 1
    step_frames: ClassVar[int] = 1
    controls_per_step: ClassVar[int] = 1
    control_binding: ClassVar[str] = 'step'
    lag: ClassVar[int] = 0
    passes: ClassVar[int] = 1
    compiled_passes: ClassVar[int] = 1

    def with_control_binding(self, control_binding):
        return self


@dataclasses.dataclass(frozen=True)
class Config:
    dit: NetConfig = NetConfig()
    stream: StreamConfig = StreamConfig()
    clip: None = None
    height: int = 32
    width: int = 48
    fps: int = 4
    mirror: bool = True
    prompt: str = ''
    name: str = 'Toy'


class World(BaseWorld):
    components = (Component('dit', 'transformer', weights, shapes, run_fields=('dtype',)),)
    vocabulary = KeyboardMouseVocabulary('universal')

    def fit(self, frames):
        return video.fit(frames, self.cfg.height, self.cfg.width)

    def inputs(self, prompt, frames, controls=None):
        return (np.asarray(frames)[None],), ''

    def condition(self, params, frames):
        """Latents [B 1 H W C] of pictures uint8 [B 1 H W 3]."""
        layout = 'b t (h p) (w q) c -> b t h w (p q c)'
        return rearrange(self.pixels(frames), layout, p=PATCH, q=PATCH)

    def latents(self, control_binding=None):
        net = Net(self.cfg.dit)

        def step(params, carry, control):
            x = net.apply({'params': params['transformer']}, carry[:, 0], control[:, 0])
            return x[:, None], x[:, None]

        return Stream(lambda params, cond, key: cond, step, step)

    def decoder(self):
        def show(latents):
            layout = 'b t h w (p q c) -> b t (h p) (w q) c'
            return self.to_uint8(rearrange(latents, layout, p=PATCH, q=PATCH))

        return StreamDecoder(
            lambda params, latents: (latents, show(latents)),
            lambda params, last, latents: (latents, show((last + latents) / 2)),
        )

    def decoder_seed(self, cond):
        return cond


# --- configs/toy.py ------------------------------------------------------------------------------

PLAY = config.Run(world=Config())
RECIPES = 'from tests.worlds.test_toy_world import PLAY\n\nDEFAULT = "PLAY"\n'

# --- the line of the registry, and the tests -----------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch, tmp_path):
    monkeypatch.setitem(worlds.REGISTRY, Config, World)
    folder = tmp_path / 'recipes'
    folder.mkdir()
    (folder / 'toy.py').write_text(RECIPES)
    monkeypatch.setattr(recipes, '_folder', lambda: folder)
    # Another test has recipes of this name; loaded ones are kept.
    monkeypatch.delitem(sys.modules, 'matrix_jax_recipes.toy', raising=False)


@pytest.fixture
def folder(tmp_path):
    """Random weights in the diffusers layout."""
    world = worlds.build(Config())
    world.save(tmp_path / 'weights', world.init(0, zero_init=False), dtype=None)
    return tmp_path / 'weights'


def picture():
    return np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8)


def test_a_folder_gives_back_the_world(folder):
    wide = dataclasses.replace(PLAY, world=Config(dit=NetConfig(width=99)), weights=str(folder))
    world, params = worlds.open_run(wide)
    assert world.cfg == Config()  # the folder decides the width
    want = conversion.flatten(worlds.build(Config()).init(0, zero_init=False))
    found = conversion.flatten(params)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name]) for name in want)
    (folder / 'transformer' / 'config.json').write_text('{"_class_name": "Other"}')
    with pytest.raises(CheckpointError, match='got a Other, expected a ToyNet'):
        worlds.describe(Config(), folder)


def test_scan_is_repeated_step_and_actions_steer(folder):
    world, params = worlds.load('toy', str(folder))
    stream, cond = world.stream(), world.condition(params, picture()[None])
    start = stream.init(params, cond, jax.random.key(0))

    def play(words):
        return rollout(stream, params, start, world.vocabulary.encode(words)[:, None, None])[1]

    made, carry = play(['W', 'W', 'A+right']), start
    for word, want in zip(['W', 'W', 'A+right'], made, strict=True):
        carry, frames = jax.jit(stream.step)(params, carry, world.vocabulary.encode([word])[None])
        assert frames.shape == (1, 1, 32, 48, 3) and frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, want)
    other = play(['S', 'W', 'A+right'])
    assert (np.asarray(made[0]) != other[0]).any()


def test_the_command_writes_a_video(folder, tmp_path, capsys):
    image = tmp_path / 'start.png'
    video.write_image(image, picture()[0])
    argv = ['toy', '--weights', folder, '--image', image, '--actions', 'W*4,right*5']
    assert run_command('generate', *argv, '--out', tmp_path / 'toy.mp4') == 0
    assert '9 frames' in capsys.readouterr().out
    assert run_command('generate', *argv[:-1], 'fly', '--out', tmp_path / 'no.mp4') == 2
    assert "unknown action 'fly'" in capsys.readouterr().err


def test_the_command_writes_random_weights(tmp_path):
    assert run_command('convert', '--random', 'toy', tmp_path / 'random') == 0
    assert worlds.load('toy', str(tmp_path / 'random'))[0].cfg == Config()
    assert run_command('convert', '--random', 'toy', tmp_path / 'few', '--layers', 1) == 2


def test_players_share_a_program_and_a_slot_can_be_saved(folder):
    world, params = worlds.load('toy', str(folder))
    slots = BatchedStream(world, params, 2).compile()
    condition, _ = slots.condition('', picture())
    for index in range(2):
        slots.write(index, slots.init(condition, seed=index))
    controls = np.stack([slots.encode('W'), slots.encode('left')])
    frames, finite = slots.step(controls, np.array([True, True]))
    assert frames.shape == (2, 1, 32, 48, 3) and finite.all()
    saved = slots.read(0)
    after = np.asarray(slots.step(controls, np.array([True, False]))[0][0])
    slots.write(1, saved)
    again = np.asarray(slots.step(controls[::-1], np.array([False, True]))[0][1])
    np.testing.assert_array_equal(after, again)
