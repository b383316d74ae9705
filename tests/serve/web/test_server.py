"""Where a server may listen, and what it says in its log."""

import json
import socket
import subprocess
import sys

import pytest

from matrix_jax.config import UsageError
from matrix_jax.serve.web import server


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'host': '0.0.0.0'}, '--token'),
        ({'host': '::'}, '--token'),
        ({'host': 'box'}, '--token'),
        ({'token': 'short'}, '--token'),
        ({'token': 'spaces are bad'}, '--token'),
        ({'port': 70_000}, '--port'),
    ],
)
def test_a_careless_address_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        server.Config(**fields)


def test_addresses():
    assert server.Config().url(8000) == 'http://127.0.0.1:8000/'
    assert server.Config(host='::', token='a1b2c3d4').url(1) == 'http://[::]:1/?token=a1b2c3d4'
    with socket.create_server(('127.0.0.1', 0)) as taken:
        with pytest.raises(UsageError, match='cannot listen on'):
            server.listen(server.Config(port=taken.getsockname()[1]))


LOGS = """
import logging, warnings
from matrix_jax.serve.web import server
server.log_to_stderr()
server.uvicorn_server(None, 1)                            # whose own set-up adds no other lines
log = logging.getLogger('matrix_jax.serve.runtime.session_manager')
log.info('session_end', extra={'fields': {'session': 'abc', 'steps': 3}})
logging.getLogger('uvicorn.error').error('two\\nlines %s', 'here')
logging.getLogger('jax').info('not of interest')
warnings.warn('careful')
try:
    1 / 0
except ZeroDivisionError:
    log.exception('failed')
"""


def test_every_line_of_the_log_is_a_json_object():
    done = subprocess.run([sys.executable, '-c', LOGS], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line['level'], line['event']) for line in lines[:2]] == [
        ('INFO', 'session_end'),
        ('ERROR', 'two\nlines here'),
    ]
    assert (
        lines[0]['session'] == 'abc'
        and lines[0]['steps'] == 3
        and lines[0]['time'][-6:] == ('+00:00')
    )
    assert 'careful' in lines[2]['event'] and 'ZeroDivisionError' in lines[3]['exception']
    assert len(lines) == 4 and not done.stdout
