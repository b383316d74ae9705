"""Matrix-Game 3.0 as a world; the parity tests compare its networks with the reference."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from matrix_jax import config, recipes, video, worlds
from matrix_jax.parallel import sharding
from matrix_jax.pipelines import generate as making
from matrix_jax.vae import wan as vae
from matrix_jax.weights import conversion, converter, diffusers_layout
from matrix_jax.worlds import matrix_game_3

ROOT = Path(__file__).parents[2]


def build(name='TINY', **fields):
    cfg = recipes.load(f'matrix_game_3:{name}').world
    return worlds.build(dataclasses.replace(cfg, **fields))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Random weights of TINY in the released layout."""
    target = tmp_path_factory.mktemp('weights') / 'tiny'
    converter.write_random(build().cfg, str(target), seed=0)
    return target


@pytest.fixture(scope='module')
def world(folder):
    return worlds.describe(build().cfg, folder, whole=True).with_tokenizers(folder)


def generate(folder, out, *options):
    spec = importlib.util.spec_from_file_location('generate', ROOT / 'tools' / 'generate.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(['matrix_game_3:TINY', '--weights', str(folder), '--out', str(out), *options])


@pytest.fixture(scope='module')
def walk(folder, start_image, tmp_path_factory):
    """(file, what the tool said, its player) of a walk; the player has compiled for other tests."""
    players, said = [], io.StringIO()

    class Kept(making.StreamRunner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            players.append(self)

    out = tmp_path_factory.mktemp('walk') / 'walk.mp4'
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(making, 'StreamRunner', Kept)
        generate(
            folder,
            out,
            '--actions',
            'W*12,W+right*17',
            '--iterations',
            '3',
            '--image',
            str(start_image),
            '--prompt',
            'A castle &amp;amp;   a moat',
        )
    return out, said.getvalue(), players[0]


def play(player, actions, prompt='A castle', seed=0):
    """Frames of a stream [F H W 3]; its step is one program, which refuses other shapes."""
    known, steps = player.world.split_controls(actions)
    picture = np.random.default_rng(0).integers(0, 255, (1, 30, 50, 3), np.uint8)
    carry, _ = player.start(prompt, player.world.fit(picture), known, seed)
    carry, frames = player.compile(carry, steps)
    shown = [frames[0]]
    for step in steps[1:]:
        carry, frames = player.step(carry, step)
        shown.append(frames[0])
    return np.concatenate(shown)


def test_the_command_line_makes_a_video(walk):
    out, said, _ = walk
    assert '29 frames' in said
    assert video.read_video(out, fps=17).shape[0] == 29


def test_a_stream_has_a_long_first_segment_and_obeys_keys_prompt_and_seed(walk):
    player, actions = walk[-1], ['W'] * 13 + ['W+right'] * 16
    frames = play(player, actions)
    assert frames.shape == (29, 16, 24, 3) and frames.dtype == np.uint8 and frames.std() > 5
    np.testing.assert_array_equal(frames, play(player, actions))
    other = play(player, ['W'] * 21 + ['left'] * 8)
    np.testing.assert_array_equal(frames[:13], other[:13])
    assert (frames[21:] != other[21:]).any()
    assert (frames != play(player, actions, prompt='A desert')).any()
    assert (frames != play(player, actions, seed=1)).any()


def test_prompts_are_cleaned_and_end_in_zeros(world, walk):
    assert matrix_game_3.clean_prompt(' A &amp;lt;castle&gt;\n in  fog ') == 'A <castle> in fog'
    ids, cut = world.tokenize_and_cut(['A castle', 'x' * 60])
    assert ids.shape == (2, 24) and cut[0] == '' and len(cut[1]) == 60 - 23
    text = np.asarray(world.embed_ids(walk[-1].params, ids))
    assert text.shape == (2, 24, world.cfg.dit.text_dim)
    assert not text[0, 9:].any() and text[0, :9].any(axis=-1).all()


def test_iterations_are_segments():
    world = build('DISTILLED')
    controls, notes = making.plan(world, None, None, 1, None, iterations=12)
    assert len(controls) == 57 + 11 * 40 and not notes
    assert len(making.plan(world, None, 'W', 1, 'hold', iterations=1)[0]) == 57
    with pytest.raises(config.UsageError, match='expected a video of at most 86400 seconds'):
        making.plan(world, None, None, 1, None, iterations=80000)


@pytest.mark.parametrize('seconds, frames', [(1, 57), (3, 57), (4, 97), (60, 1057)])
def test_frames_of_whole_segments(seconds, frames):
    world = build('DISTILLED')
    assert world.controls_for_seconds(seconds) == frames and frames >= 17 * seconds
    known, steps = world.split_controls(['W'] * frames)
    assert known == [] and list(map(len, steps)) == [57] + [40] * ((frames - 57) // 40)


def test_released_sizes():
    lines = {}
    for name in ('DISTILLED', 'LIGHT', 'FULL', 'BASE'):
        world = build(name)
        summary = world.summary(sharding.abstract_mesh(config.Mesh()))
        lines[name] = {
            line.split()[0]: int(line.split()[1].replace(',', '')) for line in summary.splitlines()
        }
        assert lines[name]['transformer'] == 6_469_915_584
        assert lines[name]['text_encoder'] == 5_680_910_336
        assert (world.cfg.height, world.cfg.width) == (704, 1280)
    encoder, decoder = 149_627_776 + 96 * 96 + 96, 555_049_228 + 48 * 48 + 48
    assert lines['FULL']['vae'] == lines['BASE']['vae'] == encoder + decoder
    assert lines['LIGHT']['vae'] == lines['DISTILLED']['vae'] == encoder
    assert lines['LIGHT']['vae_decoder'] == 139_128_972 + 48 * 48 + 48
    assert lines['DISTILLED']['vae_decoder'] == 34_965_580 + 48 * 48 + 48
    assert (build('BASE').cfg.stream.passes, build('DISTILLED').cfg.stream.passes) == (100, 3)


def test_a_folder_as_published_is_read(world, folder, tmp_path, caplog):
    """Parts under their published names, other names of tensors, a config without our keys."""
    for name in ('vae', 'text_encoder'):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / 'google').mkdir()
    (tmp_path / 'google' / 'umt5-xxl').symlink_to(folder / 'tokenizer')
    net_config, tensors = diffusers_layout.read_component(folder, 'transformer')
    del net_config['action_config']['norm_scale']
    tensors = {f'model.{name}': tensors[name] for name in tensors}
    norms = [
        name
        for name in tensors
        if name.endswith(('attn_q_norm.weight', 'attn_k_norm.weight')) and 'action_model' in name
    ]
    tensors |= {name: np.ones_like(tensors[name]) for name in norms}
    diffusers_layout.write_component(
        tmp_path, 'base_distilled_model', net_config, tensors, dtype=None
    )
    light_config, light = diffusers_layout.read_component(folder, 'vae_decoder')
    renames = [
        entry for entry in vae.weights(world.cfg.light) if isinstance(entry, conversion.Rename)
    ]
    others = {}
    for name in light:
        names = {conversion.Rename(entry.known, entry.torch).name(name) for entry in renames} - {
            None
        }
        others[
            next(
                other
                for other in sorted(names)
                if next(filter(None, (entry.name(other) for entry in renames))) == name
            )
        ] = light[name]
    diffusers_layout.write_component(tmp_path, 'vae_decoder', light_config, others, dtype=None)
    with caplog.at_level(logging.WARNING):
        found = worlds.describe(build().cfg, tmp_path, whole=True)
    assert found.cfg == world.cfg and not caplog.messages
    want, made = (
        conversion.flatten(one.load(place)) for one, place in ((world, folder), (found, tmp_path))
    )
    assert all(
        np.array_equal(made[path], want[path])
        for path in want
        if not ('actions' in path and '_norm/' in path)
    )
    assert found.with_tokenizers(tmp_path).tokenize_and_cut(['a'])[0].shape == (1, 24)

    tensors |= {name: 2 * np.ones_like(tensors[name]) for name in norms}
    diffusers_layout.write_component(
        tmp_path, 'base_distilled_model', net_config, tensors, dtype=None
    )
    with caplog.at_level(logging.WARNING):
        found = worlds.describe(build().cfg, tmp_path, whole=True)
    assert found.cfg.dit.actions.norm_scale
    assert len(caplog.messages) == 1 and 'are multiplied by their weights' in caplog.messages[0]
    with pytest.raises(diffusers_layout.CheckpointError, match='no component transformer'):
        worlds.describe(build('TINY_BASE').cfg, tmp_path, whole=True)


def test_the_index_names_every_part(folder):
    index = json.loads((folder / 'model_index.json').read_text())
    assert index['_class_name'] == 'MatrixGame3'
    assert set(index) == {
        '_class_name',
        'transformer',
        'vae',
        'vae_decoder',
        'text_encoder',
        'tokenizer',
    }


def test_attentions_may_multiply_in_8_bits(walk):
    player = walk[-1]
    net = dataclasses.replace(player.world.cfg.dit, int8='attention', int8_truncate=True)
    params = player.world.replace(dit=net).quantize(player.params)
    chosen = {
        path
        for path, leaf in conversion.flatten(params['transformer']).items()
        if type(leaf).__name__ == 'Int8'
    }
    assert {path.split('/')[1] for path in chosen} == {'attention', 'text_attention'}
    assert len(chosen) == 8 * 2  # 4 of each attention in both runs of layers
    assert all(
        leaf.truncate
        for path, leaf in conversion.flatten(params['transformer']).items()
        if path in chosen
    )


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'height': 20}, 'expected positive multiples of'),
        ({'fps': 0}, 'world.fps'),
        ({'dit': dict(actions=None)}, r'world.dit.actions: got None keys .*expected \(6, 2\)'),
        ({'dit': dict(memory=False)}, 'world.dit.memory: got False'),
        ({'dit': dict(camera_channels=24)}, 'world.dit.camera_channels: got 24, expected 96'),
        ({'dit': dict(text_dim=9)}, 'world.dit.text_dim: got 9, expected 16'),
        ({'dit': dict(channels=5)}, r'world.dit.channels: got \[4, 5\]'),
        (
            {'stream': dict(ratio=2, fixed_memory=2, reference_offsets=(0,))},
            'world.stream.ratio: got 2, expected 4',
        ),
    ],
)
def test_bad_configs_are_refused(fields, words):
    cfg = build().cfg
    fields = {
        name: dataclasses.replace(getattr(cfg, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    with pytest.raises(ValueError, match=words):
        build(**fields)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--actions', 'hop*29'], "unknown action 'hop' of matrix_game_3; expected W, S, A, D"),
        (['--actions', 'W*30', '--length', '2'], 'got 30 frames, expected 37; positions 31 to 37'),
        (['--iterations', '2', '--length', '2'], '--iterations and --length: got both'),
        (['--iterations', '9', '--actions', 'W'], 'got 1 frames, expected 77'),
        (['--image', 'none.png'], 'none.png: no such file'),
        ([], 'this world has no start clip: give --video or --image'),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, options, words):
    with pytest.raises(config.UsageError, match=words) as caught:
        generate(folder, tmp_path / 'no.mp4', *options)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())
