"""An exported page in a real browser, with a stand-in for onnxruntime-web, so offline."""

import dataclasses
import functools
import http.server
import json
import threading
import time

import pytest

from matrix_jax import recipes
from matrix_jax.browser import folder, runtime
from tests.serve.conftest import browser  # noqa: F401

pytest.importorskip('onnx', reason='needs matrix_jax[web]')
# Frames are grey by the sum of the control, and the first value of the carry counts the steps.
STAND_IN = """
const about = ABOUT;
const arrays = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array};
const size = shape => shape.reduce((product, one) => product * one, 1);
export const env = {wasm: {}};
export class Tensor {
  constructor(type, data, dims) {
    if (data.length !== size(dims)) throw new Error('a tensor of a wrong size');
    Object.assign(this, {type, data, dims});
  }
}
const fresh = one => new Tensor(one.dtype, new arrays[one.dtype](size(one.shape)), one.shape);
export const InferenceSession = {
  async create() { return {run: async feeds => feeds.frames ? start(feeds) : step(feeds)}; }
};
const start = () => Object.fromEntries(
  about.programs.start.carry.map(one => [one.name, fresh(one)]));
function step(feeds) {
  const {carry, changed} = about.programs.step, made = {};
  for (const one of carry.filter(one => changed.includes(one.name))) {
    const next = fresh(one);
    next.data.set(feeds[one.name].data);
    next.data[0] += 1;
    made['next.' + one.name] = next;
  }
  const shade = feeds.control.data.reduce((sum, one) => sum + Number(one), 0);
  const shape = [1, about.step_frames, about.height, about.width, 3];
  const data = new Uint8Array(size(shape)).fill(40 + 20 * (shade % 10));
  made.frames = new Tensor('uint8', data, shape);
  return made;
}
"""
SHADE = (
    """return document.getElementById('canvas').getContext('2d').getImageData(0, 0, 1, 1).data[0]"""
)


@pytest.fixture(scope='module')
def site(tmp_path_factory, tiny):
    """A folder with the_matrix:TINY as a page, and a runtime that is none."""
    path = tmp_path_factory.mktemp('site')
    (path / 'dist').mkdir()
    for name in (*runtime.PROGRAMS, *(f'{one}.mjs' for one in runtime.LOADERS)):
        (path / 'dist' / name).write_text('')
    for name in runtime.LOADERS:
        (path / 'dist' / f'{name}.wasm').write_bytes(b'')
    run = dataclasses.replace(recipes.load('the_matrix:TINY'), weights=str(tiny))
    line = folder.save(run, path / 'page', 8, str(path / 'dist'))
    assert line.startswith(f'{path / "page"}: the_matrix:TINY, weights in 8 bits')
    about = (path / 'page' / folder.INDEX).read_text()
    (path / 'page' / 'runtime' / runtime.PROGRAMS[0]).write_text(STAND_IN.replace('ABOUT', about))
    return path / 'page'


@pytest.fixture
def address(site):
    """The address of a plain static server of the page."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=site)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'too late'
        time.sleep(0.02)


def test_a_page_has_all_that_it_lists(site):
    about = json.loads((site / folder.INDEX).read_text())
    for name, size in about['files'].items():
        if not name.startswith('runtime/'):
            assert (site / name).stat().st_size == size, name
    assert 'http' not in ''.join(  # nothing from other hosts
        path.read_text() for path in site.glob('*.js')
    ).replace('http.server', '')
    assert set(about['programs']) == {'start', 'step'}
    assert about['controls'][about['keys']['idle']]


def test_a_world_plays_in_a_tab(address, browser, tmp_path):  # noqa: F811
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_cdp_cmd(
        'Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(tmp_path)}
    )
    browser.get(address)

    def text(name):
        # None for a moment, because the page loads itself again once, for threads.
        found = browser.execute_script(f'return document.getElementById("{name}")?.textContent')
        return found or ''

    def click(name):
        browser.find_element('id', name).click()

    def shade():
        return browser.execute_script(SHADE)

    try:
        until(lambda: 'Threads of this machine' in text('status') and text('cover') == '')
    finally:
        print('the page said:', text('status'), text('cover'), browser.get_log('browser'))
    until(lambda: float(text('fps').split()[0].replace('-', '0')) > 0)
    idle = shade()
    keys = ActionChains(browser)
    keys.key_down('w').perform()
    until(lambda: shade() != idle)
    keys.key_up('w').perform()
    until(lambda: shade() == idle)
    until(lambda: 'ms' in text('latency'))
    click('keep')
    until(lambda: text('status').startswith('Saved.'))
    click('rewind')
    until(lambda: text('status').startswith('Went back'))
    click('recall')
    until(lambda: text('status').startswith('Returned'))
    click('pause')
    until(lambda: text('cover') == 'Paused')
    click('save')
    until(lambda: list(tmp_path.glob('*.world')))
    [saved] = tmp_path.glob('*.world')
    click('pause')
    browser.find_element('id', 'worldfile').send_keys(str(saved))
    until(lambda: text('status').startswith('World file loaded.'))
    click('record')
    until(lambda: text('record') == 'Stop recording')
    time.sleep(0.5)
    click('record')
    until(lambda: (tmp_path / 'drive.webm').is_file())
    assert (tmp_path / 'drive.webm').read_bytes()[:4] == b'\x1aE\xdf\xa3'  # EBML
    click('restart')
    until(lambda: text('status').startswith('New session.'))
    touch = browser.find_element('css selector', '#pad button')
    box = browser.execute_script(
        'arguments[0].scrollIntoView(); const box = arguments[0].getBoundingClientRect();'
        'return [box.x + box.width / 2, box.y + box.height / 2]',
        touch,
    )
    finger = [{'x': box[0], 'y': box[1]}]

    def fingers(kind, points):
        browser.execute_cdp_cmd('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})

    fingers('touchStart', finger)
    until(lambda: shade() != idle)
    fingers('touchEnd', [])
    until(lambda: shade() == idle)
    lines = [one['message'] for one in browser.get_log('browser') if one['level'] == 'SEVERE']
    assert not lines
