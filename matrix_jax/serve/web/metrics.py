"""Prometheus metrics of a world."""

from __future__ import annotations

COMPILED = '/jax/core/compile/backend_compile_duration'


class Metrics:
    """The metrics of one world, in a registry of their own."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)

        def make(kind, name, about, **more):
            return kind(f'matrix_jax_{name}', about, registry=registry, **more)

        self.step = make(
            Histogram, 'step_seconds', 'time of a step of all active slots', buckets=buckets
        )
        self.latency = make(
            Histogram,
            'action_to_pixel_seconds',
            'from the arrival of a key until the first frame that shows it is sent',
            buckets=buckets,
        )
        self.frames = make(Counter, 'frames_sent', 'frames sent to players')
        self.dropped = make(Counter, 'frames_dropped', 'frames dropped because a player is slow')
        self.broken = make(Counter, 'worlds_broken', 'sessions restarted because of NaN')
        self.refused = make(
            Counter, 'players_refused', 'players refused because all slots are taken'
        )
        self.compiled = make(Counter, 'recompilations', 'programs compiled after the start')
        self.sessions = make(Gauge, 'sessions', 'sessions that have a slot')
        self.slots = make(Gauge, 'slots', 'slots for players')
        self.fps = make(Gauge, 'world_fps', 'frames per second that an active player gets')

    def record_step(self, seconds: float, frames: int, spacing: float):
        """Records a step: its time, its frames, and the seconds since the step before."""
        self.step.observe(seconds)
        self.fps.set(frames / spacing)

    def watch_compiler(self):
        """Counts compilations from now on -> a function that stops it."""
        from jax import monitoring

        def listen(event, *_, **__):
            if event == COMPILED:
                self.compiled.inc()

        monitoring.register_event_duration_secs_listener(listen)
        return lambda: monitoring.unregister_event_duration_listener(listen)


class LabelledMetrics:
    """A Prometheus collector that merges several worlds, each with the label `world`.

    Args:
      texts: name of a world -> its /metrics text.
    """

    def __init__(self, texts: dict[str, str]):
        self.texts = texts

    def collect(self):
        """The merged metrics; Prometheus calls it."""
        from prometheus_client.core import Metric
        from prometheus_client.parser import text_string_to_metric_families

        merged: dict[str, Metric] = {}
        for world, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    metric.add_sample(sample.name, sample.labels | {'world': world}, sample.value)
        return merged.values()
