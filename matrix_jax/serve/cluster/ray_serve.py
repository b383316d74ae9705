"""A cluster with Ray Serve: a `WorldReplica` per worker, a `Gateway`, and a `SessionRegistry`.

Ray Serve starts the replicas, watches them, replaces dead ones, and starts more while players wait:
every player holds one long request (`WorkerServer.lease`), so Serve counts players. Frames and keys
do not pass through Ray; the gateway connects to each worker's own port. Ray is an optional extra,
imported only when it is used.
"""

from __future__ import annotations

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
from matrix_jax.serve.cluster.registry import SessionRegistry
from matrix_jax.serve.cluster.worker import WorkerServer
from matrix_jax.serve.runtime.batched_stream import open_stream
from matrix_jax.serve.web import server

log = logging.getLogger(__name__)
NAME = 'matrix_jax'
REGISTRY_NAME = 'session_registry'
# Settings of Ray, here and in the workers of a cluster that is started here.
SETTINGS = {
    'RAY_USAGE_STATS_ENABLED': '0',  # no telemetry
    'RAY_worker_niceness': '0',  # do not lower the priority of workers
    'RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S': '60',  # a slow machine may just be busy
    'RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S': '1',  # notice waiting players soon
    'RAY_DEDUP_LOGS': '0',
    'RAY_COLOR_PREFIX': '0',  # keep log lines valid JSON
}
# Keeps a cluster that is started here on loopback; this is Ray's default except on Linux.
LOCAL_SETTINGS = {'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}
# Ray gives each of its programs a fixed time to start, 30 s, which a slow machine needs longer for.
# They start faster the next time, when the machine has read them from the disk.
START_ATTEMPTS = 3
QUIET = {'log_level': 'WARNING', 'enable_access_log': False, 'encoding': 'JSON'}


@dataclasses.dataclass(frozen=True)
class Config:
    """How many replicas there are, and what each uses.

    Attributes:
      fewest, most: replicas; waiting players decide between them.
      gpus, cpus: of one replica, as Ray counts them; None = as many GPUs as the mesh has devices if
        the cluster has any, and 1 CPU.
      drain: seconds that players get to finish when the cluster stops.
      idle: seconds after which a superfluous replica ends.

    Raises:
      UsageError: a field is out of range.
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
    """Parses '2' or '1-4' -> (fewest, most).

    Raises:
      UsageError: it is neither.
    """
    match = re.fullmatch(r'(\d+)(?:-(\d+))?', text)
    if not match:
        raise UsageError(f'--worlds: got {text!r}, expected a count such as 2, or 1-4')
    return int(match[1]), int(match[2] or match[1])


class WorldReplica(WorkerServer):
    """A replica of Ray Serve: opens the recipe on its machine."""

    def __init__(self, recipe, cfg: server.Config, secret: str, registry):
        import ray

        server.log_to_stderr()
        stream, folder = open_stream(recipe, cfg.players, cfg.control_binding, cfg.together)
        host = ray.util.get_node_ip_address()
        super().__init__(stream, folder, recipe.name, cfg, secret, registry, host)

    __del__ = WorkerServer.close  # Serve calls it at the end


class ActorProxy:
    """Calls the methods of a Ray actor as coroutines."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name: str):
        if name.startswith('_'):
            raise AttributeError(name)
        method = getattr(self._actor, name)

        async def call(*args):
            return await method.remote(*args)

        return call


def can_join() -> bool:
    """Whether there may be a cluster to join: RAY_ADDRESS names it, or `ray start` recorded one."""
    address = os.environ.get('RAY_ADDRESS')
    if address:
        return address != 'local'
    folders = {os.environ.get(name) or '/tmp' for name in ('RAY_TMPDIR', 'TMPDIR')}
    return any((Path(one) / 'ray' / 'ray_current_cluster').exists() for one in folders)


def connect():
    """Joins a cluster or starts one -> the module `ray`.

    A cluster that is started here has a token of its own. It listens on loopback only, except for
    the port of each Serve replica: Ray binds it to all addresses, and it refuses calls without the
    token. In a cluster that is joined, workers listen on the address of their node and require a
    secret, but frames and carries are not encrypted there. Use a private network.

    Raises:
      UsageError: Ray is not installed, or the cluster does not answer or start.
    """
    local = not can_join()
    for name, value in (SETTINGS | LOCAL_SETTINGS if local else SETTINGS).items():
        os.environ.setdefault(name, value)
    if local:  # otherwise Ray generates a token and leaves it in the home folder
        os.environ.setdefault('RAY_AUTH_MODE', 'token')
        os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'matrix_jax[ray]'") from None
    with warnings.catch_warnings():  # JAX warns about forks, but Ray's start other programs
        warnings.filterwarnings('ignore', r'os\.fork', RuntimeWarning)
        _init(ray, local)
    address = ray.util.get_node_ip_address()
    if local and not server.is_loopback(address):
        fields = {'address': address, 'why': 'Ray was imported before'}
        log.warning('cluster_reachable', extra={'fields': fields})
    return ray


def _init(ray, local: bool):
    """Joins a cluster, or starts one; on a slow machine that takes several attempts."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                'local' if local else None,
                namespace=NAME,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
            return
        except ConnectionError as error:
            raise UsageError(f'--ray: the cluster to join does not answer: {error}') from error
        except Exception as error:  # Ray raises plain ones when a part of it is late
            ray.shutdown()
            if not local or attempt == START_ATTEMPTS - 1:
                reason = str(error).partition('\n')[0]
                raise UsageError(f'--ray: no cluster could be started: {reason}') from error


def build(recipe, cfg: server.Config, cluster: Config, registry, gpus: float):
    """The Serve application: replicas behind a gateway.

    Args:
      recipe, cfg: what each replica serves, and how.
      cluster: number and size of the replicas.
      registry: actor handle of the `SessionRegistry`.
      gpus: of one replica.
    """
    from ray import serve

    from matrix_jax.serve.cluster.gateway import Gateway

    secret, token, root_path = secrets.token_hex(16), cfg.token, cfg.root_path

    def make_gateway():
        server.log_to_stderr()
        handle = serve.get_deployment_handle('WorldReplica', NAME).options(stream=True)

        async def lease(*args):
            answer = handle.lease.remote(*args)
            try:
                async for one in answer:
                    yield one
            finally:
                answer.cancel()

        return Gateway(ActorProxy(registry), lease, secret, token, root_path).asgi()

    class GatewayIngress:
        """The deployment of the gateway; its argument makes Serve start the replicas first."""

        def __init__(self, replica):
            pass

    replica = serve.deployment(
        WorldReplica,
        max_ongoing_requests=cfg.players,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=cluster.drain,
        max_constructor_retry_count=3,
        logging_config=QUIET,
        ray_actor_options={'num_gpus': gpus, 'num_cpus': cluster.cpus},
        autoscaling_config={
            'min_replicas': cluster.fewest,
            'max_replicas': cluster.most,
            'target_ongoing_requests': cfg.players,
            'upscale_delay_s': 1,
            'look_back_period_s': 11,
            'downscale_delay_s': cluster.idle,
        },
    )
    gateway = serve.deployment(
        serve.ingress(make_gateway)(GatewayIngress),
        name='Gateway',
        # Per player a socket, the socket before it and two files; and some to refuse at once.
        max_ongoing_requests=4 * cfg.players * cluster.most + 64,
        max_queued_requests=64,
        graceful_shutdown_timeout_s=5,
        logging_config=QUIET,
        ray_actor_options={'num_cpus': 0},
    )
    return gateway.bind(replica.bind(recipe, cfg, secret, ActorProxy(registry)))


@contextlib.contextmanager
def running(recipe, cfg: server.Config, cluster: Config):
    """Joins a Ray cluster (RAY_ADDRESS, or that of `ray start`) or starts one, and serves.

    Yields the actor handle of the `SessionRegistry`. At the end no new players are admitted, the
    others get `cluster.drain` seconds, and everything stops; a cluster that was joined goes on.
    """
    recipe = check(recipe, cfg)
    ray = connect()
    try:
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler, set by `connect`, would end this process and leave the cluster.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        from ray import serve

        logging.getLogger('ray.serve').setLevel(logging.WARNING)
        for name in ('ray', 'ray.serve'):
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(server.JsonLines())
        serve.start(
            proxy_location='HeadOnly' if server.is_loopback(cfg.host) else 'EveryNode',
            http_options={'host': cfg.host, 'port': cfg.port},
            logging_config={'log_level': 'WARNING'},
        )
        if NAME in serve.status().applications:
            raise UsageError('--ray: this cluster plays already; stop that first')
        with contextlib.suppress(ValueError):  # left by a process that was killed
            ray.kill(ray.get_actor(REGISTRY_NAME))
        registry = (
            ray.remote(SessionRegistry)
            .options(name=REGISTRY_NAME, lifetime='detached', num_cpus=0, max_restarts=-1)
            .remote(cfg.players * cluster.most)
        )
        gpus = cluster.gpus
        if gpus is None:
            gpus = recipe.mesh.devices if ray.cluster_resources().get('GPU') else 0
        try:
            serve.run(build(recipe, cfg, cluster, registry, gpus), name=NAME)
            yield registry
            drain(ray, registry, cluster.drain)
        finally:
            serve.delete(NAME)
            ray.kill(registry)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()


def check(recipe, cfg: server.Config):
    """Checks what every replica needs -> the recipe with the absolute path of its weights.

    Raises:
      UsageError: the address is not available, or the weights do not fit.
    """
    from matrix_jax import worlds
    from matrix_jax.weights import diffusers_layout

    server.listen(cfg).close()
    if not recipe.weights:
        raise UsageError(f'{recipe.name}: needs --weights')
    folder = diffusers_layout.resolve(recipe.weights)
    worlds.describe(recipe.world, folder, whole=True)
    return dataclasses.replace(recipe, weights=str(folder))


def drain(ray, registry, seconds: float):
    """Refuses new players, and waits at most `seconds` until the others have left."""
    ray.get(registry.close.remote(seconds))
    until = time.monotonic() + seconds + 2
    while time.monotonic() < until and ray.get(registry.state.remote())['players']:
        time.sleep(0.5)


def serve(recipe, cfg: server.Config, cluster: Config):
    """Serves until Ctrl-C or SIGTERM; both let the players finish."""
    began = time.perf_counter()
    server.log_to_stderr()
    with running(recipe, cfg, cluster):
        print(
            f'{recipe.name} is ready after {time.perf_counter() - began:.0f} s, {cluster.fewest} '
            f'to {cluster.most} worlds of {cfg.players} players: open {cfg.url(cfg.port)}',
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f'closing; players have {cluster.drain:.0f} s to finish', flush=True)
