"""train/flow_matching.py, ode.py, dmd.py: what learns, from what, and by the stream's own calls."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.diffusion import flow
from matrix_jax.stream import causal
from matrix_jax.train import optim
from matrix_jax.train.dmd import TOWER, SelfForcing, ended, truncated
from matrix_jax.train.flow_matching import CausalFlow, FlowMatching, flow_loss
from matrix_jax.train.ode import ODEPairs, path
from matrix_jax.weights import conversion

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
KEY = jax.random.key(1)


class Toy:
    """Stands in for a world: a network of two numbers, which keeps the mean of each block."""

    def __init__(self, steps=(1000, 500)):
        self.cfg = types.SimpleNamespace(
            flow=flow.Config(shift=2.0), stream=causal.Config(frames=3, steps=steps, window=1)
        )
        self.tables = {name: () for name in FlowMatching.components}
        self.vocabulary = types.SimpleNamespace(idle='', encode=lambda words: np.zeros((1, 6)))

    def denoise(self, params, x, level, cond, actions, block=None):
        p = params['transformer']
        told = cond.latents[..., :1] + cond.image.mean() + actions.mean()
        return jnp.tanh(p['mix'] * x + told + level[..., None, None, None] / 1000)

    def image_features(self, params, pictures):
        return pictures.astype(jnp.float32).mean(axis=(2, 3)) / 255

    def latents(self, change=lambda net: net, table=None):
        def denoise(params, caches, x, level, cond, actions):
            p = params['transformer']
            v = jnp.tanh(
                p['mix'] * x
                + p['past'] * caches[0]
                + cond[..., :1]
                + actions.mean()
                + level[..., None, None, None] / 1000
            )
            return v, (caches[0], x.mean())

        net = causal.CachedNetwork(
            denoise,
            lambda params, cond: (jnp.zeros(()),) * 2,
            lambda caches, frames: (caches[1], caches[1]),
            3,
            6,
        )
        return causal.make(self.cfg.stream, self.cfg.flow, change(net), table)


@pytest.fixture(scope='module')
def toy():
    draws = np.random.default_rng(0)
    shapes = {'latents': (6, 2, 2, 3), 'condition': (6, 2, 2, 4), 'actions': (21, 6)}
    batch = {
        name: draws.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()
    }
    batch['picture'] = draws.integers(0, 256, (2, 8, 12, 3), np.uint8)
    params = {
        'transformer': {'mix': np.float32(0.6), 'past': np.float32(0.3)},
        'image_encoder': {},
        'vae': {},
    }
    return Toy(), params, batch


def sizes(grads):
    return {
        name: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(part))
        for name, part in grads.items()
    }


@pytest.mark.parametrize('name', ['FOUNDATION', 'CAUSAL', 'ODE', 'DMD'])
def test_every_stage_fits_a_world(name):
    run = recipes.load(f'matrix_game_2:TINY_{name}')
    world = worlds.build(run.world)
    params = run.stage.start(world, world.shapes(), 0)
    loss, _ = jax.eval_shape(
        functools.partial(run.stage.loss, world), params, run.stage.example(world, 2), KEY
    )
    assert loss.shape == () and loss.dtype == np.float32
    paths = conversion.flatten(params)
    trained = {path.split('/')[0] for path in paths if run.stage.trainable(path)}
    assert trained == {'transformer'} | {'FOUNDATION': {'image_encoder'}, 'DMD': {'critic'}}.get(
        name, set()
    )
    assert set(run.stage.axes(world)) >= {path for path in paths if run.stage.trainable(path)}


def test_history_is_clean_and_does_not_count(toy):
    world, params, batch = toy
    clean, given = batch['latents'], FlowMatching().condition(world, params, batch)
    entry, history = jnp.full((2, 6), 300), jnp.arange(6) < jnp.array([[3], [0]])
    seen = []

    def denoise(params, x, level, *given):
        seen.append((x, level, given[2]))
        return jnp.zeros_like(x)

    watched = types.SimpleNamespace(cfg=world.cfg, denoise=denoise)
    loss = flow_loss(watched, params, clean, given, batch['actions'], entry, KEY, 3, history)
    x, level, block = seen[0]
    table, noise = flow.table(world.cfg.flow), jax.random.normal(KEY, clean.shape)
    np.testing.assert_array_equal(x[0, :3], clean[0, :3])
    assert not np.any(level[0, :3]) and np.all(level[0, 3:] == table.levels[300]) and block == 3
    error = np.square(noise - clean).mean(axis=(2, 3, 4))
    want = table.weights[300] * (error[0, 3:].sum() + error[1].sum()) / 9
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    flow_loss(watched, params, clean, given, batch['actions'], entry, KEY, 3, history, 0.5)
    np.testing.assert_allclose(seen[1][0][0, :3], (clean + noise)[0, :3] / 2, atol=1e-6)


def test_blocks_have_levels_of_their_own(toy):
    world, params, batch = toy
    levels = []
    watched = types.SimpleNamespace(
        cfg=world.cfg,
        image_features=world.image_features,
        denoise=lambda params, x, level, *given: levels.append(np.asarray(level)) or x,
    )
    for seed in range(8):
        CausalFlow(clip_frames=21).loss(watched, params, batch, jax.random.key(seed))
    drawn = np.concatenate(levels).reshape(-1, 2, 3)
    assert np.all(drawn == drawn[..., :1]) and len(np.unique(drawn[:, 1, 0])) > 9
    assert 0 < np.sum(drawn[:, 0, 0] == 0) < len(drawn) and np.all(drawn[:, 1] > 0)


def test_blocks_are_told_what_a_stream_tells_them(toy):
    world, params, batch = toy
    stream = dataclasses.replace(world.cfg.stream, condition_on_last_frame=True)
    cfg, seen = types.SimpleNamespace(flow=world.cfg.flow, stream=stream), []
    watched = types.SimpleNamespace(
        cfg=cfg,
        image_features=world.image_features,
        denoise=lambda params, x, level, cond, *given: seen.append(np.asarray(cond.latents)) or x,
    )
    for stage in (CausalFlow(clip_frames=21), CausalFlow(clip_frames=21, history_noise=0.5)):
        stage.loss(watched, params, batch, KEY)
    want = causal.condition_blocks(stream, batch['condition'], batch['latents'])
    np.testing.assert_allclose(seen[0], want, atol=1e-6)
    # A stream's own work is never clean: later blocks are told a noisy frame, not so the first.
    np.testing.assert_allclose(seen[1][:, :3], want[:, :3], atol=1e-6)
    assert np.abs(seen[1] - want)[:, 3:].max() > 0.1


def test_a_clip_has_whole_blocks(toy):
    with pytest.raises(ValueError, match='stage.clip_frames: got 25, which are 7 latent frames'):
        CausalFlow(clip_frames=25).blocks(toy[0])
    with pytest.raises(ValueError, match='stage.clip_frames: got 20, expected 1'):
        FlowMatching(clip_frames=20)


def test_a_path_ends_where_the_sampler_does():
    cfg, noise = flow.Config(shift=2.0), jax.random.normal(KEY, (1, 2, 2, 2, 3))

    def denoise(x, level):
        return jnp.tanh(x) + level[..., None, None, None] / 1000

    made = path(cfg, (1000, 750, 500, 250), 3, denoise, noise)
    end = flow.sample(cfg, 12, lambda params, x, level: denoise(x, level), None, noise)
    np.testing.assert_allclose(made[:, -1], end, atol=1e-5)
    np.testing.assert_array_equal(made[:, 0], noise)
    assert made.shape == (1, 5, 2, 2, 2, 3)


def test_the_student_of_a_known_path_has_nothing_to_learn(toy):
    _, params, batch = toy
    world, stage = Toy(steps=(1000,)), ODEPairs(clip_frames=21, points=1)
    noise = np.asarray(jax.random.normal(KEY, batch['latents'].shape))
    v = world.denoise(
        params,
        noise,
        jnp.full((2, 6), 1000.0),
        stage.condition(world, params, batch),
        batch['actions'],
    )
    path = np.stack([noise, noise - v], axis=1)

    def loss(path):
        return float(stage.loss(world, params, batch | {'path': path}, KEY)[0])

    assert loss(path) < 1e-8 < 0.9 < loss(path + np.array([0, 1])[:, None, None, None, None])


def test_paths_are_walked_once_for_the_first_clips(toy, tmp_path):
    world, params, batch = toy
    stage = ODEPairs(clip_frames=21, points=2, paths=1)
    store = types.SimpleNamespace(**batch, folder=tmp_path / 'clips')
    made = stage._solved(world, params, store, 1, 0, tmp_path / 'cache')
    assert made.shape == (1, 3, 6, 2, 2, 3) and made.dtype == np.float16
    key = jax.random.fold_in(jax.random.key(0), 0)
    noise = jax.random.normal(key, (8, 6, 2, 2, 3))[:1]
    given = stage.condition(world, params, batch)
    given = jax.tree.map(lambda leaf: leaf[:1], given)

    def denoise(params, x, level):
        one = given.replace(image=jnp.broadcast_to(given.image, (8, *given.image.shape[1:])))
        return world.denoise(params, x, level, one, np.repeat(batch['actions'][:1], 8, axis=0))

    end = flow.sample(world.cfg.flow, 4, denoise, params, noise)
    np.testing.assert_allclose(made[:, -1], end, atol=2e-3)
    assert made is not stage._solved(
        types.SimpleNamespace(cfg=world.cfg), params, store, 1, 0, tmp_path / 'cache'
    )


def test_a_rollout_is_what_the_stream_makes(toy):
    world, params, batch = toy
    stage = SelfForcing(clip_frames=21, random_exit=False)
    given = stage.condition(world, params, batch)
    clip = jit(lambda p: stage.rollout(world, p, given, batch['actions'], KEY))(params)
    stream, key = world.latents(), jax.random.split(KEY)[1]
    carry, head = stream.prefill(params, stream.init(params, given, key), batch['actions'][:, :9])
    _, tail = stream.step(params, carry, batch['actions'][:, 9:])
    np.testing.assert_allclose(clip, np.concatenate([head, tail], axis=1), atol=1e-5)


@pytest.mark.parametrize('end', [0, 1])
def test_a_block_may_end_at_any_call(end):
    """Of a network that says v = weight x: the clean estimate of call `end` remains, and the
    gradient is that of this call alone."""
    cfg, schedule = causal.Config(steps=(1000, 500)), flow.Config(shift=1.0)
    table = causal.step_table(cfg, schedule)
    net = causal.CachedNetwork(lambda p, caches, x, *_: (p * x, caches), None, None, 1, 1)
    noises = jnp.ones((3, 1, 3, 1, 1, 1))

    def made(weight):
        told = truncated(net, jnp.asarray(table.level)[end])
        return causal.run_calls(
            ended(table, end), told, weight, (), jnp.full((1, 3, 1, 1, 1), 2.0), noises, None, None
        )[1].mean()

    first = 2 - 1.0 * 0.3 * 2
    second = 0.5 * first + 0.5
    value, slope = jax.jit(jax.value_and_grad(made))(0.3)
    np.testing.assert_allclose(value, [first, second - 0.5 * 0.3 * second][end], rtol=1e-6)
    np.testing.assert_allclose(slope, [-2.0, -0.5 * second][end], rtol=1e-6)


def test_no_gradient_through_what_a_block_is_given():
    net = causal.CachedNetwork(
        lambda p, caches, x, levels, cond, actions: (p * (x + cond + caches), x), None, None, 1, 1
    )

    def made(given):
        v, kept = truncated(net, 0.0).denoise(2.0, *given[:2], jnp.zeros((1, 1)), given[2], None)
        return (v + kept).sum()

    given = [jnp.ones((1, 1, 1, 1, 1))] * 3
    assert made(given) == 7 and not any(map(jnp.any, jax.grad(made)(given)))


def test_student_and_critic_take_turns(toy):
    """In a turn one of them learns; the teacher never does."""
    world, params, batch = toy
    stage, seen = SelfForcing(clip_frames=21, ratio=2), set()
    params = stage.start(world, params, 0)
    params['critic'] = {'mix': np.float32(0.4), 'past': np.float32(0.3)}
    gradient = jit(
        jax.grad(lambda params, key: stage.loss(world, params, batch, key), has_aux=True)
    )
    for seed in range(4):
        grads, metrics = gradient(params, jax.random.key(seed))
        found = {name for name, size in sizes(grads).items() if size > 0}
        assert found == ({'transformer'} if metrics['student'] else {'critic'})
        seen |= found
    assert len(seen) == 2
    roles = {name: stage.trainable(f'{name}/x') for name in params}
    assert {name for name, trains in roles.items() if trains} == seen
    assert set(stage.finish(world, params, None)[1]) == set(FlowMatching.components)


def test_a_critic_that_agrees_with_the_teacher_moves_nobody(toy):
    world, params, batch = toy
    stage = SelfForcing(clip_frames=21)
    params = stage.start(world, params, 0)
    given = stage.condition(world, params, batch)

    def slope(params):
        return jax.grad(
            lambda clip: stage.student_loss(world, params, clip, given, batch['actions'], KEY)
        )(jnp.asarray(batch['latents']))

    np.testing.assert_allclose(slope(params), 0, atol=1e-9)
    params['critic'] = {'mix': np.float32(0.4), 'past': np.float32(0.3)}
    assert np.abs(slope(params)).max() > 1e-4


def test_a_guided_teacher_asks_for_more_of_what_is_pressed(toy):
    """Of a network that says v = actions: the guided teacher says 1.5 of them."""
    world, params, batch = toy
    clip, actions = jnp.asarray(batch['latents']), jnp.asarray(batch['actions'])

    class Plain(Toy):
        def denoise(self, params, x, level, cond, actions, block=None):
            return jnp.broadcast_to(actions.mean(), x.shape)

    world, stage = Plain(), SelfForcing(clip_frames=21, action_guidance=1.5)
    params = stage.start(world, params, 0)
    given = stage.condition(world, params, batch)

    def slope(actions):
        return jax.grad(lambda clip: stage.student_loss(world, params, clip, given, actions, KEY))(
            clip
        )

    keys = jax.random.split(KEY)
    sigma = stage._drawn(world, keys[0], clip)[..., None, None, None]
    noisy = flow.add_noise(sigma[..., 0, 0, 0], clip, jax.random.normal(keys[1], clip.shape))
    real, fake = (noisy - share * sigma * actions.mean() for share in (1.5, 1.0))
    want = (fake - real) / jnp.abs(clip - real).mean(axis=(1, 2, 3, 4), keepdims=True) / clip.size
    np.testing.assert_allclose(slope(actions), want, rtol=1e-4)
    np.testing.assert_allclose(slope(0 * actions), 0, atol=1e-9)


def test_a_teacher_sees_pictures_with_its_own_tower(tmp_path):
    """It was trained with it; the student's may have gone on since."""
    run = recipes.load('matrix_game_2:TINY_DMD')
    world = worlds.build(run.world)
    params = world.init(0)
    own, other = (str(tmp_path / name) for name in ('own', 'other'))
    world.save(own, params, dtype=None)
    world.save(other, params | world.init(1, only=('transformer', 'image_encoder')), dtype=None)
    same, apart = (
        dataclasses.replace(run.stage, teacher=folder).start(world, params, 0)
        for folder in (own, other)
    )
    assert TOWER not in same
    tower = apart[TOWER]['patch']['kernel']
    assert np.abs(tower - params['image_encoder']['patch']['kernel']).max() > 0.1
    stage = dataclasses.replace(run.stage, teacher=other)
    assert not stage.trainable(f'{TOWER}/patch/kernel')
    assert set(stage.axes(world)) >= set(conversion.flatten(apart))
    assert set(stage.finish(world, apart, None)[1]) == set(FlowMatching.components)


@pytest.mark.parametrize('recipe', ['matrix_game_2:TINY_DMD', 'matrix_game_3:TINY_MEMORY_DMD'])
def test_a_teacher_that_is_not_finite_needs_leave(recipe):
    run = recipes.load(recipe)
    world, asked = worlds.build(run.world), []
    params = {'transformer': {}, 'image_encoder': {}}

    class Asking:
        cfg = world.cfg

        def has_part(self, folder, name):
            return False

        def load(self, folder, only, allow_non_finite):
            asked.append((folder, only, allow_non_finite))
            return params

    stage = dataclasses.replace(run.stage, teacher='folder')
    for allowed in (False, True):
        stage.start(Asking(), params, 0, allowed)
    assert asked == [('folder', ('transformer',), False), ('folder', ('transformer',), True)]


def test_who_judges_is_told_of_a_picture_by_its_tower(toy):
    _, params, batch = toy

    class Seeing(Toy):
        def image_features(self, params, pictures):
            return params['image_encoder']['gain'] * super().image_features(params, pictures)

        def latents(self, **given):
            made = super().latents(**given)

            def init(params, cond, key):
                told.append(cond.image)
                return made.init(params, cond, key)

            return made._replace(init=init)

    world, stage, told = Seeing(), SelfForcing(clip_frames=21, ratio=2), []

    def losses(own, judges):
        """Of a turn of the critic, and of one of the student."""
        made = stage.start(world, params | {'image_encoder': {'gain': jnp.float32(own)}}, 0)
        made['critic'] = {'mix': np.float32(0.4), 'past': np.float32(0.3)}
        if judges:
            made[TOWER] = {'gain': jnp.float32(judges)}
        with jax.disable_jit():
            found = [stage.loss(world, made, batch, jax.random.key(seed)) for seed in range(4)]
        turns = [float(metrics['student']) for _, metrics in found]
        return [float(found[turns.index(turn)][0]) for turn in (0, 1)]

    alike, same, apart = losses(1, None), losses(1, 1), losses(1, 3)
    assert alike == same and all(one != other for one, other in zip(same, apart))
    # The student is told by its own.
    pictures = jnp.asarray(batch['picture'][:, None], jnp.float32).mean(axis=(2, 3)) / 255
    assert all(np.allclose(image, pictures) for image in told)


def test_a_role_without_a_gradient_rests():
    tx = optim.by_turns(
        {name: optim.make(optim.Optimizer(learning_rate=0.1), 10, {}) for name in 'ab'},
        lambda name: name[0],
    )
    leaves = {'a/x': jnp.ones(2), 'b/x': jnp.ones(2)}
    state = tx.init(leaves)
    updates, after = jax.jit(tx.update)({'a/x': jnp.ones(2), 'b/x': jnp.zeros(2)}, state, leaves)
    assert np.all(updates['a/x'] < 0) and not np.any(updates['b/x'])
    counts = {
        name: [
            int(leaf) for leaf in jax.tree.leaves(inner) if jnp.issubdtype(leaf.dtype, jnp.integer)
        ]
        for name, inner in after.inner_states.items()
    }
    assert set(counts['a']) == {1} and set(counts['b']) == {0}
    assert isinstance(optax.apply_updates(leaves, updates), dict)


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: SelfForcing(ratio=0), 'stage.ratio: got 0'),
        (lambda: SelfForcing(action_guidance=0.5), 'stage.action_guidance: got 0.5'),
        (lambda: SelfForcing(lowest=0.5, highest=0.4), 'stage.lowest: got 0.5 to 0.4'),
        (lambda: SelfForcing(train_encoders=True), 'stage.train_encoders: got True'),
        (lambda: CausalFlow(clean=2), 'stage.clean: got 2'),
        (lambda: ODEPairs(points=0), 'stage.points: got 0'),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
