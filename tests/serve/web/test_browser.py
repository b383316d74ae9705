"""The page in a real browser; skipped where there is none (Debian: chromium, chromium-driver)."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from matrix_jax import video
from matrix_jax.serve.runtime import replay, session_log
from matrix_jax.serve.web.encoding import to_jpeg

SIGHT = """const c = document.getElementById('canvas');
           return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"""
# All that the cover says from now on, however briefly.
COVERS = """window.covers = [];
            new MutationObserver(() => covers.push(document.getElementById('cover').textContent))
              .observe(document.getElementById('cover'), {childList: true});"""
# Where the buttons are: key -> centre and size.
PAD = """const pad = document.getElementById('pad');
         pad.scrollIntoView();
         return Object.fromEntries(Array.from(pad.children, one => {
           const box = one.getBoundingClientRect();
           return [one.dataset.key, [box.x + box.width / 2, box.y + box.height / 2, box.width,
                                     box.height]];
         }));"""
HELD_SECONDS = 3


class Page:
    """The page as a person has it."""

    def __init__(self, browser, server, downloads, query=''):
        from selenium.webdriver.common.action_chains import ActionChains

        self.browser, self.server, self.downloads = browser, server, downloads
        self.keys = ActionChains(browser)
        browser.execute_cdp_cmd(
            'Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(downloads)}
        )
        browser.get(f'http://127.0.0.1:{server.port}/{query}')
        self.says('status', 'the_matrix:TINY')

    def part(self, name):
        return self.browser.find_element('id', name)

    def text(self, name):
        return self.part(name).text

    def click(self, *names):
        for name in names:
            self.part(name).click()

    def says(self, name, text):
        """Waits for a text in a part of the page."""
        self.server.until(lambda: text in self.text(name))

    def rests(self, on=True):
        """Pauses, or goes on."""
        self.click('pause')
        self.server.until(lambda: self.text('cover') == ('Paused' if on else ''))

    def sight(self):
        return self.browser.execute_script(SIGHT)

    def moves(self):
        before = self.sight()
        self.server.until(lambda: self.sight() != before)

    def log(self):
        """What the page's session did so far, as the server has it."""
        name = self.browser.execute_script('return sessionStorage.getItem("session")')
        return self.server.world.manager.sessions[name].slot.log.copy()

    def obeys(self, symbol):
        """Waits until the newest step has a symbol -> how many steps there are."""
        self.server.until(lambda: self.steps() and self.log().controls[-1] == symbol)
        return self.steps()

    def steps(self):
        return len(self.log().controls)

    def troubles(self):
        """What the browser complained of since the last call."""
        return [
            line['message'] for line in self.browser.get_log('browser') if line['level'] == 'SEVERE'
        ]

    def choose(self, name, path):
        """What the file dialogue of an input would do."""
        self.part(name).send_keys(str(path))

    def downloaded(self, name):
        """Waits for a file -> its path."""
        path = self.downloads / name
        self.says('status', f'Saved {name}')
        self.server.until(path.exists)  # a browser names it so when it is whole
        return path


@pytest.fixture
def page(serving, browser, tmp_path):
    one = Page(browser, serving(), tmp_path)
    yield one
    print('the page said:', one.text('status'), one.text('cover'), one.troubles())


def hold(page, key, symbol):
    """A key is held for three seconds: the world obeys it throughout, and is let go with it."""
    began = time.monotonic()
    page.keys.key_down(key).perform()
    page.says('symbol', symbol)
    bound = page.obeys(symbol)
    page.moves()
    time.sleep(max(0, began + HELD_SECONDS - time.monotonic()))
    page.moves()
    obeyed = list(page.log().controls)[bound - 1 :]
    assert len(obeyed) > 2 and set(obeyed) == {symbol}
    page.keys.key_up(key).perform()
    page.obeys('N')
    assert page.text('symbol') == 'N'


def left_and_right_differ(page, stream, folder):
    """The page shows the last frame of the replayed log, and left differs from right."""
    page.click('restart')
    page.says('status', 'New session.')
    page.rests()
    page.click('keep')
    page.server.until(lambda: page.part('recall').is_enabled())
    kept = page.steps()

    def turn(key, symbol):
        page.click('recall')
        page.keys.key_down(key).perform()
        page.click('pause')
        page.server.until(lambda: page.steps() > kept + stream.lag + 2)
        page.rests()
        page.keys.key_up(key).perform()
        drive = page.log()
        assert drive.controls[-1] == symbol
        made = np.stack(list(replay.frames(stream.empty_copy(), folder, drive)))
        last = np.asarray(Image.open(io.BytesIO(to_jpeg(made[-1])))).astype(int)
        page.server.until(
            lambda: (
                np.abs(np.reshape(page.sight(), (*last.shape[:2], 4))[..., :3] - last).mean() < 1
            )
        )
        return made

    left, right = turn('a', 'NL'), turn('d', 'NR')
    bound, both = (kept + stream.lag) * stream.frames_per_step, min(len(left), len(right))
    np.testing.assert_array_equal(
        left[: kept * stream.frames_per_step], right[: kept * stream.frames_per_step]
    )
    assert (left[bound:both] != right[bound:both]).any()
    page.rests(False)


def a_prompt_applies_and_time_goes_back(page):
    from selenium.webdriver.common.keys import Keys

    prompt = page.part('prompt')
    prompt.clear()
    prompt.send_keys('was dawn', Keys.ENTER)  # letters that steer elsewhere
    page.server.until(lambda: page.log().last_prompt == 'was dawn')
    page.click('keep')
    page.server.until(lambda: page.part('recall').is_enabled())
    page.click('rewind')
    page.says('status', 'Went back')
    page.rests()
    page.click('recall')
    page.says('status', 'saved state')


def files_go_and_come(page, picture):
    """While it rests: a world file, the log, and a picture to start from."""
    page.click('save')
    saved, before = page.downloaded('drive.world'), page.log()
    page.click('log')
    assert session_log.loads(page.downloaded('session.json').read_text()) == before
    page.click('restart')
    page.says('status', 'New session.')
    assert page.log() != before
    page.choose('worldfile', saved)
    page.says('status', 'World file loaded.')
    assert page.log() == before

    page.choose('picturefile', picture)
    page.says('status', 'New session.')
    assert page.log().picture and not page.steps()
    assert page.troubles() == []
    page.choose('picturefile', saved)  # no picture: one line that says so
    page.says('status', 'drive.world: ')
    assert 'bad' in page.part('status').get_attribute('class')
    assert all('422' in message for message in page.troubles())
    page.choose('worldfile', saved)
    page.says('status', 'World file loaded.')


def a_recording_arrives(page):
    page.click('record')
    page.says('record', 'Stop recording')
    bound = page.steps()
    page.server.until(lambda: page.steps() > bound + 3)
    page.click('record')
    clip = video.read_video(page.downloaded('drive.mp4'), 100)
    assert len(clip) > 3 and clip.shape[-1] == 3 and np.diff(clip.astype(int), axis=0).any()


def a_cut_socket_is_opened_again(page):
    """By the page itself, in the same world, with the key that is still held."""
    before = page.log()
    page.keys.key_down('a').perform()
    page.obeys('NL')
    page.browser.execute_script(COVERS)
    web, manager = page.server.web, page.server.world.manager

    def cut():
        for connection in list(web.server_state.connections):
            connection.transport.abort()

    bound = page.steps()
    assert page.troubles() == []
    manager.loop.call_soon_threadsafe(cut)
    page.server.until(lambda: 'Welcome back' in page.text('status'), 30)
    assert any(
        'Reconnecting' in message for message in page.browser.execute_script('return covers')
    )
    page.server.until(lambda: page.steps() > bound + 3)
    after = page.log()
    assert after.seed == before.seed and after.controls[-1] == 'NL'
    assert page.server.players() == 1
    assert all('/play' in message for message in page.troubles())
    page.moves()
    page.keys.key_up('a').perform()
    page.obeys('N')


def touch_steers(page):
    """On a phone's screen: two fingers on the buttons, and nothing wider than the screen."""
    page.browser.set_window_size(400, 800)
    width = page.browser.execute_script('return document.documentElement.scrollWidth')
    assert width <= page.browser.execute_script('return innerWidth')
    pad = page.browser.execute_script(PAD)
    assert all(min(width, height) >= 44 for _, _, width, height in pad.values())  # thumbs

    def fingers(kind, *names):
        points = [{'x': pad[name][0], 'y': pad[name][1], 'id': at} for at, name in enumerate(names)]
        page.browser.execute_cdp_cmd(
            'Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points}
        )

    fingers('touchStart', 'up')
    page.says('symbol', 'D')
    fingers('touchStart', 'up', 'left')
    page.says('symbol', 'DL')
    page.obeys('DL')
    page.moves()
    fingers('touchEnd', 'up')
    page.says('symbol', 'NL')
    fingers('touchEnd')
    page.obeys('N')


def test_a_person_plays(page, browser, stream, tiny, start_image):
    from selenium.webdriver.common.keys import Keys

    page.moves()
    hold(page, 'a', 'NL')
    hold(page, Keys.ARROW_RIGHT, 'NR')
    hold(page, 'w', 'D')
    page.server.until(
        lambda: page.text('latency').endswith('ms') and page.text('step').endswith('ms')
    )
    left_and_right_differ(page, stream, tiny)
    a_prompt_applies_and_time_goes_back(page)

    browser.refresh()
    page.says('status', 'Welcome back')
    assert page.text('cover') == 'Paused' and page.log().last_prompt == 'was dawn'
    files_go_and_come(page, start_image)
    page.rests(False)
    page.moves()
    a_recording_arrives(page)
    a_cut_socket_is_opened_again(page)
    touch_steers(page)

    page.click('leave')
    page.says('cover', 'Stopped')
    assert page.server.players() == 0
    assert page.troubles() == []


def strike(page, code, key, symbol=None):
    """Presses a key of any keyboard; it steers as `symbol`, if given, while it is down."""
    event = {'code': code, 'key': key}
    page.browser.execute_cdp_cmd('Input.dispatchKeyEvent', {'type': 'keyDown', **event})
    if symbol:
        page.says('symbol', symbol)
    page.browser.execute_cdp_cmd('Input.dispatchKeyEvent', {'type': 'keyUp', **event})
    page.says('symbol', 'N')


def test_keys_of_other_keyboards(page):
    page.moves()
    assert page.text('hint').startswith('Hold W A S D or the arrows.')
    strike(page, 'KeyW', 'w', 'D')
    strike(page, 'KeyZ', 'w', 'D')  # AZERTY, whose W the page asked for
    assert page.text('hint').startswith('Hold W A S D')
    for code, key, symbol in (('KeyW', 'z', 'D'), ('KeyA', 'q', 'NL'), ('KeyQ', 'a', 'NL')):
        strike(page, code, key, symbol)
    assert page.text('hint').startswith('Hold Z Q S D')
    assert 'Backspace rewind' in page.text('shortcuts')
    strike(page, 'Backspace', 'Backspace')
    page.says('status', 'Went back')
    for code, key, symbol in (  # Dvorak
        *(('KeyW', ',', 'D'), ('KeyS', 'o', 'B'), ('KeyD', 'e', 'NR'), ('KeyA', 'a', 'NL')),
        ('Comma', 'w', 'D'),
    ):
        strike(page, code, key, symbol)
    assert page.text('hint').startswith('Hold , A O E')
    strike(page, 'KeyT', 'k')
    page.says('status', 'Saved.')
    strike(page, 'KeyP', 'l')
    page.says('status', 'saved state')
    for code, key in (('KeyW', 'w'), ('KeyS', 's'), ('KeyA', 'a'), ('KeyD', 'd')):
        strike(page, code, key)
    page.browser.execute_script("document.getElementById('status').textContent = ''")
    strike(page, 'KeyY', 'z')  # QWERTZ
    page.says('status', 'Went back')
    # A key that is down when another window or a shortcut of the browser takes over is let go.
    for event in (
        "new KeyboardEvent('keydown', {key: 'Meta', metaKey: true})",
        "new Event('blur')",
    ):
        page.keys.key_down('a').perform()
        page.says('symbol', 'NL')
        page.browser.execute_script(f'dispatchEvent({event})')
        page.says('symbol', 'N')
        page.keys.key_up('a').perform()
    page.keys.key_down('a').perform()
    page.says('symbol', 'NL')
    page.part('prompt').click()
    page.says('symbol', 'N')
    page.keys.key_up('a').perform()


def test_a_second_tab_takes_over_for_good(page):
    browser, first = page.browser, page.browser.current_window_handle
    for _ in range(3):
        page.moves()
        browser.execute_script('window.open(location.href)')
        page.says('cover', 'this session goes on in another window')
        (other,) = set(browser.window_handles) - {first}
        browser.switch_to.window(other)
        page.moves()
        assert page.text('cover') == '' and page.server.players() == 1
        browser.close()
        browser.switch_to.window(first)
        browser.find_element('css selector', '#cover button').click()


def test_the_page_says_why(serving, browser, tmp_path):
    """A session that is over, and an address that is no longer right."""
    server = serving(token='secret1234', grace=0.2)
    page = Page(browser, server, tmp_path, '?token=secret1234')
    page.moves()
    browser.execute_script('socket.close(); clearTimeout(retry); ended = true')
    server.until(lambda: server.players() == 0)
    browser.execute_script('restartPage()')
    page.says('status', 'Your earlier session is over')
    page.moves()
    server.access.token = 'another1234'
    browser.execute_script('socket.close()')
    page.says('cover', 'open the address that the server printed')
