"""What Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ad_flashinfer_pass.runtime.engine import Engine

_PREFIX = "ad_flashinfer_pass_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "num_running": "Requests that hold pages.",
    "num_waiting": "Requests that hold none.",
    "pages_in_use": "Pages that requests use.",
    "pages_kept": "Pages kept for requests that begin alike.",
    "num_pages": "Pages that requests can use.",
}
_COUNTERS = {
    "num_steps": "Steps of the model.",
    "num_prompt_tokens": "Tokens of prompts.",
    "num_cached_tokens": "Tokens of prompts that were not computed.",
    "num_generated_tokens": "Tokens generated.",
    "num_preemptions": "Requests that lost their pages for a while.",
}
_OF_DRAFTS = {
    "num_verify_steps": "Steps that verified drafts.",
    "num_verified": "Sequences of those steps.",
}


class _OfEngine:
    """A collector of ``Engine.metrics``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        metrics = self._engine.metrics
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name.removeprefix("num_"), text, getattr(metrics, name))
        for name, text in (_COUNTERS | (_OF_DRAFTS if metrics.num_accepted else {})).items():
            yield CounterMetricFamily(_PREFIX + name.removeprefix("num_"), text, getattr(metrics, name))
        if metrics.num_accepted:
            accepted = CounterMetricFamily(
                f"{_PREFIX}accepted_drafts", "Drafts that were taken, by position.", labels=["position"]
            )
            for position, number in enumerate(metrics.num_accepted, 1):
                accepted.add_metric([f"{position}"], number)
            yield accepted


class ServerMetrics:
    """The engine's counters, and what the server itself sees.

    Args:
        engine: whose metrics are shown.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        registry = self._registry
        self.open_requests = Gauge(
            f"{_PREFIX}open_requests", "Continuations admitted and not yet answered.", registry=registry
        )
        self.first_token = Histogram(
            f"{_PREFIX}first_token_seconds", "To the first token.", buckets=_SECONDS, registry=registry
        )
        self._request = Histogram(
            f"{_PREFIX}request_seconds", "Of whole requests.", buckets=_SECONDS, registry=registry
        )
        self._ends = Counter(
            f"{_PREFIX}continuations", "How continuations ended.", ["reason"], registry=registry
        )

    def request_ended(self, seconds: float, reasons: Mapping[int, str]) -> None:
        """Count a request whose choices ended so."""
        self._request.observe(seconds)
        for reason in reasons.values() or ("left",):
            self._ends.labels(reason).inc()

    def exposition(self) -> tuple[bytes, str]:
        """The text, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
