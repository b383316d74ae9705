"""Where a server may listen."""

import socket

import pytest

from matrix_jax.config import UsageError
from matrix_jax.serve import run


@pytest.mark.parametrize('fields, said', [
    ({'host': '0.0.0.0'}, '--token'), ({'host': '::'}, '--token'), ({'host': 'box'}, '--token'),
    ({'token': 'short'}, '--token'), ({'token': 'spaces are bad'}, '--token'),
    ({'port': 70_000}, '--port'),
])
def test_a_careless_address_is_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        run.Config(**fields)


def test_addresses():
    assert run.Config().url(8000) == 'http://127.0.0.1:8000/'
    assert run.Config(host='::', token='a1b2c3d4').url(1) == 'http://[::]:1/?token=a1b2c3d4'
    with socket.create_server(('127.0.0.1', 0)) as taken:
        with pytest.raises(UsageError, match='cannot listen on'):
            run.listen(run.Config(port=taken.getsockname()[1]))
