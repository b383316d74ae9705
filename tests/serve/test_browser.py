"""The page in a real browser; skipped where there is none (Debian: chromium, chromium-driver)."""

import io
import json

import numpy as np
from PIL import Image

from matrix_jax.serve import replay
from matrix_jax.serve.app import to_jpeg

SIGHT = """const c = document.getElementById('canvas');
           return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"""


def test_a_person_plays(serving, browser, slots, tiny):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    server, keys = serving(grace=5.0), ActionChains(browser)

    def text(name):
        return browser.find_element(By.ID, name).text

    def click(name):
        browser.find_element(By.ID, name).click()

    def sight():
        return browser.execute_script(SIGHT)

    def moves():
        before = sight()
        server.until(lambda: sight() != before)

    def log():
        session = browser.execute_script('return sessionStorage.getItem("session")')
        return json.loads(server.http(f'/session/{session}/replay')[1])

    def hold(key, symbol):
        keys.key_down(key).perform()
        server.until(lambda: text('symbol') == symbol)
        server.until(lambda: symbol in log()['symbols'])
        moves()
        keys.key_up(key).perform()
        server.until(lambda: text('symbol') == 'N')

    def turn(key, symbol):
        """Holds a key from the saved moment on -> frames of the drive, whose last one is shown."""
        click('recall')
        keys.key_down(key).perform()
        click('pause')
        server.until(lambda: len(replay.from_json(log()).symbols) > kept + slots.lag + 2)
        click('pause')
        server.until(lambda: text('cover') == 'Paused')
        keys.key_up(key).perform()
        drive = replay.from_json(log())
        assert drive.symbols[-1] == symbol
        made = np.stack(list(replay.frames(slots.blank(), tiny, drive)))
        last = np.asarray(Image.open(io.BytesIO(to_jpeg(made[-1])))).astype(int)
        server.until(lambda: np.abs(
            np.reshape(sight(), (*last.shape[:2], 4))[..., :3] - last).mean() < 1)
        return made

    browser.get(f'http://127.0.0.1:{server.port}/')
    server.until(lambda: 'the_matrix:TINY' in text('status'))
    moves()
    hold('a', 'NL')
    hold(Keys.ARROW_RIGHT, 'NR')
    hold('w', 'D')
    server.until(lambda: text('latency').endswith('ms') and text('step').endswith('ms'))

    click('pause')
    server.until(lambda: text('cover') == 'Paused')
    click('keep')
    server.until(lambda: browser.find_element(By.ID, 'recall').is_enabled())
    kept = len(replay.from_json(log()).symbols)
    left, right = turn('a', 'NL'), turn('d', 'NR')       # the same moment, the other key
    bound, both = (kept + slots.lag) * slots.frames, min(len(left), len(right))
    np.testing.assert_array_equal(left[:kept * slots.frames], right[:kept * slots.frames])
    assert (left[bound:both] != right[bound:both]).any()
    click('pause')
    server.until(lambda: text('cover') == '')

    prompt = browser.find_element(By.ID, 'prompt')
    prompt.clear()
    prompt.send_keys('was dawn', Keys.ENTER)             # letters that steer elsewhere
    server.until(lambda: log()['prompts'] and log()['prompts'][-1][1] == 'was dawn')
    click('keep')
    server.until(lambda: browser.find_element(By.ID, 'recall').is_enabled())
    click('rewind')
    server.until(lambda: 'Went back' in text('status'))
    click('pause')
    server.until(lambda: text('cover') == 'Paused')
    click('recall')
    server.until(lambda: 'saved moment' in text('status'))

    browser.refresh()
    server.until(lambda: 'Welcome back' in text('status'))
    assert text('cover') == 'Paused' and log()['prompts'][-1][1] == 'was dawn'
    click('pause')
    moves()
    browser.set_window_size(400, 800)                    # a phone
    width = browser.execute_script('return document.documentElement.scrollWidth')
    assert width <= browser.execute_script('return innerWidth')
    click('leave')
    server.until(lambda: 'Stopped' in text('cover'))
    assert server.players() == 0
    assert [line for line in browser.get_log('browser') if line['level'] == 'SEVERE'] == []
