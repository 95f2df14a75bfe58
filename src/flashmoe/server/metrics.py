"""/metrics for Prometheus: what the front and the pool count, then what the backend counts (llamacpp:...)."""

from __future__ import annotations

from collections.abc import Iterable

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
        model, stats = self._model, self._model.cache_stats
        phases = {"prefill": model.telemetry.prefill, "decode": model.telemetry.decode}

        def by_phase(name: str, text: str, values: dict[str, float]) -> Metric:
            family = CounterMetricFamily(f"flashmoe_{name}", text, labels=["phase"])
            for phase, value in values.items():
                family.add_metric([phase], value)
            return family

        yield by_phase("tokens", "Tokens evaluated.", {p: v.tokens for p, v in phases.items()})
        yield by_phase(
            "evaluation_seconds",
            "Seconds spent evaluating, reads included.",
            {p: v.seconds for p, v in phases.items()},
        )
        for name, text, attribute in (
            ("expert_hits", "Expert requests that found the expert resident.", "hits"),
            ("expert_late_hits", "Expert requests whose prefetch was under way.", "late_hits"),
            ("expert_misses", "Expert requests that had to read.", "misses"),
            ("expert_prefetch_hits", "Hits through a prefetch that was complete.", "prefetch_hits"),
            ("stall_seconds", "Seconds that the engine waited for reads.", "stall_seconds"),
            ("overhead_seconds", "Seconds of Python in the engine's way, reads aside.", "overhead_seconds"),
        ):
            yield by_phase(name, text, {p: getattr(s, attribute) for p, s in stats.items()})
        read = CounterMetricFamily(
            "flashmoe_read_bytes", "Expert bytes read from the drive.", labels=["phase", "for"]
        )
        for phase, s in stats.items():
            for what, value in (
                ("miss", s.bytes),
                ("prefetch", s.prefetch_bytes),
                ("wasted_prefetch", s.wasted_bytes),
            ):
                read.add_metric([phase, what], value)
        yield read
        rewritten = model.rewritten
        for name, text, count in (
            (
                "experts_replaced",
                "Experts that --approx has replaced.",
                rewritten.replaced if rewritten else 0,
            ),
            ("experts_dropped", "Experts that --approx has left out.", rewritten.dropped if rewritten else 0),
        ):
            yield CounterMetricFamily(f"flashmoe_{name}", text, count)
        residency = model.cache.policy.residency
        for name, text, gauge in (
            ("pool_slots", "Slots of the expert pool that are in use.", sum(model.cache.elastic.slots)),
            ("pool_slots_used", "Slots that hold an expert.", int(residency.used.sum())),
            ("experts", "Experts of the model, all layers.", model.catalog.total_experts),
            ("requests_running", "Requests that have a slot of the server.", self._traffic.running),
            ("requests_waiting", "Requests in the queue.", self._traffic.waiting),
            (
                "requests_waiting_seconds",
                "How long the request that waits longest has waited.",
                self._traffic.waiting_seconds,
            ),
            ("requests_parallel", "Requests that can run at once.", self._traffic.parallel),
            ("accepting", "1 while new requests are taken, 0 when the server ends.", self._traffic.accepting),
            ("memory_budget_bytes", "The memory budget; 0 without one.", model.budget_bytes),
            ("memory_resident_bytes", "Memory of the process.", status_bytes("VmRSS")),
            ("memory_peak_bytes", "The most that the process has taken.", status_bytes("VmHWM")),
        ):
            yield GaugeMetricFamily(f"flashmoe_{name}", text, gauge)
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
        yield rate


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
