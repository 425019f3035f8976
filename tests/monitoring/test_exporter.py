"""The exporter against what an independent reader of real scrapes sees."""

from __future__ import annotations

import logging
import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cmkd_scale.monitoring.exporter import Identity, PrometheusSink
from cmkd_scale.monitoring.metrics import METRICS


@pytest.fixture
def exporter() -> Iterator[PrometheusSink]:
    sink = PrometheusSink(0, identity=Identity(modality="audio"), clock=lambda: 1234.5)
    yield sink
    sink.close()


def get(sink: PrometheusSink, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def scrape(sink: PrometheusSink) -> dict[str, float]:
    families = text_string_to_metric_families(get(sink, "/metrics"))
    return {
        sample.name
        + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def feed_everything(sink: PrometheusSink) -> None:
    plain = [key for metric in METRICS for key in metric.keys if not key.endswith("*")]
    below = [key.replace("*", "any") for metric in METRICS for key in metric.keys]
    sink.log(110, dict.fromkeys([*plain, *below], 1.0))
    sink.step(110, 0.1, 0.0)
    for metric in METRICS:
        if metric.feed == "set":
            sink.set(metric.name, 1.0)


def test_a_scrape_returns_what_was_logged(exporter: PrometheusSink) -> None:
    exporter.log(
        110,
        {
            "loss": 2.5,
            "loss/transport_cost": 0.5,
            "samples_seen": 14080.0,
            "epoch_progress": 0.75,
            "eta_seconds": 60.0,
            "alignment_marginal_error": 0.125,
            "learning_rate": 1e-3,
            "grad_norm": 3.0,
            "memory_sync_bytes": 100.0,
        },
    )
    exporter.log(120, {"loss": 2.0, "samples_seen": 15360.0, "memory_sync_bytes": 50.0})
    exporter.log(120, {"checkpoint_seconds": 1.5, "restarts/resume": 3, "restarts/rollback": 1})
    exporter.log(130, {"restarts/resume": 3, "restarts/rollback": 2})
    seen = scrape(exporter)
    assert seen["cmkd_restarts_total{reason=resume}"] == 3
    assert seen["cmkd_restarts_total{reason=rollback}"] == 2
    assert seen["cmkd_train_samples_total{modality=audio}"] == 15360
    assert seen["cmkd_train_loss{component=total}"] == 2.0
    assert seen["cmkd_train_loss{component=transport_cost}"] == 0.5
    assert seen["cmkd_train_learning_rate"] == 1e-3
    assert seen["cmkd_train_gradient_norm"] == 3.0
    assert seen["cmkd_memory_sync_bytes_total"] == 150
    assert seen["cmkd_data_epoch_progress_ratio{modality=audio}"] == 0.75
    assert seen["cmkd_alignment_marginal_error"] == 0.125
    assert seen["cmkd_checkpoint_duration_seconds"] == 1.5
    assert seen["cmkd_checkpoint_last_success_timestamp_seconds"] == 1234.5
    assert seen["cmkd_eta_seconds"] == 60.0


def test_each_step_is_observed_once(exporter: PrometheusSink) -> None:
    for step in range(101, 111):
        exporter.step(step, 0.2, 0.0625)
    exporter.beat(0.05, 0.0)
    seen = scrape(exporter)
    assert seen["cmkd_train_step"] == 110
    assert seen["cmkd_train_last_step_timestamp_seconds"] == 1234.5
    assert seen["cmkd_train_step_duration_seconds_count"] == 11
    assert seen["cmkd_train_step_duration_seconds_sum"] == pytest.approx(2.05)
    assert seen["cmkd_train_step_duration_seconds_bucket{le=0.1}"] == 1
    assert seen["cmkd_train_step_duration_seconds_bucket{le=0.25}"] == 11
    assert seen["cmkd_data_wait_seconds_total"] == 0.625


def test_before_the_first_step_counters_are_zero_and_gauges_absent(
    exporter: PrometheusSink,
) -> None:
    seen = scrape(exporter)
    for name in ("cmkd_build_info{", "cmkd_run_info{"):
        (info,) = [series for series in seen if series.startswith(name)]
        assert seen.pop(info) == 1
    assert "cmkd_train_samples_total{modality=audio}" in seen
    assert set(seen.values()) == {0}
    assert not any("timestamp" in name or "eta" in name for name in seen)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_exposed_family_is_in_the_vocabulary(rank: int) -> None:
    probes = {
        metric.name: lambda label=(metric.labels or ("",))[0]: {label: 1.0}
        for metric in METRICS
        if metric.feed == "probe"
    }
    sink = PrometheusSink(0, identity=Identity(rank=rank), probes=probes)
    feed_everything(sink)
    suffix = {"counter": "_total"}
    exposed = {
        family.name + suffix.get(family.type, ""): (family.type, family.documentation)
        for family in text_string_to_metric_families(get(sink, "/metrics"))
    }
    sink.close()
    assert exposed == {
        metric.name: (metric.kind, metric.help)
        for metric in METRICS
        if rank == 0 or metric.scope == "rank"
    }


def test_probes_are_asked_at_each_scrape() -> None:
    phases = {"data": 1.0, "forward": 2.0}
    probes = {
        "cmkd_train_phase_seconds_total": lambda: phases,
        "cmkd_data_workers": lambda: {"": 4.0},
    }
    sink = PrometheusSink(0, probes=probes)
    assert scrape(sink)["cmkd_train_phase_seconds_total{phase=forward}"] == 2
    phases["forward"] = 5.0
    seen = scrape(sink)
    assert seen["cmkd_train_phase_seconds_total{phase=forward}"] == 5
    assert seen["cmkd_data_workers"] == 4
    sink.close()


def test_not_a_number_spoils_no_counter(exporter: PrometheusSink) -> None:
    nan = math.nan
    exporter.log(101, {"loss": nan, "samples_seen": nan, "memory_sync_bytes": nan})
    exporter.step(101, nan, nan)
    exporter.log(102, {"samples_seen": 128.0, "memory_sync_bytes": 1.0})
    exporter.step(102, 1.0, 1.0)
    seen = scrape(exporter)
    assert math.isnan(seen["cmkd_train_loss{component=total}"])
    assert seen["cmkd_train_samples_total{modality=audio}"] == 128
    assert seen["cmkd_memory_sync_bytes_total"] == 1.0
    assert seen["cmkd_data_wait_seconds_total"] == 1.0
    assert seen["cmkd_train_step_duration_seconds_sum"] == 1.0


def test_health_is_that_of_the_rank_and_other_paths_are_unknown() -> None:
    states = [(True, "ok: step 3"), (False, "hangs: step 3")]
    sink = PrometheusSink(0, health=lambda: states.pop(0))
    assert get(sink, "/healthz") == "ok: step 3\n"
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        get(sink, "/healthz")
    assert caught.value.read() == b"hangs: step 3\n"
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        get(sink, "/")
    caught.value.close()
    sink.close()


def test_a_scraped_exporter_waits_at_its_end_for_one_scrape_more() -> None:
    sink = PrometheusSink(0)
    scrape(sink)
    sink.step(9, 0.1, 0.0)
    closing = threading.Thread(target=sink.close, args=(3600.0,))
    closing.start()
    assert scrape(sink)["cmkd_train_step"] == 9
    closing.join(60)
    assert not closing.is_alive()


def test_one_that_nobody_scrapes_ends_at_once() -> None:
    closing = threading.Thread(target=PrometheusSink(0).close, args=(3600.0,))
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


def test_a_taken_port_gives_the_next_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken, caplog.at_level(logging.WARNING):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sink = PrometheusSink(port)
        try:
            assert sink.port is not None
            assert sink.port > port
            assert str(sink.port) in caplog.text
            assert "cmkd_build_info" in get(sink, "/metrics")
        finally:
            sink.close()


def test_an_address_that_is_not_ours_is_reported_and_not_fatal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = PrometheusSink(9400, address="192.0.2.1")
    assert sink.port is None
    assert "metrics are not served" in caplog.text
    sink.log(1, {"loss": 1.0})
    sink.close()


def test_two_exporters_in_one_process_do_not_mix(exporter: PrometheusSink) -> None:
    other = PrometheusSink(0)
    other.step(7, 0.1, 0.0)
    assert scrape(other)["cmkd_train_step"] == 7
    assert "cmkd_train_step" not in scrape(exporter)
    other.close()


def test_a_closed_exporter_frees_its_port() -> None:
    first = PrometheusSink(0)
    assert first.port is not None
    first.close()
    second = PrometheusSink(first.port)
    assert second.port == first.port
    second.close()
