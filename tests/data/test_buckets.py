"""Batches of several lengths: one length each, all of them as often, and exactly resumed."""

import json

import pytest

from matrix_jax.data.buckets import Buckets


class Counter:
    """Stands in for the windows of one length: says which, and how many it gave before."""

    names = ('clip',)

    def __init__(self, length):
        self.length, self.given = length, 0

    def share(self, index, count):
        self.rows = index, count

    def __next__(self):
        self.given += 1
        return self.length, self.given

    def state(self):
        return json.dumps(self.given).encode()

    def restore(self, state):
        self.given = json.loads(state)


def made(seed=0, lengths=(5, 9, 17)):
    return Buckets([Counter(length) for length in lengths], seed)


def test_every_length_has_its_turns_and_a_stopped_run_goes_on():
    loader = made()
    first = [next(loader) for _ in range(200)]
    state = loader.state()
    rest = [next(loader) for _ in range(100)]
    share = [sum(length == one for length, _ in first + rest) / 300 for one in (5, 9, 17)]
    assert all(abs(one - 1 / 3) < 0.1 for one in share)
    assert [length for length, _ in first[:99]] != [5, 9, 17] * 33
    again = made()
    again.restore(state)
    assert [next(again) for _ in range(100)] == rest
    other = made(seed=1)
    assert [next(other) for _ in range(200)] != first


def test_processes_share_every_length():
    loader = made()
    loader.share(1, 2)
    assert {part.rows for part in loader.loaders} == {(1, 2)} and loader.names == ('clip',)


@pytest.mark.parametrize(
    'state', [made(lengths=(5, 9)).state(), made(seed=3).state(), b'{"places": 4, "seed": 0}']
)
def test_a_state_of_other_lengths_is_refused(state):
    with pytest.raises(ValueError, match='here are 3 and seed 0'):
        made().restore(state)
