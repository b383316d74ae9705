"""The bundled world to walk in, as `matrix-jax play doom` serves it, played in a real browser."""

import time

import numpy as np
import pytest

from matrix_jax import recipes, worlds
from matrix_jax.serve.runtime.batched_stream import BatchedStream
from matrix_jax.weights import diffusers_layout
from tests.serve.web.test_browser import SIGHT

FOLDER = diffusers_layout.ASSETS / 'doom'


@pytest.fixture(scope='module')
def walk():
    """One slot of the bundled world, compiled."""
    return BatchedStream(*worlds.open_run(recipes.load('doom')), num_slots=1).compile()


def test_a_person_walks(walk, serving, browser):
    from selenium.webdriver.common.action_chains import ActionChains

    server = serving(stream=walk, folder=FOLDER, recipe='doom:PLAY')
    browser.get(f'http://127.0.0.1:{server.port}/')

    def text(name):
        return browser.find_element('id', name).text

    def sight():
        return np.reshape(browser.execute_script(SIGHT), (96, 160, 4))[..., :3].astype(int)

    def log():
        name = browser.execute_script('return sessionStorage.getItem("session")')
        return list(server.world.manager.sessions[name].slot.log.controls)

    def chain():
        return ActionChains(browser, duration=40)

    server.until(lambda: 'doom:PLAY' in text('status'))
    server.until(lambda: sight().std() > 10)  # a scene, and no blank
    before = sight()
    chain().key_down('w').perform()
    server.until(lambda: log() and log()[-1] == 'W')
    server.until(lambda: np.abs(sight() - before).mean() > 2)
    assert text('symbol') == 'W'
    # The mouse turns beside the key: held, it is dragged to the right.
    picture = browser.find_element('id', 'canvas')
    chain().move_to_element(picture).click_and_hold().perform()
    end = time.monotonic() + 60
    while not any(word.startswith('W+right') for word in log()):
        assert time.monotonic() < end, log()
        chain().move_by_offset(12, 0).perform()
    chain().release().key_up('w').perform()
    server.until(lambda: log()[-1] == 'idle')
    assert [line for line in browser.get_log('browser') if line['level'] == 'SEVERE'] == []
