"""FLOPs of a program, the roofline beside them, and compiling twice."""

import dataclasses
import os
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from matrix_jax import config, recipes, worlds
from matrix_jax.benchmark import compiled, int8, roofline, roofline_cogvideox, roofline_wan
from matrix_jax.benchmark import target as targets
from matrix_jax.nn import conv3d, conv_cpu
from matrix_jax.parallel import sharding
from matrix_jax.train import dry_run
from matrix_jax.vae import cogvideox, wan
from matrix_jax.weights import converter

WIDE = 24  # channels, enough for the detours of the CPU


def test_a_count_follows_the_sizes():
    """Twice the height is twice the decoder; a network of few tokens grows about as much."""
    run = recipes.load('the_matrix:TINY')
    low = compiled.flops_of(run.world)
    high = compiled.flops_of(recipes.load('the_matrix:TINY', ['--world.height', '64']).world)
    assert high['vae'] == pytest.approx(2 * low['vae'], rel=0.02)
    assert 1.7 < high['dit'] / low['dit'] < 2.6
    net = worlds.build(run.world).shapes()['transformer']['steered']['block']['mlp']
    tokens = 9 * 6 + run.world.dit.text_length
    products = 4 * 2 * tokens * np.prod(net['up']['kernel'].shape[1:]) * 2
    assert low['dit'] > products


def test_the_floor_is_what_the_network_multiplies():
    """The recipes of the released size, as derived by hand."""
    cfg = recipes.load('the_matrix:STAGE4').world
    frames = roofline.frames(cfg)
    found = {part: work / frames / 1e12 for part, work in roofline.flops(cfg).items()}
    tokens, video, d = 9 * 30 * 45 + 226, 9 * 30 * 45, 1920
    blocks = 30 * (12 * tokens * d**2 + 2 * tokens**2 * d) + 15 * 2 * video * d**2
    assert found['dit'] == pytest.approx(2 * blocks / frames / 1e12, rel=1e-3)
    assert found == {'dit': pytest.approx(9.2, rel=0.1), 'vae': pytest.approx(6.4, rel=0.1)}
    # As published, keys and values of control are made for every token, and masked.
    literal = roofline_cogvideox.dit(cfg.dit, 9, 60, 90, literal=True) / frames / 1e12
    assert found['dit'] < 0.8 * literal


def test_the_floor_of_keyboard_and_mouse():
    """The published size, as derived by hand: blocks of 3 frames of 22 x 40 sites that see 6."""
    run = recipes.load('matrix_game_2:UNIVERSAL')
    found = roofline.flops(run.world)
    q, k, d, m = 3 * 880, 6 * 880, 1536, 1024
    layer = 6 * q * d**2 + 2 * q * k * d + 2 * q * 257 * d + 2 * q * d * 8960
    acting = q * m * (4 * d + 4 * m + 4 * 6)
    assert found['dit'] == pytest.approx(4 * 2 * (30 * layer + 15 * acting), rel=3e-3)
    assert roofline.frames(run.world) == 12
    # One H200 at 80 % of its data sheet: the figure that the page on performance names.
    assert roofline.bounds(run.world, run.mesh, 791.2e12, 450e9)['fps'] == pytest.approx(150, abs=1)


def test_the_roofline_of_segments_with_memory():
    """The published size, as derived by hand: 14 frames of 22 x 40 sites after 5 memory frames."""
    cfg = recipes.load('matrix_game_3:DISTILLED').world
    q, d, m, text = 19 * 880, 3072, 1024, 512
    layer = 10 * q * d**2 + 2 * q * q * d + 2 * text * d**2 + 2 * q * text * d + 2 * q * d * 14336
    action = q * m * (4 * d + 4 * m + 4 * 19)
    found = roofline.flops(cfg)
    assert found['dit'] == pytest.approx(3 * 2 * (30 * layer + 15 * action), rel=0.02)
    assert roofline.frames(cfg) == 40 and cfg.stream.frames == 19
    base = recipes.load('matrix_game_3:BASE').world
    assert roofline.flops(base)['dit'] == pytest.approx(100 / 3 * found['dit'])


@pytest.mark.parametrize('recipe', ['matrix_game_2:UNIVERSAL', 'matrix_game_2:TEMPLERUN'])
def test_a_count_of_keyboard_and_mouse_is_near_the_floor(recipe):
    """At the published widths, in two layers, of small frames."""
    small = recipes.load(recipe, ['--world.height', '64', '--world.width', '96'])
    cfg = converter.shorten(small.world, layers=2)
    least = roofline.flops(cfg)
    for part, work in compiled.flops_of(cfg).items():
        assert work == pytest.approx(least[part], rel=0.05), part


def test_a_guided_stream_counts_no_guidance_where_it_has_none():
    """Four calls are guided, the one that reads the clean block is not: nine passes."""
    cfg = recipes.load(
        'doom',
        ['--world.height', '32', '--world.width', '48', '--world.stream.action_guidance', '1.5'],
    ).world
    plain = dataclasses.replace(cfg, stream=dataclasses.replace(cfg.stream, action_guidance=1.0))
    guided, plain = (compiled.flops_of(one)['dit'] for one in (cfg, plain))
    assert guided == pytest.approx(9 / 5 * plain, rel=0.01)
    assert plain == pytest.approx(5 * roofline_wan.dit(cfg.dit, 1, 4, 6), rel=0.15)


def test_flops_are_near_the_roofline():
    cfg = recipes.load('the_matrix:TINY', ['--world.height', '64', '--world.width', '96']).world
    work, read = compiled.costs(cfg)
    for part, least in roofline.flops(cfg).items():
        # In so small a network, a tenth is what the roofline leaves out: modulation and controls.
        assert 1 <= work[part] / least < 1.15, part
    assert read['transformer'] > 0 and read['vae'] > 0


def test_what_devices_send_depends_on_whether_heads_divide():
    net = recipes.load('the_matrix:STAGE4').world.dit
    tokens, d = 9 * 1350, 1920
    kind, sent = roofline_cogvideox.exchanged(net, 9, 60, 90, 6)
    assert kind == 'heads' and sent == 30 * 4 * (tokens / 6 + 38) * d * 2 * 5 / 6
    kind, sent = roofline_cogvideox.exchanged(net, 9, 60, 90, 8)
    assert kind == 'keys' and sent == 30 * 2 * (9 * 169 + 29) * d * 2 * 7
    # 12 heads, and 880 sites of which blocks of 3 frames see those of 6.
    net, d = recipes.load('matrix_game_2:UNIVERSAL').world.dit, 1536
    kind, sent = roofline_wan.exchanged(net, 3, 44, 80, 4)
    assert kind == 'heads' and sent == 30 * 2 * (3 + 6) * 220 * d * 2 * 3 / 4
    kind, sent = roofline_wan.exchanged(net, 3, 44, 80, 5)
    assert kind == 'keys' and sent == 30 * 2 * 6 * 176 * d * 2 * 4


def sent_by(jaxpr):
    """Bytes that each device sends in a program that is one `shard_map`, as it is traced."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in equation.params.values():
            inner = getattr(inner, 'jaxpr', inner)
            total += sent_by(inner) if hasattr(inner, 'eqns') else 0
        size = sum(one.aval.size * one.aval.dtype.itemsize for one in equation.outvars)
        if equation.primitive.name == 'ppermute':
            total += size
        elif equation.primitive.name == 'all_gather':
            total += size * (1 - 1 / equation.params['axis_size'])
    return total


MATRIX = dataclasses.replace(
    recipes.load('the_matrix:TINY').world.vae,
    block_out_channels=(4, 8),
    temporal_compression=2,
    single_latent_frames=2,
)


@pytest.mark.parametrize(
    'net, count, cfg, latents',
    [
        (cogvideox, roofline_cogvideox, MATRIX, 2),
        (wan, roofline_wan, wan.PRESETS['tiny'], 3),
        (wan, roofline_wan, dataclasses.replace(wan.PRESETS['tiny'], chunk=1), 2),
    ],
    ids=['the_matrix', 'matrix_game_2', 'chunks'],
)
@pytest.mark.parametrize('parts, dtype', [(6, 'bfloat16'), (5, 'float32')])
def test_rows_that_devices_send_are_those_of_the_program(net, count, cfg, latents, parts, dtype):
    """Of a step that continues a stream; where rows do not divide as well."""
    cfg = dataclasses.replace(cfg, dtype=dtype)
    given = jax.ShapeDtypeStruct((1, latents, 12, 3, cfg.latent_channels), 'float32')
    with jax.set_mesh(sharding.make_mesh(config.Mesh(seq=parts))), conv_cpu.disabled():
        cache, _ = jax.eval_shape(partial(net.prefill, cfg), net.shapes(cfg), given)
        traced = jax.make_jaxpr(partial(net.step, cfg))(net.shapes(cfg), cache, given)
    assert sent_by(traced.jaxpr) == count.bordered(cfg, latents, 12, 3, parts) > 0
    assert count.bordered(cfg, latents, 12, 3, 1) == 0


def test_what_bounds_a_mesh():
    """Uneven rows and tokens leave work to the first device; parts of a pipeline overlap."""
    cfg = recipes.load('the_matrix:STAGE4').world
    work, both = roofline.flops(cfg), [config.Mesh(seq=8), config.Mesh(pipeline='6dit_2vae')]
    whole, split = (roofline.bounds(cfg, mesh, 1e15, 450e9) for mesh in both)
    assert whole['vae']['seconds'] == pytest.approx(work['vae'] * 8 / 60 / 1e15)
    assert whole['dit']['seconds'] == pytest.approx(work['dit'] * 1550 / 12376 / 1e15)
    assert split['vae']['seconds'] == pytest.approx(work['vae'] / 2 / 1e15)
    assert split['fps'] == 8 / (split['vae']['seconds'] + split['vae']['sending'])
    assert whole['fps'] == 8 / sum(
        whole[part][what] for part in work for what in ('seconds', 'sending')
    )
    alone = roofline.bounds(cfg, config.Mesh(), 1e15, 450e9)
    assert alone['fps'] == pytest.approx(8 / (sum(work.values()) / 1e15))
    assert not alone['dit']['bytes'] and not alone['vae']['bytes']


def test_errors_are_relative_and_zero_between_equals():
    want = np.array([3.0, -4.0])
    assert int8.compare(want, want) == {'rms': 0, 'largest': 0, 'cosine': pytest.approx(1)}
    assert int8.compare(want / 2, want) == {'rms': 0.5, 'largest': 0.5, 'cosine': pytest.approx(1)}


def test_a_loop_within_a_loop_of_one_turn_counts():
    def inner(x, w):
        return x @ w, None

    def outer(x, _):
        return jax.lax.scan(inner, x, jnp.ones((5, 8, 8)))[0], None

    for turns in (1, 3):
        work = dry_run.flops(
            lambda x, n=turns: jax.lax.scan(outer, x, length=n)[0], np.ones((8, 8))
        )
        assert work == pytest.approx(turns * 5 * 2 * 8**3, rel=0.05)


@pytest.mark.parametrize(
    'function, taps',
    [(conv3d.conv3d, (3, 3, 3)), (conv3d.upsample_conv2d, (3, 3))],
    ids=['conv3d', 'upsample_conv2d'],
)
def test_a_count_takes_no_detour_of_the_cpu(function, taps):
    """There float32 of many channels is convolved with fewer multiplies; what counts is the plain
    sum, whatever the type."""

    def given(dtype):
        return (
            jax.ShapeDtypeStruct((1, 6, 8, 8, WIDE), dtype),
            jax.ShapeDtypeStruct((*taps, WIDE, WIDE), dtype),
        )

    counted, half = (dry_run.flops(function, *given(dtype)) for dtype in ('float32', 'bfloat16'))
    assert counted == half
    pixels = np.prod(jax.eval_shape(function, *given('float32')).shape[1:4])
    assert 0.8 < counted / (2 * pixels * np.prod(taps) * WIDE**2) <= 1  # without the borders
    taken = jax.jit(function).lower(*given('float32')).cost_analysis()['flops']
    assert taken < 0.7 * counted


def test_the_second_compilation_reads_the_first():
    before = jax.config.jax_compilation_cache_dir
    traced = []

    def build():
        def function(x):
            traced.append(os.listdir(jax.config.jax_compilation_cache_dir))
            return jnp.tanh(x @ x).sum()

        made = jax.jit(function).lower(jnp.ones((8, 8))).compile()
        return types.SimpleNamespace(call=made, seconds=float(len(traced)))

    seconds, built = compiled.compile_seconds(build)
    assert seconds == {'cold': 1, 'cached': 2}
    assert not [name for name in traced[0] if 'function' in name]
    assert [name for name in traced[1] if 'function' in name]
    assert built.call(jnp.ones((8, 8))) == pytest.approx(64 * np.tanh(8))
    assert jax.config.jax_compilation_cache_dir == before


def test_random_parameters_keep_variances_and_lie_where_they_belong():
    world = worlds.build(recipes.load('the_matrix:TINY').world)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1, 1), ('data', 'fsdp', 'tensor', 'seq'))
    params = targets.draw(world, mesh)
    kernel = params['transformer']['steered']['block']['mlp']['up']['kernel']
    assert kernel.std() * kernel.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
    assert set(params['vae']) == {'decoder'}
    np.testing.assert_array_equal(
        targets.draw(world, mesh)['transformer']['out']['kernel'],
        params['transformer']['out']['kernel'],
    )
