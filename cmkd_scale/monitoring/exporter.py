"""A rank's Prometheus endpoint: ``/metrics`` and ``/healthz``.

The metrics are those of ``monitoring/metrics.py``. This is the only importer of
prometheus_client.
"""

from __future__ import annotations

import logging
import math
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from http.server import ThreadingHTTPServer

import prometheus_client
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

import cmkd_scale
from cmkd_scale.monitoring.metrics import METRICS, TOTAL_LOSS, Metric

_logger = logging.getLogger(__name__)

_PORTS_TRIED = 64

Probe = Callable[[], Mapping[str, float]]
"""Answers a scrape: values by label; the one of a metric without labels has the name ``""``."""

Health = Callable[[], tuple[bool, str]]
"""Whether all is well with the rank, and a line about it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What runs, and which of its processes this is: labels that are constant in a process."""

    run_id: str = ""
    stage: str = ""
    method: str = ""
    modality: str = ""
    rank: int = 0
    world_size: int = 1


class PrometheusSink:
    """Serves ``/metrics`` and ``/healthz`` from a registry of its own.

    A taken port is no reason to stop a training: the next free one is used and reported
    through logging; if none can be had, the run goes on without an endpoint.

    Args:
        port: the port to try first; 0 takes any free one.
        address: the interface to listen on, loopback unless told.
        identity: of this process; ranks other than 0 export metrics of the scope ``rank`` only.
        probes: metric of the feed ``probe`` -> what answers for it.
        health: whether all is well here, and a line about it.
        clock: Unix time in seconds.
    """

    port: int | None
    """The port that is listened on, or None if none could be had."""

    def __init__(
        self,
        port: int,
        *,
        address: str = "127.0.0.1",
        identity: Identity | None = None,
        probes: Mapping[str, Probe] | None = None,
        health: Health = lambda: (True, "ok"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        # The _created series would double every counter under a name nobody documents.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        identity = identity or Identity()
        self._clock = clock
        self._labels = {
            **{name: str(value) for name, value in asdict(identity).items()},
            "version": cmkd_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        self._metrics = {
            metric.name: metric
            for metric in METRICS
            if identity.rank == 0 or metric.scope == "rank"
        }
        self._registry = CollectorRegistry()
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._totals: dict[tuple[str, str], float] = {}
        for metric in self._metrics.values():
            # A counter exists from 0 on; a gauge appears with its first value, since a
            # checkpoint at Unix time 0 or an ETA of 0 would be a lie.
            # Of a series for each key below a prefix, nobody knows which there will be.
            if metric.feed == "constant":
                self._feed(metric, "", 1.0)
            elif metric.kind == "histogram":
                self._series(metric, "")
            elif metric.kind == "counter" and metric.feed != "probe" and not _below(metric):
                self._feed(metric, "", 0.0)
        self._registry.register(_Probes(probes or {}))
        self._server = _listen(address, port, self._registry, health)
        self.port = None if self._server is None else int(self._server.server_address[1])

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """The rank has finished ``step``."""
        self.set("cmkd_train_step", step)
        self.beat(seconds, waited_seconds)

    def beat(self, seconds: float, waited_seconds: float) -> None:
        """The rank has finished a step that is none of the run's own, as the guard's are."""
        self.set("cmkd_train_last_step_timestamp_seconds", self._clock())
        self._feed(self._metrics["cmkd_train_step_duration_seconds"], "", seconds)
        self._feed(self._metrics["cmkd_data_wait_seconds_total"], "", waited_seconds)

    def set(self, name: str, value: float, *, once: bool = False) -> None:
        """Set a gauge of this rank's without labels; one of another rank's is left alone.

        Args:
            name: of the metric.
            value: in its unit.
            once: keep the value that it has, if it has one.
        """
        metric = self._metrics.get(name)
        if metric is not None and not (once and name in self._families):
            series = self._series(metric, "")
            assert isinstance(series, Gauge)
            series.set(value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Update every metric that ``values`` feed."""
        for metric in self._metrics.values():
            for key in metric.keys:
                prefix = key.removesuffix("*")
                if prefix != key:
                    for name in values:
                        if name.startswith(prefix):
                            self._feed(metric, name.removeprefix(prefix), values[name])
                elif key in values:
                    self._feed(metric, TOTAL_LOSS, values[key])

    def close(self, linger_seconds: float = 0.0) -> None:
        """Stop serving.

        Args:
            linger_seconds: how long to wait for one scrape more, so that the last values are
                seen; no time at all if nobody has scraped for so long.
        """
        if self._server is not None:
            self._server.wait_for_scrape(linger_seconds)
            self._server.shutdown()
            self._server.server_close()

    def _feed(self, metric: Metric, component: str, number: float) -> None:
        """Apply one number to one series as ``metric.feed`` says."""
        series = self._series(metric, component)
        if isinstance(series, Gauge):
            series.set(self._clock() if metric.feed == "time" else number)
        elif not math.isfinite(number):
            return  # a NaN would stay in a sum for good
        elif isinstance(series, Histogram):
            series.observe(number)
        elif metric.feed == "total":
            place = metric.name, component
            known = self._totals.get(place, 0.0)
            series.inc(max(0.0, number - known))
            self._totals[place] = max(number, known)
        else:
            series.inc(max(0.0, number))

    def _series(self, metric: Metric, component: str) -> Counter | Gauge | Histogram:
        """Return the series of ``metric`` for this run's labels, made on first use."""
        family = self._families.get(metric.name)
        if family is None:
            if metric.kind == "counter":
                family = Counter(metric.name, metric.help, metric.labels, registry=self._registry)
            elif metric.kind == "gauge":
                family = Gauge(metric.name, metric.help, metric.labels, registry=self._registry)
            else:
                family = Histogram(
                    metric.name,
                    metric.help,
                    metric.labels,
                    buckets=metric.buckets,
                    registry=self._registry,
                )
            self._families[metric.name] = family
        if not metric.labels:
            return family
        # A label that is no constant of the run takes what stands below the key's prefix.
        return family.labels(*(self._labels.get(label, component) for label in metric.labels))


def _below(metric: Metric) -> bool:
    """Whether the metric has a series for each key below a prefix."""
    return any(key.endswith("*") for key in metric.keys)


class _Probes(Collector):
    """Asks for what is only known at the time of a scrape."""

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self._probes = {m: probes[m.name] for m in METRICS if m.name in probes}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric, probe in self._probes.items():
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.help, labels=metric.labels)
            for label, value in probe().items():
                family.add_metric([label] if metric.labels else [], value)
            yield family


class _Server(ThreadingHTTPServer):
    """Knows how it is with the run, and when it was scraped."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        registry: CollectorRegistry,
        health: Health,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.health = health
        self._last_begun = -math.inf
        self._scraped = threading.Condition()
        super().__init__(address, _Handler.factory(registry))

    def note_scrape(self, begun: float) -> None:
        """A scrape that began at the monotonic time ``begun`` has its answer."""
        with self._scraped:
            self._last_begun = max(self._last_begun, begun)
            self._scraped.notify_all()

    def wait_for_scrape(self, seconds: float) -> None:
        """Wait so long at most for a scrape that begins from now on, if there was one lately."""
        now = time.monotonic()
        with self._scraped:
            if now - self._last_begun < seconds:
                self._scraped.wait_for(lambda: self._last_begun >= now, seconds)


class _Handler(prometheus_client.MetricsHandler):
    """Answers the two paths of the exporter; everything else is not found."""

    server: _Server

    def do_GET(self) -> None:  # noqa: N802
        path = self.path.partition("?")[0]
        if path == "/metrics":
            begun = time.monotonic()
            super().do_GET()
            self.server.note_scrape(begun)
        elif path == "/healthz":
            well, line = self.server.health()
            self.send_response(200 if well else 503)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(f"{line}\n".encode())
        else:
            self.send_error(404)


def _listen(
    address: str,
    port: int,
    registry: CollectorRegistry,
    health: Health,
) -> _Server | None:
    """Serve ``registry`` at ``port`` or the next free one; None if there is none."""
    reason: OSError | None = None
    for candidate in range(port, min(port + _PORTS_TRIED, 65536)) if port else [0]:
        try:
            server = _Server((address, candidate), registry, health)
        except OSError as error:
            reason = error
            continue
        if port not in (0, candidate):
            _logger.warning("port %d is taken; metrics are served at port %d", port, candidate)
        # The interval is how long close() may have to wait.
        threading.Thread(
            target=server.serve_forever, args=(0.1,), name="metrics", daemon=True
        ).start()
        return server
    _logger.warning("metrics are not served: no port of %s from %d on: %s", address, port, reason)
    return None
