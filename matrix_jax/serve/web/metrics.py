"""What the server counts, for Prometheus."""

from __future__ import annotations

COMPILED = '/jax/core/compile/backend_compile_duration'


class Meters:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        steps = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)

        def make(kind, name, about, **more):
            return kind(f'matrix_jax_{name}', about, registry=registry, **more)

        self.step = make(
            Histogram, 'step_seconds', 'time of a shift of all active slots', buckets=steps
        )
        self.latency = make(
            Histogram,
            'action_to_pixel_seconds',
            'from a key that arrives to the first frame bound to it that leaves',
            buckets=steps,
        )
        self.frames = make(Counter, 'frames_sent', 'frames sent to players')
        self.dropped = make(Counter, 'frames_dropped', 'frames that slow readers did not get')
        self.broken = make(Counter, 'worlds_broken', 'worlds that were reset for NaN')
        self.refused = make(Counter, 'players_refused', 'players that a full house turned away')
        self.compiled = make(Counter, 'recompilations', 'programs compiled after the start')
        self.sessions = make(Gauge, 'sessions', 'sessions that hold a slot')
        self.slots = make(Gauge, 'slots', 'places for players')
        self.fps = make(Gauge, 'world_fps', 'frames per second that an active player gets')

    def shifted(self, seconds: float, frames: int, spacing: float):
        """One shift is done, in so many seconds, and comes so long after the one before it."""
        self.step.observe(seconds)
        self.fps.set(frames / spacing)

    def watch_compiler(self):
        """Counts compilations from now on -> a function that ends it."""
        from jax import monitoring

        def listen(event, *_, **__):
            if event == COMPILED:
                self.compiled.inc()

        monitoring.register_event_duration_secs_listener(listen)
        return lambda: monitoring.unregister_event_duration_listener(listen)

    def text(self) -> tuple[bytes, str]:
        """(body, content type) of /metrics."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
