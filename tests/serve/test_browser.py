"""The page in a real browser; skipped where there is none (Debian: chromium, chromium-driver)."""

import json
import shutil

import pytest

webdriver = pytest.importorskip('selenium.webdriver')
BROWSER, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason='needs chromium and its driver')
SUM = """const c = document.getElementById('canvas');
         return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.join('')"""


@pytest.fixture
def browser(tmp_path):
    """A headless browser of a laptop's size."""
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                 '--window-size=1280,800', f'--user-data-dir={tmp_path}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def test_a_person_plays(serving, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    server, keys = serving(grace=5.0), ActionChains(browser)

    def text(name):
        return browser.find_element(By.ID, name).text

    def click(name):
        browser.find_element(By.ID, name).click()

    def sight():
        return browser.execute_script(SUM)

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

    browser.get(f'http://127.0.0.1:{server.port}/')
    server.until(lambda: 'the_matrix:TINY' in text('status'))
    moves()
    hold('a', 'NL')
    hold(Keys.ARROW_RIGHT, 'NR')
    hold('w', 'D')
    server.until(lambda: text('latency').endswith('ms') and text('step').endswith('ms'))

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
