"""Where a logged step goes: a JSON-lines file, the console, a Prometheus endpoint.

The loop of rank 0 holds one ``Sinks`` and calls ``log(step, values)``; other ranks hold
an empty one. The names in ``values`` are those of ``monitoring/metrics.py``. This is the
only importer of prometheus_client.
"""

from __future__ import annotations

import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import ThreadingHTTPServer
from typing import Protocol

import prometheus_client
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import cmkd_scale
from cmkd_scale.monitoring.console import ConsoleSink
from cmkd_scale.monitoring.jsonl import JsonlSink
from cmkd_scale.monitoring.metrics import METRICS, TOTAL_LOSS, Metric

__all__ = ["ConsoleSink", "JsonlSink", "PrometheusSink", "Sink", "Sinks"]

_logger = logging.getLogger(__name__)

_PORTS_TRIED = 64


class Sink(Protocol):
    """One destination of logged steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Release what the sink holds; nothing is logged afterwards."""


class Sinks:
    """Several sinks behind one; none on ranks that report nothing."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass ``values`` of ``step`` (numbers by name, see ``metrics.py``) to every sink."""
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        """Close every sink, also those after one that fails to close."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception:
                _logger.exception("closing %s failed", type(sink).__name__)


class PrometheusSink:
    """Serves ``/metrics`` and ``/healthz`` from a registry of its own.

    A taken port is no reason to stop a training: the next free one is used and reported
    through logging; if none can be had, the run goes on without an endpoint.

    Args:
        port: the port to try first; 0 takes any free one.
        address: the interface to listen on, loopback unless told.
        modality: value of the label ``modality``, constant in a run.
        resume_step: the step that the run continues from.
        clock: Unix time in seconds.
    """

    port: int | None
    """The port that is listened on, or None if none could be had."""

    def __init__(
        self,
        port: int,
        *,
        address: str = "127.0.0.1",
        modality: str = "",
        resume_step: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # The _created series would double every counter under a name nobody documents.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._totals: dict[tuple[str, str], float] = {}
        self._timed_step = resume_step
        self._clock = clock
        self._labels = {
            "modality": modality,
            "version": cmkd_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        for metric in METRICS:
            # A counter exists from 0 on; a gauge appears with its first value, since a
            # checkpoint at Unix time 0 or an ETA of 0 would be a lie.
            # Of a series for each key below a prefix, nobody knows which there will be.
            if (metric.kind != "gauge" or metric.feed == "constant") and not any(
                key.endswith("*") for key in metric.keys
            ):
                self._feed(metric, "", 1.0 if metric.feed == "constant" else 0.0, steps=0)
        self._server = _listen(address, port, self._registry)
        self.port = None if self._server is None else int(self._server.server_address[1])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Update every metric that ``values`` feed."""
        logged = {**values, "step": float(step)}
        steps = max(1, step - self._timed_step)
        for metric in METRICS:
            for key in metric.keys:
                prefix = key.removesuffix("*")
                if prefix != key:
                    for name in logged:
                        if name.startswith(prefix):
                            self._feed(metric, name.removeprefix(prefix), logged[name], steps)
                elif key in logged:
                    self._feed(metric, TOTAL_LOSS, logged[key], steps)
        if "step_seconds" in values:
            self._timed_step = step

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _feed(self, metric: Metric, component: str, number: float, steps: int) -> None:
        """Apply one number to one series as ``metric.feed`` says."""
        series = self._series(metric, component)
        if isinstance(series, Gauge):
            series.set(self._clock() if metric.feed == "time" else number)
        elif not math.isfinite(number):
            return  # a NaN would stay in a sum for good
        elif isinstance(series, Histogram):
            for _ in range(steps):
                series.observe(number)
        else:
            place = metric.name, component
            known = self._totals.get(place, 0.0) if metric.feed == "total" else 0.0
            series.inc(max(0.0, number - known))
            self._totals[place] = max(number, known)

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


class _Handler(prometheus_client.MetricsHandler):
    """Answers the two paths of the exporter; everything else is not found."""

    def do_GET(self) -> None:  # noqa: N802
        path = self.path.partition("?")[0]
        if path == "/metrics":
            super().do_GET()
        elif path == "/healthz":
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"ok\n")
        else:
            self.send_error(404)


def _listen(address: str, port: int, registry: CollectorRegistry) -> ThreadingHTTPServer | None:
    """Serve ``registry`` at ``port`` or the next free one; None if there is none."""
    handler = _Handler.factory(registry)
    reason: OSError | None = None
    for candidate in range(port, min(port + _PORTS_TRIED, 65536)) if port else [0]:
        try:
            server = ThreadingHTTPServer((address, candidate), handler)
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
