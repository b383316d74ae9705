"""Two worlds in one app: each has players of its own, who can go from one to the other."""

import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from matrix_jax import config, recipes
from matrix_jax.serve.runtime import batched_stream
from matrix_jax.serve.web import server
from matrix_jax.serve.web.app import NO_SUCH_WORLD, WorldApp
from matrix_jax.serve.web.hosted_world import HostedWorld

ROAD, WALK = 'the_matrix:TINY', 'matrix_game_2:TINY'
TO_WALK = f'?world={WALK}'


@pytest.fixture
def running(stream, tiny, walk_stream, tiny_walk, serving):
    """A running app; three may drive, and two may walk."""
    return serving(
        app=WorldApp(
            {
                ROAD: HostedWorld(stream.empty_copy(), tiny, ROAD),
                WALK: HostedWorld(walk_stream.empty_copy(), tiny_walk, WALK),
            }
        )
    )


def sizes(player):
    return {np.asarray(Image.open(io.BytesIO(frame))).shape for frame in player.frames.values()}


def sessions(running):
    """How many play in each world."""
    worlds = json.loads(running.http('/healthz')[1])['worlds']
    return worlds[ROAD]['players'], worlds[WALK]['players']


def test_both_worlds_are_played_at_once(running):
    driver = running.join()
    assert driver.notes[0] == {'type': 'worlds', 'worlds': [ROAD, WALK], 'world': ROAD}
    driver.watch(16)
    walking = running.app.worlds[WALK].engine
    assert walking.steps == 0  # nobody plays it: it computes nothing
    walker = running.join(TO_WALK)
    assert walker.notes[0]['world'] == walker.welcome['world'] == WALK
    assert walker.welcome['controls'] != driver.welcome['controls']
    for player, symbol in ((driver, 'DL'), (walker, 'W')):
        player.send(type='keys', id=1, symbol=symbol)
        while 1 not in player.keys:
            player.read()
    driver.watch(8)
    assert sizes(driver) == {(32, 48, 3)} and sizes(walker) == {(16, 24, 3)}
    assert sessions(running) == (1, 1)

    # Files belong to the world of their session.
    logs = [json.loads(player.ask('replay')[1])['recipe'] for player in (driver, walker)]
    assert logs == [ROAD, WALK]
    status, saved = driver.ask('world')
    assert status == 200 and driver.ask('world', saved)[0] == 200
    status, message = walker.ask('world', saved)
    assert status == 422 and f'saved from another world ({ROAD})'.encode() in message
    assert running.http('/session/unknown/world')[0] == 404

    text = running.http('/metrics')[1].decode()
    for name in (ROAD, WALK):
        assert f'\nmatrix_jax_sessions{{world="{name}"}} 1.0' in text
        assert f'\nmatrix_jax_recompilations_total{{world="{name}"}} 0.0' in text
    assert walking.steps > 0 and b'<canvas' in running.http('/')[1]
    walking.stop()  # all are well, or it is not
    status, body = running.http('/healthz')
    assert status == 503 and not json.loads(body)['ok'] and json.loads(body)['worlds'][ROAD]['ok']
    driver.watch(8)


def test_a_full_world_leaves_the_others_open(running):
    walkers = [running.join(TO_WALK, seed=seed) for seed in range(2)]
    refused = running.join(TO_WALK)
    assert refused.welcome['code'] == 1013 and refused.notes[0]['type'] == 'worlds'
    driver = running.join()
    driver.watch(8)
    assert sessions(running) == (1, 2)
    # A player who switches worlds frees its slot.
    walkers[0].send(type='leave')
    back = running.join()
    running.until(lambda: sessions(running) == (2, 1))
    assert back.welcome['world'] == ROAD

    # A player who reconnects returns to the same world.
    walkers[1].close()
    token = walkers[1].welcome['session']
    again = running.join(TO_WALK, session=token)
    assert again.welcome['resumed'] and again.welcome['world'] == WALK
    again.watch(12)
    other = running.join(session=token)  # no world has a session of another one
    assert not other.welcome['resumed'] and other.welcome['session'] != token


@pytest.mark.parametrize(
    'query', ['?world=..%2F..%2Fetc%2Fpasswd', '?world=', TO_WALK[:-1], f'{TO_WALK}&world={ROAD}']
)
def test_a_world_that_is_not_there_is_refused(running, query):
    message = json.loads(running.connect(query).recv(timeout=60))
    assert message['type'] == 'closed' and message['code'] == NO_SUCH_WORLD
    assert message['message'].endswith(f'expected one of {ROAD}, {WALK}')
    assert sessions(running) == (0, 0)


def test_a_world_that_is_alone_offers_no_others(serving):
    assert serving().join(TO_WALK).notes[0]['type'] == 'welcome'


def test_worlds_are_compiled_one_after_the_other(stream, tiny, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(server, 'log_to_stderr', lambda: None)

    def opened(run, players, _binding, _together, say):
        say(f'compiling {run.name} for {players} players')
        return stream, tiny

    monkeypatch.setattr(batched_stream, 'open_stream', opened)
    monkeypatch.setattr(
        server,
        'uvicorn_server',
        lambda app, players: types.SimpleNamespace(run=lambda sockets: served.append(players)),
    )
    runs = [recipes.load(name, [f'--weights={tiny}']) for name in (ROAD, WALK)]
    server.serve(runs, server.Config(port=0))
    message = capsys.readouterr().out.splitlines()
    assert message[:2] == [f'compiling {name} for 4 players' for name in (ROAD, WALK)]
    assert message[2].startswith(
        f'{ROAD} and {WALK} are ready after 0 s, for 4 players each: open '
    )
    server.serve(runs[:1], server.Config(port=0))
    assert f'{ROAD} is ready after 0 s, for 4 players: open ' in capsys.readouterr().out
    assert served == [8, 4]
    with pytest.raises(config.UsageError, match='no folder nowhere'):  # before any compiles
        server.serve([runs[0], recipes.load(WALK, ['--weights=nowhere'])], server.Config(port=0))
    assert not capsys.readouterr().out


def test_a_page_goes_from_world_to_world(running, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def part(name):
        return browser.find_element('id', name)

    def shows(world, width):
        running.until(lambda: world in part('status').text and sum(sessions(running)) == 1)
        assert part('canvas').get_attribute('width') == str(width)

    browser.get(f'http://127.0.0.1:{running.port}/')
    shows(ROAD, 48)
    assert part('world').text.split() == [ROAD, WALK] and part('prompting').is_displayed()
    part('world').send_keys(Keys.ARROW_DOWN)  # no mouse is needed
    ActionChains(browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    shows(WALK, 24)
    assert sessions(running) == (0, 1) and not part('prompting').is_displayed()
    ActionChains(browser).key_down('w').perform()
    running.until(lambda: part('symbol').text == 'W')
    ActionChains(browser).key_up('w').perform()
    browser.refresh()
    running.until(lambda: 'Welcome back' in part('status').text)
    assert part('world').get_property('value') == WALK and sessions(running) == (0, 1)

    browser.execute_script('sessionStorage.setItem("world", "gone")')
    browser.refresh()
    running.until(lambda: f"world: got 'gone', expected one of {ROAD}" in part('cover').text)
    part('cover').find_element('tag name', 'button').click()
    running.until(lambda: ROAD in part('status').text)
    assert [line for line in browser.get_log('browser') if line['level'] == 'SEVERE'] == []
