"""A world of keyboard and mouse; its first block differs from the others."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from matrix_jax.serve.runtime import replay, session_log


@pytest.fixture(scope='module')
def tiny(tiny_walk):
    """The weights of this world instead of the other."""
    return tiny_walk


@pytest.fixture(scope='module')
def stream(walk_stream):
    return walk_stream


def test_a_player_walks_and_looks_around(serving, stream, tiny):
    server = serving()
    player = server.join()
    offered = player.welcome['controls']
    assert offered['mouse'] and not player.welcome['reads_text']
    assert {'W', 'A', 'S', 'D'} <= {button['name'] for button in offered['buttons']}
    player.send(type='keys', id=1, symbol='w + Right:0.05')
    while 1 not in player.keys:
        player.read()
    assert player.keys[1] % stream.frames_per_step == 0 and stream.frames_per_step == 12
    for sent, message in (
        ({'type': 'keys', 'id': 2, 'symbol': 'hop'}, "unknown action 'hop'"),
        ({'type': 'prompt', 'text': 'a wood'}, 'reads no text'),
    ):
        player.send(**sent)
        assert message in player.wait('error')['message']
    file = io.BytesIO()
    Image.new('RGB', (40, 50), (200, 30, 30)).save(file, 'PNG')
    assert player.ask('picture', file.getvalue())[0] == 200
    player.wait('state')
    player.watch(24)
    log = session_log.from_json(json.loads(player.ask('replay')[1]))
    assert log.picture and set(log.controls) == {'W+right:0.05'}
    status, world = player.ask('world')
    assert status == 200 and player.ask('world', world)[0] == 200
    text = server.http('/metrics')[1].decode()
    assert '\nmatrix_jax_recompilations_total 0.0' in text
    made = np.stack(list(replay.frames(stream.empty_copy(), tiny, log)))
    assert made.shape == (12 * len(log.controls), 16, 24, 3) and made.std() > 3


SWIPE = """const c = document.getElementById('canvas');
           let x = 50;
           const at = kind => c.dispatchEvent(new PointerEvent(
             kind, {pointerId: 9, pointerType: 'touch', clientX: x, clientY: 50}));
           at('pointerdown');
           setInterval(() => { x += 10; at('pointermove'); }, 25);"""


def test_a_page_offers_the_keys_and_turns_by_a_finger(serving, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    server = serving(grace=5.0)

    def text(name):
        return browser.find_element(By.ID, name).text

    browser.get(f'http://127.0.0.1:{server.port}/')
    server.until(lambda: 'the arrows look around' in text('hint'))
    assert {button.text for button in browser.find_elements(By.CSS_SELECTOR, '#pad button')} == {
        'W',
        'A',
        'S',
        'D',
    }
    assert not browser.find_element(By.ID, 'prompting').is_displayed()
    ActionChains(browser).key_down('w').perform()
    server.until(lambda: text('symbol') == 'W')
    browser.execute_script(SWIPE)
    session = browser.execute_script('return sessionStorage.getItem("session")')
    server.until(
        lambda: 'W+right' in json.loads(server.http(f'/session/{session}/replay')[1])['symbols']
    )
    assert [line for line in browser.get_log('browser') if line['level'] == 'SEVERE'] == []


def test_a_log_of_other_words_is_refused(opened_log, stream):
    with pytest.raises(session_log.ReplayError, match="unknown action 'DL'"):
        replay.compile_stream(stream.world, stream.params, opened_log(['DL']))
    with pytest.raises(session_log.ReplayError, match="got 'right:0.1', expected 'right'"):
        replay.compile_stream(stream.world, stream.params, opened_log(['right:0.1']))


@pytest.fixture
def opened_log(stream):
    """A log of these controls."""

    def log(controls):
        return session_log.Log(
            'matrix_game_2:TINY',
            stream.fingerprint(),
            num_slots=2,
            together=1,
            control_binding='early',
            seed=7,
            prompt='',
            controls=controls,
        )

    return log
