"""Mouse look of the page in a real browser, with a server that only listens: no world compiles."""

import json
import threading
import time
from http import HTTPStatus

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.sync.server import serve

from matrix_jax.controls.keyboard_mouse import KeyboardMouseVocabulary
from matrix_jax.serve.web import base_app, protocol

PAGE = base_app.PAGE.read_bytes()
WORDS = KeyboardMouseVocabulary('universal')


class PageServer:
    """Gives the page, welcomes it, and keeps what it says."""

    def __init__(self, vocabulary):
        self.vocabulary, self.symbols = vocabulary, []
        # A browser opens sockets that it never speaks on; the server waits for them at its end.
        self.server = serve(
            self.talk, '127.0.0.1', 0, process_request=self.page, open_timeout=2, close_timeout=0.2
        )
        self.port = self.server.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def page(self, connection, request):
        if request.path != '/play':
            return Response(
                HTTPStatus.OK,
                'OK',
                Headers({'Content-Type': 'text/html'}),
                PAGE if request.path == '/' else b'',
            )

    def talk(self, socket):
        socket.send(
            json.dumps(
                {
                    'type': 'welcome',
                    'session': 'one',
                    'width': 48,
                    'height': 32,
                    'starts': [],
                    'start': '',
                    'prompt': '',
                    'controls': self.vocabulary.key_layout(),
                    'reads_text': False,
                    'world': 'walk',
                    'fps': 16,
                    'message': '',
                    'resumed': False,
                    'paused': False,
                    'kept': False,
                    'players': 1,
                    'shift_frames': 12,
                }
            )
        )
        for text in socket:
            message = protocol.parse(text)
            if message['type'] == 'keys':
                assert self.vocabulary.canonical(message['symbol'])
                self.symbols.append(message['symbol'])

    def close(self):
        self.server.shutdown()
        self.thread.join()


@pytest.fixture
def opened(browser):
    """`opened(mode)` -> (server, the picture) of a page that has been welcomed."""
    servers = []

    def start(mode):
        from selenium.webdriver.common.by import By

        servers.append(PageServer(KeyboardMouseVocabulary(mode)))
        browser.get(f'http://127.0.0.1:{servers[-1].port}/')
        until(lambda: servers[-1].symbols == ['idle'])
        browser.execute_script('patience = Infinity')  # the server says no more
        return servers[-1], browser.find_element(By.ID, 'canvas')

    yield start
    browser.get('about:blank')
    for server in servers:
        server.close()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(0.02)


def heard(server, word):
    """Waits until an action has the word, and then until nothing is asked for any more."""
    until(lambda: any(word in symbol for symbol in server.symbols))
    until(lambda: server.symbols[-1] == 'idle')
    message, server.symbols[:] = set(server.symbols), ['idle']
    return message


@pytest.mark.parametrize('mode', ['universal', 'matrix_game_3'])
def test_the_mouse_looks_around_by_drag_finger_and_lock(opened, browser, mode):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    from selenium.webdriver.common.by import By

    server, picture = opened(mode)

    def locked():
        return browser.execute_script(
            'return document.pointerLockElement === document.getElementById("canvas")'
        )

    def status():
        return browser.find_element(By.ID, 'status').text

    def chain():
        return ActionChains(browser, duration=40)

    # By drag, and past the edge of the picture.
    chain().move_to_element(picture).click_and_hold().move_by_offset(80, 0).perform()
    assert any(word.startswith('right') for word in heard(server, 'right'))
    chain().move_by_offset(0, -60).perform()
    heard(server, 'up')
    chain().release().perform()
    chain().move_by_offset(-90, 0).perform()  # let go: nothing
    time.sleep(0.2)
    assert server.symbols == ['idle'] and not locked()

    # By finger, with a key at the same time.
    chain().key_down('w').perform()
    until(lambda: server.symbols[-1] == 'W')
    touch = PointerInput('touch', 'finger')
    swipe = ActionBuilder(browser, mouse=touch, duration=60)
    swipe.pointer_action.move_to(picture).pointer_down().move_by(-90, 0).pointer_up()
    swipe.perform()
    until(lambda: any(word.startswith('W+left') for word in server.symbols))
    chain().key_up('w').perform()
    heard(server, 'W')
    assert not locked()

    # By the mouse alone behind a click; no fast movement is more than the page's limit.
    chain().move_to_element(picture).click().perform()
    until(locked)
    until(lambda: 'Esc to release' in status())
    chain().move_by_offset(400, 0).perform()
    limit = WORDS.key_layout()['mouse']['limit']
    assert f'right:{limit:g}' in {WORDS.canonical(word) for word in heard(server, 'right')}
    browser.execute_script('document.exitPointerLock()')
    until(lambda: not locked())

    # A browser that keeps its mouse says so.
    browser.execute_script(
        'document.getElementById("canvas").requestPointerLock = '
        '() => Promise.reject(new Error("no"))'
    )
    chain().move_to_element(picture).click().perform()
    until(lambda: 'drag the picture' in status())
    assert [line for line in browser.get_log('browser') if line['level'] == 'SEVERE'] == []


def test_where_nothing_looks_around_the_mouse_does_nothing(opened, browser):
    from selenium.webdriver.common.action_chains import ActionChains

    server, picture = opened('templerun')
    ActionChains(browser, duration=40).move_to_element(picture).click_and_hold().move_by_offset(
        60, 0
    ).release().click().key_down('d').perform()
    until(lambda: server.symbols == ['idle', 'rightside'])
    assert browser.execute_script('return document.pointerLockElement') is None


def test_a_socket_that_falls_silent_is_given_up(opened, browser):
    server, _ = opened('templerun')
    browser.execute_script('patience = 100')
    until(lambda: len(server.symbols) > 1)
    assert set(server.symbols) == {'idle'}  # joined again, and sent the held keys
    browser.execute_script('patience = Infinity')
