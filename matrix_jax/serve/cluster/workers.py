"""Past one machine, with Ray: a `World` per replica, one `Front` door, and a `Book` between them.

Ray Serve makes the worlds, watches them, replaces dead ones, and adds some while players wait: a
player holds one long request (`World.lease`) to the world that it plays, so that players are
what Serve counts. Frames and keys do not pass through Ray: the front is tied to the world's own
socket (`front`). Ray is an extra: nothing here imports it before it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import re
import secrets
import signal
import threading
import time
import warnings
from pathlib import Path

from matrix_jax.config import UsageError
from matrix_jax.serve.web import server as run

log = logging.getLogger(__name__)
NAME = 'matrix_jax'
SAVE_SECONDS = 1.0  # between two moments of a session in the book
GREET_SECONDS = 3.0  # between two words of a world that it is there
LOST_SECONDS = 2.0  # of play that a lost world may cost; an older moment is told of
# What Ray goes by here and in the workers of a cluster that is started here.
SETTINGS = {
    'RAY_USAGE_STATS_ENABLED': '0',  # it tells nobody
    'RAY_worker_niceness': '0',  # frames come before what else runs
    'RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S': '60',  # a slow machine is no dead one
    'RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S': '1',  # a waiting player counts soon
    'RAY_DEDUP_LOGS': '0',
    'RAY_COLOR_PREFIX': '0',  # lines stay as they are
}
# Keeps a cluster that is started here to loopback; on other systems than Linux this is usual.
ALONE = {'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}


@dataclasses.dataclass(frozen=True)
class Config:
    """How many worlds there are, and what each takes.

    Attributes:
      fewest, most: worlds; between them, waiting players decide.
      gpus, cpus: of one world, in Ray's count; None = as many GPUs as the mesh has devices if the
        cluster has any, and 1 CPU.
      drain: seconds that players get to finish when it stops.
      idle: seconds after which a world that is too many ends.
    """

    fewest: int = 1
    most: int = 4
    gpus: float | None = None
    cpus: float = 1.0
    drain: float = 30.0
    idle: float = 60.0

    def __post_init__(self):
        if not 1 <= self.fewest <= self.most <= 10_000:
            raise UsageError(f'--worlds: got {self.fewest}-{self.most}, expected such as 1-4')
        for name in ('gpus', 'cpus', 'drain', 'idle'):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f'--{name}: got {value}, expected at least 0')


def parse_worlds(text: str) -> tuple[int, int]:
    """(fewest, most) of '2' or '1-4'."""
    match = re.fullmatch(r'(\d+)(?:-(\d+))?', text)
    if not match:
        raise UsageError(f'--worlds: got {text!r}, expected a count such as 2, or 1-4')
    return int(match[1]), int(match[2] or match[1])


class Place:
    """A house whose players are sent by the front, at a port of its own.

    Args:
      slots, folder, recipe: as of `app.Server`.
      cfg: as of `run.serve`.
      secret: token of its socket.
      book: with the methods of `front.Book`, to be awaited.
      host: address of this machine that the fronts can reach.
    """

    def __init__(self, slots, folder, recipe: str, cfg: run.Config, secret: str, book, host: str):
        from matrix_jax.serve.web.app import Server

        self.server = Server(slots, folder, recipe, secret, cfg.grace, door=False)
        self.book, self._keepers = book, set()
        listening = run.listen(dataclasses.replace(cfg, host=host, port=0, token=secret))
        self.address = f'{host}:{listening.getsockname()[1]}'
        self._web = run.uvicorn_server(self.server.app(), cfg.players)
        # A loop of its own, so that no one else's work comes between the frames.
        self._thread = threading.Thread(target=self._web.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._web.started:
            if not self._thread.is_alive():
                raise RuntimeError('the world could not start')
            time.sleep(0.02)
        self.server.house.loop.call_soon_threadsafe(self._beside, self._greet())

    async def lease(self, session: str, wanted: dict, data: bytes | None, paused: bool):
        """Seats a player -> yields (address, ''), or (None, why not), and ends with the session."""
        from matrix_jax.serve.runtime.session_manager import Refused

        try:
            seated = await self._there(self._admit(session, wanted, data, paused))
        except (Refused, UsageError) as error:
            yield None, str(error)
            return
        yield self.address, ''
        await self._there(seated.over.wait())

    def check_health(self):
        """Called by Serve; raises where this world is to be replaced."""
        if not (self.server.engine.alive and self._thread.is_alive()):
            raise RuntimeError('the engine has stopped')

    def close(self):
        """Ends all sessions; players who are still there go on elsewhere."""
        self._web.should_exit = True
        self._thread.join(60)

    async def _admit(self, token: str, wanted: dict, data: bytes | None, paused: bool):
        house = self.server.house
        new = token not in house.sessions
        session = await house.admit(token, wanted, data, paused)
        if new:
            await self.book.claim(session.token, self.address, paused)
            self._beside(keep(house, session, self.book, self.address))
        return session

    async def _greet(self):
        """Tells the book, again and again, that this world is there."""
        while True:
            with contextlib.suppress(Exception):  # the book may be starting again
                await self.book.open(self.address, self.server.world_bytes)
            await asyncio.sleep(GREET_SECONDS)

    def _beside(self, coroutine):
        task = asyncio.create_task(coroutine)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    async def _there(self, coroutine):
        """Awaits in the loop of the house."""
        loop = self.server.house.loop
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


class World(Place):
    """A replica of Ray Serve: opens the recipe on this machine, and takes the house's events."""

    def __init__(self, recipe, cfg: run.Config, secret: str, book):
        import ray

        run.log_to_stderr()
        stay_local()
        super().__init__(
            *run.open_slots(recipe, cfg),
            recipe.name,
            cfg,
            secret,
            book,
            ray.util.get_node_ip_address(),
        )

    __del__ = Place.close  # what Serve calls in the end


async def keep(house, session, book, address: str):
    """Writes the newest moment of a session into the book until the session is over."""
    saved, newest = None, time.monotonic()
    while not session.over.is_set():
        began = time.monotonic()
        timeline = session.seat.log
        now = timeline, len(timeline.symbols), len(timeline.prompts)
        try:
            # What rests is still as it was saved.
            data = await house.save(session) if now != saved else None
            await book.put(session.token, address, data, session.paused, time.monotonic() - began)
            late, saved, newest = time.monotonic() - newest, now, began
        except Exception as error:  # the next one may succeed
            late = time.monotonic() - newest
            log.warning(
                'moment_not_saved',
                extra={'fields': {'session': session.token[:6], 'error': str(error)}},
            )
        if late > LOST_SECONDS:
            log.warning(
                'moment_late',
                extra={'fields': {'session': session.token[:6], 'seconds': round(late, 2)}},
            )
        # Where saving takes long it begins sooner, so that the next one is there in time.
        took = time.monotonic() - began
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, min(SAVE_SECONDS, LOST_SECONDS - 2 * took) - took)):
                await session.over.wait()
    if session.reason != 'stopped':  # else it goes on elsewhere
        await book.leave(session.token, address)


class Remote:
    """The methods of an actor as coroutines."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name: str):
        if name.startswith('_'):
            raise AttributeError(name)
        method = getattr(self._actor, name)

        async def call(*given):
            return await method.remote(*given)

        return call


# --- what tools/play.py --ray does ---------------------------------------------------------------


def joins() -> bool:
    """Whether there may be a cluster to join: RAY_ADDRESS names it, or `ray start` left word."""
    given = os.environ.get('RAY_ADDRESS')
    if given:
        return given != 'local'
    folders = {os.environ.get(name) or '/tmp' for name in ('RAY_TMPDIR', 'TMPDIR')}
    return any((Path(one) / 'ray' / 'ray_current_cluster').exists() for one in folders)


def connect():
    """Joins a cluster or starts one -> the module `ray`.

    A cluster that is started here listens on loopback alone, and speaks only with programs that
    know its token. In one that is joined, the worlds listen at the address of their node, which
    other machines can reach: they ask for a secret, but frames and carries go there in the clear,
    and what else listens is up to who started it. That wants a private network.

    Raises:
      UsageError: Ray is not installed, or does not answer.
    """
    alone = not joins()
    for name, value in (SETTINGS | ALONE if alone else SETTINGS).items():
        os.environ.setdefault(name, value)
    if alone:  # Ray asks for it by itself, and would leave one in the home folder
        os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'matrix_jax[ray]'") from None
    logging.getLogger('ray._private.authentication').setLevel(logging.ERROR)  # it is as wanted
    with warnings.catch_warnings():  # JAX warns of forks; those of Ray start other programs
        warnings.filterwarnings('ignore', r'os\.fork', RuntimeWarning)
        try:
            ray.init(
                'local' if alone else None,
                namespace=NAME,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
        except ConnectionError as error:
            raise UsageError(f'--ray: the cluster to join does not answer: {error}') from error
    if alone and not run.loopback(ray.util.get_node_ip_address()):
        log.warning(
            'cluster_reachable',
            extra={
                'fields': {
                    'address': ray.util.get_node_ip_address(),
                    'why': 'Ray was imported before',
                }
            },
        )
    return ray


def stay_local():
    """For a replica: where the cluster is on loopback, so is the port of Serve's own calls.

    Ray has no setting for it, and binds it everywhere; callers need the cluster's token then.
    """
    import ray
    from ray.serve._private import replica

    host, bind = ray.util.get_node_ip_address(), getattr(replica, 'add_port_to_grpc_server', None)
    if bind and run.loopback(host):
        replica.add_port_to_grpc_server = lambda server, address: bind(
            server, address.replace('[::]', host)
        )


def build(recipe, cfg: run.Config, worlds: Config, book, gpus: float):
    """The Serve application: worlds behind a front."""
    from ray import serve

    from matrix_jax.serve.cluster import gateway

    secret, token = secrets.token_hex(16), cfg.token

    def make_front():
        run.log_to_stderr()
        stay_local()
        handle = serve.get_deployment_handle('World', NAME).options(stream=True)

        async def lease(*given):
            answer = handle.lease.remote(*given)
            try:
                async for one in answer:
                    yield one
            finally:
                answer.cancel()

        return gateway.Front(Remote(book), lease, secret, token).app()

    class Door:
        """Serve's name for the front, which needs the world to be there."""

        def __init__(self, world):
            pass

    quiet = {'log_level': 'WARNING', 'enable_access_log': False, 'encoding': 'JSON'}
    # Of each player a socket, the one that it had before, and two files; and some who are told at
    # once that all is full.
    asked = 4 * cfg.players * worlds.most + 64
    world = serve.deployment(
        World,
        max_ongoing_requests=cfg.players,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=worlds.drain,
        max_constructor_retry_count=3,
        logging_config=quiet,
        ray_actor_options={'num_gpus': gpus, 'num_cpus': worlds.cpus},
        autoscaling_config={
            'min_replicas': worlds.fewest,
            'max_replicas': worlds.most,
            'target_ongoing_requests': cfg.players,
            'upscale_delay_s': 1,
            'look_back_period_s': 11,
            'downscale_delay_s': worlds.idle,
        },
    )
    door = serve.deployment(
        serve.ingress(make_front)(Door),
        name='Front',
        max_ongoing_requests=asked,
        max_queued_requests=64,
        graceful_shutdown_timeout_s=5,
        logging_config=quiet,
        ray_actor_options={'num_cpus': 0},
    )
    return door.bind(world.bind(recipe, cfg, secret, Remote(book)))


@contextlib.contextmanager
def running(recipe, cfg: run.Config, worlds: Config):
    """Joins a Ray cluster (RAY_ADDRESS, or that of `ray start`) or starts one; plays while open.

    Gives the book as an actor handle. At the end nobody new comes in, players get `worlds.drain`
    seconds, and all of it ends; a cluster that was joined goes on.
    """
    from matrix_jax.serve.cluster.registry import Book

    recipe = check(recipe, cfg)
    ray = connect()
    try:
        from ray import serve

        logging.getLogger('ray.serve').setLevel(logging.WARNING)
        for name in ('ray', 'ray.serve'):
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(run.JsonLines())
        where = 'HeadOnly' if run.loopback(cfg.host) else 'EveryNode'
        serve.start(
            proxy_location=where,
            http_options={'host': cfg.host, 'port': cfg.port},
            logging_config={'log_level': 'WARNING'},
        )
        if NAME in serve.status().applications:
            raise UsageError('--ray: this cluster plays already; stop that first')
        with contextlib.suppress(ValueError):  # of one that was killed
            ray.kill(ray.get_actor('book'))
        book = (
            ray.remote(Book)
            .options(name='book', lifetime='detached', num_cpus=0, max_restarts=-1)
            .remote(cfg.players * worlds.most)
        )
        gpus = worlds.gpus
        if gpus is None:
            gpus = recipe.mesh.devices if ray.cluster_resources().get('GPU') else 0
        try:
            serve.run(build(recipe, cfg, worlds, book, gpus), name=NAME)
            yield book
            drain(ray, book, worlds.drain)
        finally:
            serve.delete(NAME)
            ray.kill(book)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()


def check(recipe, cfg: run.Config):
    """The recipe with its weights by their whole path, for workers elsewhere.

    Raises:
      UsageError: what no world could start with, said once and here.
    """
    from matrix_jax import worlds
    from matrix_jax.weights import diffusers_layout

    run.listen(cfg).close()
    if not recipe.weights:
        raise UsageError(f'{recipe.name}: needs --weights')
    folder = diffusers_layout.resolve(recipe.weights)
    worlds.describe(recipe.world, folder, whole=True)
    return dataclasses.replace(recipe, weights=str(folder))


def drain(ray, book, seconds: float):
    """Lets nobody in, and waits until all have left, at most so long."""
    ray.get(book.close.remote(seconds))
    until = time.monotonic() + seconds + 2
    while time.monotonic() < until and ray.get(book.state.remote())['players']:
        time.sleep(0.5)


def serve(recipe, cfg: run.Config, worlds: Config):
    """Plays until it is interrupted."""
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.log_to_stderr()
    with running(recipe, cfg, worlds):
        print(
            f'{recipe.name} is ready after {time.perf_counter() - began:.0f} s, {worlds.fewest} '
            f'to {worlds.most} worlds of {cfg.players} players: open {cfg.url(cfg.port)}',
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f'closing; players have {worlds.drain:.0f} s to finish', flush=True)
