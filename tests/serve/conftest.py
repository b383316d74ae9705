"""Compiled streams of two worlds for all tests here, and servers and players on this machine."""

import contextlib
import dataclasses
import json
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from matrix_jax import recipes, worlds
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.serve.runtime.session import HEADER
from matrix_jax.serve.web import server
from matrix_jax.serve.web.app import WorldApp
from matrix_jax.serve.web.hosted_world import HostedWorld

JOIN = {'type': 'join', 'session': None, 'start': None, 'prompt': None, 'seed': 7}


def open_fast(name, folder):
    """(world, params) of a recipe, 100 frames per second so that tests need not wait."""
    recipe = recipes.load(name)
    return worlds.open_run(
        dataclasses.replace(
            recipe, weights=str(folder), world=dataclasses.replace(recipe.world, fps=100)
        )
    )


@pytest.fixture(scope='session')
def opened(tiny):
    """(world, params) of the_matrix:TINY."""
    return open_fast('the_matrix:TINY', tiny)


@pytest.fixture(scope='session')
def stream(opened):
    """Three slots, compiled."""
    return BatchedStream(*opened, num_slots=3).compile()


@pytest.fixture(scope='session')
def walk_stream(tiny_walk):
    """Two slots of matrix_game_2:TINY, compiled."""
    return BatchedStream(*open_fast('matrix_game_2:TINY', tiny_walk), num_slots=2).compile()


class Player:
    """A well-behaved client."""

    def __init__(self, server, query='', **join):
        self.server = server
        self.socket = server.connect(query)
        self.socket.send(json.dumps(JOIN | join))
        self.frames, self.keys, self.notes = {}, {}, []
        self.welcome = self.wait('welcome', 'closed')

    def read(self, timeout=60.0):
        """One message: a note, or None for a frame."""
        message = self.socket.recv(timeout=timeout)
        if isinstance(message, str):
            self.notes.append(json.loads(message))
            return self.notes[-1]
        index, key = HEADER.unpack(message[: HEADER.size])
        self.frames[index] = message[HEADER.size :]
        if key:
            self.keys[key] = index
        if len(self.frames) % 4 == 0:
            self.send(type='seen', frame=index)
        return None

    def wait(self, *kinds, seconds=60.0):
        """Reads on to a note of one of these types."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            note = self.read(seconds)
            if note and note['type'] in kinds:
                return note
        raise AssertionError(f'none of {kinds} within {seconds} s')

    def watch(self, count):
        """Reads `count` more frames."""
        goal = len(self.frames) + count
        while len(self.frames) < goal:
            self.read()

    def send(self, **message):
        self.send_raw(json.dumps(message))

    def send_raw(self, text):
        with contextlib.suppress(ConnectionClosed):  # `read` finds out why
            self.socket.send(text)

    def ask(self, path, data=None):
        """(status, body) of an upload or download of this session."""
        return self.server.http(f'/session/{self.welcome["session"]}/{path}', data)

    def close(self):
        self.socket.close()


class Running:
    """A server on a free port: of one world, or of `app`."""

    def __init__(self, stream, folder, app=None, recipe='the_matrix:TINY', **more):
        self.cfg = server.Config(players=stream.num_slots, port=0, **more)
        if app is None:
            self.world = HostedWorld(stream.empty_copy(), folder, recipe, self.cfg.grace)
            app = WorldApp({recipe: self.world}, self.cfg.token, self.cfg.root_path)
        self.app = app
        self.opened = contextlib.ExitStack()
        self.listening = server.listen(self.cfg)
        self.port = self.listening.getsockname()[1]
        self.access = self.app.asgi()
        self.web = server.uvicorn_server(self.access, stream.num_slots)
        self.thread = threading.Thread(target=self.web.run, args=([self.listening],))

    def connect(self, query=''):
        """A bare socket; closed at the end."""
        url = f'ws://127.0.0.1:{self.port}/play{query}'
        return self.opened.enter_context(connect(url, max_size=2**24, close_timeout=0.2))

    def join(self, query='', **wanted):
        """A player who asks for this."""
        return Player(self, query, **wanted)

    def http(self, path, data=None, headers=None, patient=True):
        """(status, body); waits for `Retry-After` if `patient`."""
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', data, headers or {})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                if error.code != 429 or not patient:
                    return error.code, error.read()
                time.sleep(int(error.headers.get('Retry-After', 1)))

    def players(self):
        return json.loads(self.http('/healthz')[1])['players']

    def until(self, condition, seconds=60.0):
        """Waits for something to become true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, 'it did not happen'
            time.sleep(0.02)


@pytest.fixture
def browser(tmp_path):
    """A headless browser of a laptop's size; skips where there is none."""
    webdriver = pytest.importorskip('selenium.webdriver')
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (program and driver):
        pytest.skip('needs chromium and its driver')
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-dev-shm-usage',
        '--window-size=1280,800',
        f'--user-data-dir={tmp_path}',
    ):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, Service(driver))
    yield driver
    driver.quit()


@pytest.fixture
def serving(stream, tiny):
    """`serving(**config)` starts a server and gives it; all are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(**more):
            running = Running(**{'stream': stream, 'folder': tiny, **more})
            running.thread.start()
            stack.callback(running.thread.join)
            stack.callback(setattr, running.web, 'should_exit', True)
            stack.callback(running.opened.close)
            running.until(lambda: running.web.started)
            return running

        yield start
