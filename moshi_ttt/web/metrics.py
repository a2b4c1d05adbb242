"""What the server counts and times, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moshi_ttt.host import Host

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_QUANTILES = ("0.5", "0.95", "0.99")


class Metrics:
    """The server's own counts, and, at every look, the host's.

    Args:
        host: whose.

    Attributes:
        begun: conversations.
        ended: likewise, by why they ended.
        refused: requests and conversations, by why.
        saves: memories saved.
        failed_saves: memories that could not be.
        received: bytes of messages.
        sent: bytes of messages.
    """

    def __init__(self, host: Host) -> None:
        self._registry = r = CollectorRegistry()
        name = "moshi_ttt_"
        self.begun = Counter(f"{name}conversations", "Conversations begun", registry=r)
        self.ended = Counter(f"{name}conversations_ended", "By why", ["reason"], registry=r)
        self.refused = Counter(f"{name}refusals", "Requests refused", ["reason"], registry=r)
        self.saves = Counter(f"{name}saves", "Memories saved", registry=r)
        self.failed_saves = Counter(f"{name}save_failures", "Memories not saved", registry=r)
        self.received = Counter(f"{name}received_bytes", "Bytes of messages", registry=r)
        self.sent = Counter(f"{name}sent_bytes", "Bytes of messages", registry=r)
        r.register(_OfHost(host))

    def refuse(self, why: str) -> None:
        """Count one refusal."""
        self.refused.labels(why).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfHost(Collector):
    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        host, name = self._host, "moshi_ttt_"
        yield GaugeMetricFamily(f"{name}sessions", "Conversations going on", host.taken)
        yield GaugeMetricFamily(f"{name}sessions_max", "Conversations possible", host.capacity)
        yield GaugeMetricFamily(
            f"{name}queue_frames", "Frames heard that wait for their step", host.waiting
        )
        yield GaugeMetricFamily(
            f"{name}engine_up", "0 once the engine has failed", int(host.failed is None)
        )
        dropped = CounterMetricFamily(
            f"{name}dropped_frames",
            "Frames lost: heard faster than stepped, said faster than sent",
            labels=["side"],
        )
        dropped.add_metric(["heard"], host.dropped_heard)
        dropped.add_metric(["said"], host.dropped_said)
        yield dropped
        times = host.engine.times
        yield CounterMetricFamily(f"{name}late_frames", "Steps longer than a frame", times.late)
        step = SummaryMetricFamily(
            f"{name}frame_seconds",
            "Time of a step, for all conversations; quantiles of the last 65536",
            count_value=times.count,
            sum_value=times.total_ms / 1000,
        )
        for quantile, ms in zip(_QUANTILES, times.percentiles(), strict=True):
            step.add_sample(f"{name}frame_seconds", {"quantile": quantile}, ms / 1000)
        yield step
