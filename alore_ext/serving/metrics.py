"""What the server counts, for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .batching import BatchRecord

__all__ = ["Metrics"]

_PREFIX = "alore_ext"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MOST_ADAPTERS = 1000  # label values ever used; adapters come and go, and Prometheus keeps every series


class Metrics:
    """Counters, histograms and gauges of one server.

    Label values are bounded: routes are templates, adapters are names that were loaded, never what a client sent.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self._requests = self._make(Counter, "requests", "Requests answered", ("route", "status", "adapter"))
        self._latency = self._make(
            Histogram, "request_seconds", "From the request's first byte to the answer's", ("route",), buckets=_SECONDS
        )
        self._rejected = self._make(Counter, "rejected", "Requests refused, by reason", ("reason",))
        self._batch_size = self._make(Histogram, "batch_size", "Images in a batch", (), buckets=_SIZES)
        self._batch_seconds = self._make(
            Histogram, "batch_seconds", "One batch through the model", (), buckets=_SECONDS
        )
        self._queue_seconds = self._make(
            Histogram, "queue_seconds", "A decoded image's wait for its batch", (), buckets=_SECONDS
        )
        self._failed = self._make(Counter, "failed_predictions", "Images that the model failed on", ())

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is read when it is asked for."""
        self._make(Gauge, name, help_text, ()).set_function(value)

    def request(self, route: str, status: int, seconds: float, adapter: str | None, known: Iterable[str]) -> None:
        """Count an answered request. `adapter` is what the client asked for, counted by name only if it is known."""
        self._requests.labels(route, str(status), self._adapter_label(adapter, known)).inc()
        self._latency.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def batch(self, record: BatchRecord) -> None:
        self._batch_size.observe(record.size)
        self._batch_seconds.observe(record.seconds)
        for seconds in record.waited:
            self._queue_seconds.observe(seconds)
        self._failed.inc(record.failed)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _adapter_label(self, adapter: str | None, known: Iterable[str]) -> str:
        if adapter is None:
            return ""
        if adapter in self._adapters:
            return adapter
        if adapter not in known:
            return "unknown"
        if len(self._adapters) >= _MOST_ADAPTERS:
            return "other"
        self._adapters.add(adapter)
        return adapter

    def _make(self, kind, name: str, help_text: str, labels: tuple[str, ...], **options):
        return kind(f"{_PREFIX}_{name}", help_text, labels, registry=self.registry, **options)
