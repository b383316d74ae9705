"""Training state that survives killed, failed and damaged saves."""

import resource
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from matrix_jax.config import Mesh
from matrix_jax.parallel import sharding
from matrix_jax.weights import training_state
from matrix_jax.weights.diffusers_layout import CheckpointError, SaveError
from matrix_jax.weights.training_state import Checkpoints


class Moments(NamedTuple):
    mean: jax.Array
    count: int


def make_state(seed):
    params = {'a/b': jnp.arange(16.0) + seed, 'c': jnp.full((3,), seed, jnp.bfloat16)}
    return {
        'params': params,
        'opt': optax.adamw(1e-3).init(params),
        'key': jax.random.key(seed),
        'raw': jax.random.key_data(jax.random.key(seed)),
        'moments': Moments(jnp.ones(2), seed),
        'rate': np.float32(seed),
        'host': np.arange(seed),
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert type(a) is type(b)
        if hasattr(a, 'dtype') and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_state_round_trip_keeps_the_newest(tmp_path):
    saver = Checkpoints(tmp_path / 'state', keep=2)
    assert saver.restore(make_state(5)) is None
    for step in (1, 2, 3):
        assert saver.save(step, make_state(5), {'data': [step], 'recipe': 'toy:TINY'})
    assert not saver.save(3, make_state(5))
    saver.close()

    saver = Checkpoints(tmp_path / 'state', keep=2)
    step, state, extra = saver.restore(make_state(5))
    assert (step, extra) == (3, {'data': [3], 'recipe': 'toy:TINY'})
    assert_same(state, make_state(5))
    assert saver.restore(make_state(5), step=2)[2]['data'] == [2]
    with pytest.raises(CheckpointError, match='no step 1; there are 2, 3'):
        saver.restore(make_state(5), step=1)
    plain = saver.restore()[1]
    np.testing.assert_array_equal(plain['params']['a']['b'], np.arange(16.0) + 5)
    assert isinstance(plain['params']['c'], np.ndarray)
    saver.close()


def test_restored_straight_into_other_shardings(tmp_path):
    mesh = jax.make_mesh((8,), ('data',))
    split = NamedSharding(mesh, PartitionSpec('data'))
    whole = NamedSharding(mesh, PartitionSpec())
    state = {'w': jax.device_put(jnp.arange(16.0), split), 'key': jax.random.key(1)}
    saver = Checkpoints(tmp_path)
    saver.save(1, state)
    target = {
        'w': jax.ShapeDtypeStruct((16,), jnp.float32, sharding=whole),
        'key': jax.ShapeDtypeStruct((), state['key'].dtype, sharding=whole),
    }
    _, found, _ = saver.restore(target)
    assert found['w'].sharding.is_equivalent_to(whole, 1)
    np.testing.assert_array_equal(found['w'], state['w'])
    assert jax.random.key_data(found['key']).tolist() == [0, 1]
    _, found, _ = saver.restore({'w': jnp.zeros(16), 'key': jax.random.key(0)})
    assert len(found['w'].sharding.device_set) == 1
    saver.close()


def test_saving_does_not_see_later_donated_updates(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(200_000)
    saver = Checkpoints(tmp_path)
    saver.save(1, {'x': x})
    for _ in range(20):
        x = step(x)
    assert float(saver.restore({'x': x})[1]['x'].max()) == 0
    saver.close()


def test_killed_save_leaves_the_step_before(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(1), {'data': 1})
    saver.close()
    # What a kill in the middle leaves: a folder that was never renamed into place.
    (tmp_path / '2.orbax-checkpoint-tmp-7' / 'state').mkdir(parents=True)
    saver = Checkpoints(tmp_path)
    assert saver.latest() == 1
    assert_same(saver.restore(make_state(1))[1], make_state(1))
    assert saver.save(2, make_state(2))
    saver.wait()
    assert saver.latest() == 2
    saver.close()


def test_save_when_due(tmp_path):
    saver = Checkpoints(tmp_path, every=10)
    saved = [step for step in range(1, 25) if saver.save(step, {'x': jnp.zeros(1)})]
    assert saved[1:] == [10, 20]
    assert saver.save(25, {'x': jnp.zeros(1)}, force=True)
    saver.close()


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda state: state | {'more': jnp.ones(1)}, ['missing more']),
        (lambda state: {'w': state['w']}, ['unknown b']),
        (partial(dict, w=jnp.ones(4)), ['w: got float32[3], expected float32[4]']),
    ],
)
def test_state_of_another_recipe_is_refused(tmp_path, change, words):
    state = {'w': jnp.ones(3), 'b': jnp.ones(2)}
    saver = Checkpoints(tmp_path)
    saver.save(7, state)
    with pytest.raises(CheckpointError, match='step 7 does not fit this recipe') as error:
        saver.restore(change(state))
    assert all(word in str(error.value) for word in words)
    saver.close()


def test_a_file_is_refused_as_folder(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError, match='is a file'):
        Checkpoints(tmp_path / 'file')


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp('saved') / 'state'
    saver = Checkpoints(folder)
    for step in (10, 20, 30):
        saver.save(step, make_state(step), {'data': step})
    saver.close()
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def largest(folder):
    return max(filter(Path.is_file, folder.rglob('*')), key=lambda path: path.stat().st_size)


def restore(folder, step=None, like=30):
    saver = Checkpoints(folder)
    try:
        return saver.restore(make_state(like), step)
    finally:
        saver.close()


@pytest.mark.parametrize(
    'damage, what',
    [
        (flip, 'damaged, its checksum differs'),
        (truncate, 'truncated, '),
        (lambda path: path.unlink(), 'missing'),
    ],
)
def test_a_damaged_step_is_named_and_refused(saved, tmp_path, damage, what):
    folder = tmp_path / 'state'
    shutil.copytree(saved, folder)
    bad = largest(folder / '30')
    damage(bad)
    with pytest.raises(CheckpointError) as error:
        restore(folder)
    message = str(error.value)
    assert message.startswith(f'{bad}: {what}')
    assert message.endswith(f'; step 20 is whole: remove {folder / "30"} to go on from it')
    shutil.rmtree(folder / '30')
    assert_same(restore(folder, like=20)[1], make_state(20))
    flip(largest(folder / '20'))
    flip(largest(folder / '10'))
    with pytest.raises(CheckpointError, match=f'no older step is whole: remove {folder} to start'):
        restore(folder)


def test_damage_to_any_file_that_matters_is_refused(saved, tmp_path):
    names = [path.relative_to(saved) for path in filter(Path.is_file, (saved / '30').rglob('*'))]
    notes = [name for name in names if name.name in ('commit_success.txt', '_CHECKPOINT_METADATA')]
    refused = 0
    for index, name in enumerate(names):
        folder = tmp_path / str(index)
        shutil.copytree(saved, folder)
        flip(folder / name)
        try:
            step, state, extra = restore(folder)
        except CheckpointError as error:
            assert '30' in str(error) and '\n' not in str(error)
            refused += 1
        else:
            assert (step, extra) == (30, {'data': 30})
            assert_same(state, make_state(30))
    assert refused == len(names) - len(notes) > 8


def test_a_step_without_checksums_is_loaded_or_refused(saved, tmp_path):
    folder = tmp_path / 'state'
    shutil.copytree(saved, folder)
    for path in folder.rglob('sums.json'):
        path.unlink()
    assert_same(restore(folder)[1], make_state(30))
    for path in (folder / '30' / 'state').rglob('manifest.ocdbt'):
        path.write_bytes(b'')
    with pytest.raises(CheckpointError, match='30: not readable .*step 20 is whole: remove '):
        restore(folder)


def test_a_step_with_half_of_its_checksums_is_refused(saved, tmp_path):
    folder = tmp_path / 'state'
    shutil.copytree(saved, folder)
    (folder / '30/extra/sums.json').unlink()
    with pytest.raises(CheckpointError, match='30/extra/sums.json: missing; step 20 is whole'):
        restore(folder)


@pytest.fixture
def limit():
    """`limit(bytes)` of any file written; None lifts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield set_limit
    set_limit(None)


@pytest.mark.parametrize('size', [0, 60_000])
def test_a_save_that_cannot_be_written_keeps_the_one_before(tmp_path, limit, size):
    state = {'x': jax.random.normal(jax.random.key(0), (50_000,))}
    saver = Checkpoints(tmp_path, keep=1)
    saver.save(1, state, {'data': 1})
    saver.wait()
    limit(size)
    with pytest.raises(SaveError) as error:
        saver.save(2, state)
        saver.save(3, state)
    limit(None)
    saver.close()
    assert str(error.value) == (
        f'{tmp_path}: step 2 could not be saved (File too large); '
        'step 1 is whole, and the next start goes on from it'
    )
    saver = Checkpoints(tmp_path, keep=1)
    step, found, extra = saver.restore(state)
    assert (step, extra) == (1, {'data': 1})
    assert_same(found, state)
    assert saver.save(2, state)
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ['2']


@pytest.mark.parametrize('shape', [Mesh(), Mesh(fsdp=2), Mesh(data=2, fsdp=2)], ids=['1', '2', '4'])
def test_saved_on_eight_devices_and_loaded_on_fewer(tmp_path, shape):
    def place(state, mesh):
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('fsdp',)))
        return jax.tree.map(
            lambda leaf: jax.device_put(
                leaf, split if leaf.ndim and leaf.shape[0] % 8 == 0 else whole
            ),
            state,
        )

    params = {
        'w': jax.random.normal(jax.random.key(1), (16, 5)),
        'b': jnp.arange(3.0),
        'h': jax.random.normal(jax.random.key(2), (8, 3), jnp.bfloat16),
    }
    state = {
        'params': params,
        'opt': optax.adamw(1e-3).init(params),
        'step': jnp.int32(7),
        'key': jax.random.key_data(jax.random.key(3)),
    }
    saver = Checkpoints(tmp_path)
    saver.save(7, place(state, sharding.make_mesh(Mesh(fsdp=8))))
    target = place(state, sharding.make_mesh(shape))
    _, found, _ = saver.restore(target)
    saver.close()
    assert_same(found, state)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
        assert leaf.sharding == wanted.sharding


def test_a_save_that_waited_too_long_is_tried_again(tmp_path, monkeypatch):
    """As on a machine that was suspended while threads of orbax waited for each other."""
    saver, failures = Checkpoints(tmp_path / 'state'), [TimeoutError('timed out after 0.00 s')]
    handler = training_state._orbax()[1].handler
    finalize = handler.finalize

    def fail_once(self, directory):
        if failures:
            raise failures.pop()
        finalize(self, directory)

    monkeypatch.setattr(handler, 'finalize', fail_once)
    saver.save_now(1, make_state(5), {'data': 1})
    assert not failures and saver.restore(make_state(5))[0] == 1
    failures.append(TimeoutError('timed out'))
    saver.save(2, make_state(5))
    assert saver.save(3, make_state(5), {'data': 3})  # replaces the one that failed
    assert saver.latest() == 3
    failures.append(OSError(28, 'No space left on device'))
    with pytest.raises(SaveError, match='step 4 could not be saved .No space left'):
        saver.save_now(4, make_state(5))
    saver.close()
    assert Checkpoints(tmp_path / 'state').restore(make_state(5))[2] == {'data': 3}
