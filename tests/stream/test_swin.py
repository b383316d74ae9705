"""The Swin-DPM stream on a toy network; the parity tests replay the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from matrix_jax.diffusion.schedules import SchedulerConfig
from matrix_jax.stream import base, swin

BATCH, H, W, C, L, D, A = 2, 2, 3, 4, 5, 6, 4
PARAMS = {'mix': np.float32(0.6), 'across': np.float32(0.3)}
DPM = swin.Config(groups=4, group_frames=2, steps=8)
LCM = dataclasses.replace(DPM, solver='lcm')


def denoise(params, x, level, text, control):
    """A toy network: every input changes its output, and frames see each other."""
    given = text.mean(axis=(1, 2))[:, None, None, None, None] + control[:, :, None, None, :C]
    past = jnp.cumsum(x, axis=1) / x.shape[1]
    return jnp.tanh(
        params['mix'] * x + params['across'] * past + given + level[..., None, None, None] / 1000
    )


def condition(cfg, batch=BATCH, seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    return swin.Cond(
        latents=normal(batch, cfg.frames, H, W, C),
        text=normal(batch, L, D),
        null_text=normal(batch, L, D),
        control_table=normal(10, A),
        controls=random.integers(0, 9, (batch, cfg.known_controls), np.int32),
    )


def keys(batch=BATCH, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def controls(cfg, shifts, batch=BATCH, seed=1):
    shape = (shifts, batch, cfg.group_frames)
    return np.random.default_rng(seed).integers(0, 9, shape, np.int32)


@functools.cache
def compiled(cfg):
    stream = swin.make(cfg, SchedulerConfig(), denoise)
    return jax.jit(stream.init), jax.jit(stream.step)


def play(cfg, shifts=6, cond=None, key=None, carry=None, given=None):
    """Repeated jit(step), which compiles once per config -> (carry, latents of all shifts)."""
    init, step = compiled(cfg)
    if carry is None:
        carry = init(PARAMS, cond or condition(cfg), keys() if key is None else key)
    parts = []
    for control in controls(cfg, shifts) if given is None else given:
        carry, part = step(PARAMS, carry, control)
        assert part.shape == (len(control), cfg.group_frames, H, W, C) and part.dtype == jnp.float32
        parts.append(part)
    return carry, np.concatenate(parts, axis=1)


def take(tree, index):
    """One player of a batch."""
    return dataclasses.replace(
        tree,
        **{
            field.name: getattr(tree, field.name)[index : index + 1]
            for field in dataclasses.fields(tree)
            if field.name != 'control_table'
        },
    )


def assert_trees_close(got, want, atol=0.0):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


CASES = (
    DPM,
    LCM,
    swin.Config(
        group_frames=1,
        context=3,
        solver='ddim',
        steps=4,
        guidance=3.0,
        control_binding='early',
        renoise_condition=True,
        condition_level=5,
    ),
)


@pytest.mark.parametrize('cfg', CASES)
def test_scan_of_step_equals_repeated_step(cfg):
    carry, latents = play(cfg)
    again = compiled(cfg)[0](PARAMS, condition(cfg), keys())
    again, scanned = jax.jit(
        functools.partial(base.rollout, swin.make(cfg, SchedulerConfig(), denoise))
    )(PARAMS, again, controls(cfg, 6))
    np.testing.assert_allclose(latents, base.join(scanned), atol=1e-5)
    assert_trees_close(carry, again, atol=1e-5)
    assert np.isfinite(latents).all() and np.all(carry.shift == 6)


def test_one_key_gives_one_video():
    video = play(DPM)[1]
    assert np.array_equal(play(DPM)[1], video)
    assert np.abs(play(DPM, key=keys(seed=1))[1] - video).max() > 0.1


def test_no_noise_is_used_twice():
    carry = compiled(LCM)[0](PARAMS, condition(LCM), keys())
    tails = [np.asarray(carry.window[:, -2:])]
    for control in controls(LCM, 3):
        carry, _ = compiled(LCM)[1](PARAMS, carry, control)
        tails.append(np.asarray(carry.window[:, -2:]))
    noise = np.concatenate(tails, axis=1).reshape(BATCH * len(tails) * 2, -1)
    alike = np.abs(noise[:, None] - noise[None]).max(axis=-1) < 1e-3
    assert np.array_equal(alike, np.eye(len(noise), dtype=bool))


@pytest.mark.parametrize('cut', [1, 4])
def test_a_saved_carry_continues_exactly(cut, tmp_path):
    given = controls(DPM, 6)
    carry, latents = play(DPM)
    middle, before = play(DPM, given=given[:cut])
    leaves, structure = jax.tree.flatten(middle)
    np.savez(tmp_path / 'carry.npz', *leaves)
    with np.load(tmp_path / 'carry.npz') as saved:
        middle = jax.tree.unflatten(structure, [saved[name] for name in saved])
    end, after = play(DPM, carry=middle, given=given[cut:])
    np.testing.assert_allclose(np.concatenate([before, after], axis=1), latents, atol=1e-5)
    assert_trees_close(end, carry, atol=1e-5)


@pytest.mark.parametrize('cfg', CASES)
def test_four_players_equal_four_single_players(cfg):
    cond, key, given = condition(cfg, 4), keys(4), controls(cfg, 5, 4)
    _, together = play(cfg, cond=cond, key=key, given=given)
    for player in range(4):
        one = slice(player, player + 1)
        _, alone = play(cfg, cond=take(cond, player), key=key[one], given=given[:, one])
        np.testing.assert_allclose(together[one], alone, atol=1e-5)


def test_players_can_be_at_different_shifts():
    early, late = play(DPM, 2)[0], play(DPM, 5)[0]
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), early, late)
    given = controls(DPM, 3, seed=9)
    got = play(DPM, carry=mixed, given=given)[1]
    np.testing.assert_allclose(got[0], play(DPM, carry=early, given=given)[1][0], atol=1e-5)
    np.testing.assert_allclose(got[1], play(DPM, carry=late, given=given)[1][1], atol=1e-5)


def test_two_hundred_shifts_compile_once_in_constant_memory():
    traces = []

    def traced(*arguments):
        traces.append(None)
        return denoise(*arguments)

    step = jax.jit(swin.make(LCM, SchedulerConfig(), traced).step, donate_argnums=1)
    carry = compiled(LCM)[0](PARAMS, condition(LCM), keys())
    held = []
    for shift, control in enumerate(controls(LCM, 200)):
        carry, latents = step(PARAMS, carry, control)
        if shift % 50 == 9:
            held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(traces) == 1 and step._cache_size() == 1
    assert len(set(held)) == 1
    assert np.isfinite(latents).all()


def test_the_network_gets_the_levels_of_the_window():
    seen = []

    def record(params, x, level, text, control):
        seen.append((level.shape, control.shape, text.shape))
        return 0 * x

    guided = dataclasses.replace(DPM, guidance=2.0)
    stream = swin.make(guided, SchedulerConfig(), record)
    carry = jax.eval_shape(stream.init, PARAMS, condition(guided), keys())
    jax.eval_shape(stream.step, PARAMS, carry, controls(guided, 1)[0])
    assert seen == [((4, 9), (4, 9, A), (4, L, D))]
    table = swin.shift_table(
        dataclasses.replace(DPM, context=2, condition_level=3), SchedulerConfig()
    )
    assert table.levels.tolist() == [
        [3, 3, 249, 249, 499, 499, 749, 749, 999, 999],
        [3, 3, 124, 124, 374, 374, 624, 624, 874, 874],
    ]


def test_guidance_mixes_the_two_texts():
    text = jax.random.normal(jax.random.key(3), [BATCH, L, D])

    def video(guidance, null):
        cfg = dataclasses.replace(DPM, guidance=guidance)
        return play(cfg, 2, dataclasses.replace(condition(cfg), text=text, null_text=null))[1]

    plain = video(1.0, text)
    np.testing.assert_allclose(video(6.0, text), plain, atol=1e-4)
    assert np.abs(video(6.0, text[:1]) - plain)[1].max() > 0.01  # one negative text for all


def test_control_guidance_goes_beyond_the_control():
    """The network outputs the control: guidance scales its difference from the null control."""

    def paint(params, x, level, text, control):
        return -jnp.broadcast_to(control[:, :, None, None, :1], x.shape)

    def video(scale):
        cfg = dataclasses.replace(DPM, solver='ddim', control_guidance=scale)
        table = np.zeros([10, A], np.float32)
        table[:9], table[9] = 2, 1
        stream = swin.make(cfg, SchedulerConfig(), paint)
        cond = dataclasses.replace(condition(cfg), control_table=table)
        carry = stream.init(PARAMS, cond, keys())
        return base.rollout(stream, PARAMS, carry, controls(cfg, 6))[1]

    one, three, five = (np.asarray(video(scale))[-1] for scale in (1.0, 3.0, 5.0))
    np.testing.assert_allclose(five - three, three - one, atol=1e-5)
    assert (three - one).min() > 0.5
    assert swin.Config().passes == 5 and swin.Config(guidance=6, control_guidance=2).passes == 15
    with pytest.raises(ValueError, match='stream.control_guidance: got nan'):
        swin.Config(control_guidance=float('nan'))


# --- where a control takes effect ----------------------------------------------------------------


@pytest.mark.parametrize(
    'binding, group, first',
    [('late', 2, 7), ('early', 3, 7), ('early', 2, 5), ('early', 1, 3), ('early', 0, 1)],
)
def test_a_control_takes_the_slots_from_its_binding_on(binding, group, first):
    cfg = dataclasses.replace(DPM, control_binding=binding, head_group=group)
    remembered, control = jnp.full([1, 7], 9), jnp.array([[1, 2]])
    held = [2] * (9 - first - 2)
    slots = swin.bind(cfg, remembered, control)
    assert slots.tolist() == [[9] * first + [1, 2] + held]


@pytest.mark.parametrize(
    'binding, group, shown', [('late', 2, 3), ('early', 2, 2), ('early', 0, 0)]
)
def test_a_control_is_shown_after_the_groups_before_it(binding, group, shown):
    """The network outputs the control, which shows after how many shifts it appears."""

    def paint(params, x, level, text, control):
        return -jnp.broadcast_to(control[:, :, None, None, :1], x.shape) / 1000

    cfg = swin.Config(
        group_frames=1, steps=4, solver='ddim', control_binding=binding, head_group=group
    )
    stream = swin.make(cfg, SchedulerConfig(), paint)
    table = np.zeros([10, A], np.float32)
    table[1] = 1e6
    cond = dataclasses.replace(
        condition(cfg, 1), control_table=table, controls=np.zeros([1, cfg.known_controls], np.int32)
    )
    given = np.array([0, 0, 1, 1, 1, 1, 1, 1])[:, None, None]
    _, latents = jax.jit(
        lambda key: base.rollout(stream, PARAMS, stream.init(PARAMS, cond, key), given)
    )(keys(1))
    pressed = np.abs(base.join(latents)[0]).mean(axis=(1, 2, 3)) > 100
    assert np.argmax(pressed) == 2 + shown and pressed[2 + shown :].all()


@pytest.mark.parametrize('binding', ['late', 'early'])
def test_each_frame_is_made_under_its_own_symbol(binding):
    cfg = dataclasses.replace(DPM, control_binding=binding, head_group=1)
    needed = swin.needed_controls(cfg, 5)
    symbols = np.arange(100)[None, :needed]
    remembered, steps = swin.split_controls(cfg, symbols, 5)
    for shift, control in enumerate(steps):
        slots = np.asarray(swin.bind(cfg, remembered, control))
        bound = slice(0, cfg.binding_slot + cfg.group_frames)
        assert np.array_equal(slots[:, bound], np.arange(9)[None, bound] + 2 * shift)
        remembered = slots[:, cfg.group_frames :]
    assert steps[-1, 0, -1] == needed - 1 or binding == 'early'
    with pytest.raises(ValueError, match=f'got {needed - 1}, expected at least {needed}'):
        swin.split_controls(cfg, symbols[:, 1:], 5)


# --- the start and the prompt --------------------------------------------------------------------


def test_a_short_clip_is_padded_and_a_long_one_is_cut():
    cond, init = condition(DPM), compiled(DPM)[0]
    whole = init(PARAMS, cond, keys()).window
    longer = np.concatenate([cond.latents, 1 + cond.latents], axis=1)
    longer = init(PARAMS, dataclasses.replace(cond, latents=longer), keys()).window
    np.testing.assert_allclose(longer, whole, atol=1e-6)
    short = init(PARAMS, dataclasses.replace(cond, latents=cond.latents[:, :3]), keys()).window
    np.testing.assert_allclose(short[:, :3], whole[:, :3], atol=1e-6)
    np.testing.assert_allclose(short[:, 7:], whole[:, 7:], atol=1e-6)  # pure noise
    assert np.abs(short[:, 3:7] - whole[:, 3:7]).max() > 0.1


def test_the_condition_is_the_newest_clean_latents():
    cfg = dataclasses.replace(DPM, context=3)
    carry, latents = play(cfg, 3)
    np.testing.assert_allclose(carry.window[:, :3], latents[:, -3:], atol=1e-6)
    noised, latents = play(dataclasses.replace(cfg, renoise_condition=True), 3)
    spread = np.std(np.asarray(noised.window[:, :3]) - np.sqrt(0.9974543) * latents[:, -3:])
    assert 0.02 < spread < 0.09  # sigma_0 = 0.0505


def test_a_new_prompt_changes_the_whole_window_at_once():
    carry, _ = play(DPM, 2)
    same = swin.with_text(carry, carry.text)
    other = swin.with_text(carry, carry.text + 1)
    given = controls(DPM, 1, seed=5)
    first, second, third = (play(DPM, carry=one, given=given)[1] for one in (carry, same, other))
    assert np.array_equal(first, second)
    assert np.abs(first - third).max(axis=(2, 3, 4)).min() > 0.01
    with pytest.raises(ValueError, match='text: got'):
        swin.with_text(carry, carry.text[:, :2])


def test_one_key_is_split_for_the_players():
    init = compiled(DPM)[0]
    window = init(PARAMS, condition(DPM), jax.random.key(0)).window
    assert np.array_equal(window, init(PARAMS, condition(DPM), keys()).window)
    raw = init(PARAMS, condition(DPM), jax.random.key_data(keys())).window
    assert np.array_equal(window, raw)
    assert np.abs(window[0, -1] - window[1, -1]).max() > 0.1


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'fields',
    [
        {'groups': 0},
        {'group_frames': 0},
        {'context': 0},
        {'steps': 6},
        {'steps': 0},
        {'solver': 'euler'},
        {'control_binding': 'middle'},
        {'control_binding': 'early', 'head_group': 4},
        {'condition_level': -1},
        {'lcm_multiplier': 0},
    ],
)
def test_invalid_configs_raise(fields):
    with pytest.raises(ValueError, match=f'stream.{list(fields)[-1]}: got .* expected'):
        swin.Config(**fields)


@pytest.mark.parametrize(
    'fields', [{'original_steps': 50, 'steps': 4}, {'lcm_multiplier': 2, 'steps': 4}]
)
def test_a_schedule_that_jumps_over_a_phase_boundary_raises(fields):
    with pytest.raises(ValueError, match='jumps over the phase boundary'):
        swin.make(dataclasses.replace(LCM, **fields), SchedulerConfig(), denoise)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'latents': np.zeros([2, 3, 4])}, 'cond.latents'),
        ({'controls': np.zeros([2, 3], np.int32)}, 'cond.controls.*expected .2, 7.'),
        ({'text': np.zeros([3, L, D])}, 'cond.text'),
        ({'null_text': None}, 'cond.null_text: got None'),
    ],
)
def test_invalid_conditions_raise(fields, words):
    stream = swin.make(dataclasses.replace(DPM, guidance=2.0), SchedulerConfig(), denoise)
    with pytest.raises(ValueError, match=words):
        stream.init(PARAMS, dataclasses.replace(condition(DPM), **fields), keys())


def test_controls_and_keys_of_a_wrong_shape_raise():
    stream = swin.make(DPM, SchedulerConfig(), denoise)
    with pytest.raises(ValueError, match=r'key: got \(3,\) keys, expected one or \[2\]'):
        stream.init(PARAMS, condition(DPM), keys(3))
    carry = compiled(DPM)[0](PARAMS, condition(DPM), keys())
    with pytest.raises(ValueError, match=r'control: got \(2, 3\), expected .* \(2, 2\)'):
        stream.step(PARAMS, carry, np.zeros([2, 3], np.int32))
    with pytest.raises(ValueError, match='condition_level: got 1000'):
        swin.make(dataclasses.replace(DPM, condition_level=1000), SchedulerConfig(), denoise)
