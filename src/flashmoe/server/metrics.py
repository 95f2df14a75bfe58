"""/metrics for Prometheus: what the front and the pool count, then what the backend counts (llamacpp:...)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flashmoe.common.memory import status_bytes
from flashmoe.runtime.model import Model
from flashmoe.server.comparing import Comparing
from flashmoe.server.traffic import Traffic

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _ModelCollector(Collector):
    """Reads the model's own counters when it is asked."""

    def __init__(self, model: Model, traffic: Traffic, comparing: Comparing) -> None:
        self._model, self._traffic, self._comparing = model, traffic, comparing

    def collect(self) -> Iterable[Metric]:
        yield from self._by_phase()
        yield from self._rewritten()
        yield from self._gauges()
        yield self._recent_hit_rate()

    def _by_phase(self) -> Iterator[Metric]:
        """What is counted for prompts and for decoding."""
        stats, telemetry = self._model.cache_stats, self._model.telemetry
        phases = {"prefill": telemetry.prefill, "decode": telemetry.decode}
        seconds = {phase: value.seconds for phase, value in phases.items()}
        yield _family("tokens", "Tokens evaluated.", {phase: value.tokens for phase, value in phases.items()})
        yield _family("evaluation_seconds", "Seconds spent evaluating, reads included.", seconds)
        for name, text, attribute in (
            ("expert_hits", "Expert requests that found the expert resident.", "hits"),
            ("expert_late_hits", "Expert requests whose prefetch was under way.", "late_hits"),
            ("expert_misses", "Expert requests that had to read.", "misses"),
            ("expert_prefetch_hits", "Hits through a prefetch that was complete.", "prefetch_hits"),
            ("stall_seconds", "Seconds that the engine waited for reads.", "stall_seconds"),
            ("overhead_seconds", "Seconds of Python in the engine's way, reads aside.", "overhead_seconds"),
        ):
            yield _family(name, text, {phase: getattr(s, attribute) for phase, s in stats.items()})
        read = CounterMetricFamily(
            "flashmoe_read_bytes", "Expert bytes read from the drive.", labels=["phase", "for"]
        )
        for phase, s in stats.items():
            read.add_metric([phase, "miss"], s.bytes)
            read.add_metric([phase, "prefetch"], s.prefetch_bytes)
            read.add_metric([phase, "wasted_prefetch"], s.wasted_bytes)
        yield read

    def _rewritten(self) -> Iterator[Metric]:
        """What --approx has done."""
        done = self._model.rewritten
        replaced, dropped = (done.replaced, done.dropped) if done else (0, 0)
        for name, text, count in (
            ("experts_replaced", "Experts that --approx has replaced.", replaced),
            ("experts_dropped", "Experts that --approx has left out.", dropped),
        ):
            yield CounterMetricFamily(f"flashmoe_{name}", text, count)

    def _gauges(self) -> Iterator[Metric]:
        """The present state of pool, requests and memory."""
        model, traffic = self._model, self._traffic
        for name, text, value in (
            ("pool_slots", "Slots of the expert pool that are in use.", sum(model.cache.elastic.slots)),
            ("pool_slots_used", "Slots that hold an expert.", int(model.cache.policy.residency.used.sum())),
            ("experts", "Experts of the model, all layers.", model.catalog.total_experts),
            ("requests_running", "Requests that have a slot of the server.", traffic.running),
            ("requests_waiting", "Requests in the queue.", traffic.waiting),
            (
                "requests_waiting_seconds",
                "How long the request that waits longest has waited.",
                traffic.waiting_seconds,
            ),
            ("requests_parallel", "Requests that can run at once.", traffic.parallel),
            ("accepting", "1 while new requests are taken, 0 when the server ends.", traffic.accepting),
            ("memory_budget_bytes", "The memory budget; 0 without one.", model.budget_bytes),
            ("memory_resident_bytes", "Memory of the process.", status_bytes("VmRSS")),
            ("memory_peak_bytes", "The most that the process has taken.", status_bytes("VmHWM")),
        ):
            yield GaugeMetricFamily(f"flashmoe_{name}", text, value)

    def _recent_hit_rate(self) -> Metric:
        rate = GaugeMetricFamily(
            "flashmoe_recent_hit_rate",
            "Hit rate of decoding during the last minutes, prefetching aside: the cache's, and what replays of the "
            "same requests have.",
            labels=["of"],
        )
        if compared := self._comparing.look():
            rate.add_metric(["cache"], compared.hit_rate)
            rate.add_metric(["lru"], compared.lru)
            rate.add_metric(["belady"], compared.belady)
        return rate


def _family(name: str, text: str, values: Mapping[str, float]) -> Metric:
    """A counter of each phase."""
    family = CounterMetricFamily(f"flashmoe_{name}", text, labels=["phase"])
    for phase, value in values.items():
        family.add_metric([phase], value)
    return family


class Metrics:
    """Collects figures of requests as they end, and the model's when asked."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4  # that of the backend's part, too

    def __init__(self, model: Model, traffic: Traffic, comparing: Comparing) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCollector(model, traffic, comparing))
        requests = Counter(
            "flashmoe_requests",
            "Requests on generating routes that ended, by how.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("ok", "client_error", "server_error", "cancelled"):
            requests.labels(outcome)
        first = Histogram(
            "flashmoe_first_byte_seconds",
            "From a request on a generating route to the first byte of its response's body.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        traffic.on_end = lambda outcome: requests.labels(outcome).inc()
        traffic.on_first_byte = first.observe

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)
