"""What the server counts, in Prometheus' form and a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mlx_qlora.serving.jobs import EngineStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PREFIX = "mlx_qlora_"
_GAUGES = {
    "num_queued": ("requests_queued", "Prompts that wait for a place in the batch."),
    "num_running": ("requests_running", "Prompts and answers in the batch."),
    "is_alive": ("generation_alive", "1 while the generation thread lives."),
}
_COUNTERS = {
    "num_finished": ("answers_finished", "Answers that came to their end."),
    "num_cancelled": ("answers_cancelled", "Answers whose client left, or that were cut off."),
    "num_failed": ("answers_failed", "Answers that could not be generated."),
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts, cached ones included."),
    "num_cached_tokens": ("cached_prompt_tokens", "Tokens of prompts that were not computed again."),
    "num_generated_tokens": ("generated_tokens", "Tokens of answers."),
}


class Metrics:
    """Counts of requests and times, and the engine's own counts when they are asked for.

    Args:
        stats: The engine's counts, now.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self._stats = stats
        self.registry.register(self)
        self._responses = Counter(
            _PREFIX + "http_responses", "Responses.", ["path", "status"], registry=self.registry
        )
        self._times = {
            name: Histogram(_PREFIX + name, text, buckets=_SECONDS, registry=self.registry)
            for name, text in (
                ("first_token_seconds", "From a job's submission to its first token."),
                ("request_seconds", "From a job's submission to its last token."),
            )
        }

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, for prometheus_client."""
        stats = self._stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=float(getattr(stats, field)))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=float(getattr(stats, field)))

    def observe(self, name: str, seconds: float) -> None:
        """A time the engine measured, on its thread."""
        if name in self._times:
            self._times[name].observe(seconds)

    def count_response(self, path: str, status: int) -> None:
        """One response of a route; its path, never the client's text."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Everything, as a scraper reads it."""
        return generate_latest(self.registry)
