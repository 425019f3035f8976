"""Sinks against what independent readers see: json, a terminal's text, a real scrape."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.console import counting
from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.monitoring.metrics import METRICS
from cmkd_scale.monitoring.sinks import ConsoleSink, JsonlSink, PrometheusSink, Sinks


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fails = fails

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        if self.fails:
            raise OSError("disk is gone")
        self.closed = True


class TestSinks:
    def test_every_sink_gets_every_step(self) -> None:
        first, second = Recorder(), Recorder()
        sinks = Sinks([first, second])
        sinks.log(3, {"loss": 1.0})
        assert first.seen == second.seen == [(3, {"loss": 1.0})]

    def test_a_sink_that_fails_to_close_does_not_keep_others_open(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        last = Recorder()
        Sinks([Recorder(fails=True), last]).close()
        assert last.closed
        assert "closing Recorder failed" in caplog.text

    def test_none_is_silent(self) -> None:
        sinks = Sinks()
        sinks.log(1, {"loss": 1.0})
        sinks.close()


class TestJsonl:
    def test_a_line_is_an_object_with_step_first_and_is_there_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        sink = JsonlSink(path)
        sink.log(10, {"loss": 1.5, "loss/cross_entropy": 1.25})
        assert path.read_text() == '{"step": 10, "loss": 1.5, "loss/cross_entropy": 1.25}\n'
        sink.close()

    def test_numbers_that_json_lacks_become_null(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        sink = JsonlSink(path)
        sink.log(1, {"loss": math.nan, "grad_norm": math.inf})
        sink.close()

        def refuse(name: str) -> float:
            raise AssertionError(f"{name} is not JSON")

        line = json.loads(path.read_text(), parse_constant=refuse)
        assert line == {"step": 1, "loss": None, "grad_norm": None}

    @given(
        logged=st.lists(st.integers(1, 30), unique=True).map(sorted),
        resume=st.integers(0, 30),
        torn=st.binary(max_size=20).filter(lambda b: b"\n" not in b),
    )
    def test_resume_keeps_exactly_the_steps_of_the_checkpoint(
        self, tmp_path_factory: pytest.TempPathFactory, logged: list[int], resume: int, torn: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("resume") / "metrics.jsonl"
        whole = [json.dumps({"step": step, "loss": step / 2}) for step in logged]
        # b"{" makes the remainder torn whatever follows it.
        path.write_bytes("".join(f"{line}\n" for line in whole).encode() + b"{" + torn)
        sink = JsonlSink(path, resume_step=resume)
        sink.log(resume + 1, {"loss": 0.0})
        sink.close()
        expected = [line for line, step in zip(whole, logged, strict=True) if step <= resume]
        assert path.read_text().splitlines()[:-1] == expected
        assert steps_of(path)[-1] == resume + 1
        assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]

    def test_without_a_step_whole_lines_stay_and_the_torn_one_goes(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
        JsonlSink(path).close()
        assert steps_of(path) == [1, 2]

    def test_a_last_line_that_lacks_only_its_newline_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}')
        sink = JsonlSink(path, resume_step=2)
        sink.log(3, {})
        sink.close()
        assert steps_of(path) == [1, 2, 3]

    @pytest.mark.parametrize(
        "broken", ["{torn", "[1]", '{"loss": 1}', '{"step": "1"}', "[" * 99999]
    )
    def test_a_broken_line_inside_is_refused_by_name(self, tmp_path: Path, broken: str) -> None:
        path = tmp_path / "metrics.jsonl"
        before = f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n'
        path.write_text(before)
        with pytest.raises(IntegrityError, match=r"metrics\.jsonl line 2"):
            JsonlSink(path, resume_step=3)
        assert path.read_text() == before
        with pytest.raises(IntegrityError, match=r"metrics\.jsonl line 2"):
            read_jsonl(path)


class TestConsole:
    def lines(self, total: int, every: int, resume: int = 0) -> list[str]:
        stream = io.StringIO()
        sink = ConsoleSink(
            total, title="student", resume_step=resume, console=Console(file=stream, width=40)
        )
        for step in range(resume + every, total + 1, every):
            sink.log(step, {"loss": 1.23456, "samples_per_second": 812.4, "eta_seconds": 3700.0})
            sink.log(step, {"checkpoint_seconds": 0.1})
        sink.close()
        return stream.getvalue().splitlines()

    @pytest.mark.parametrize(
        ("total", "every"), [(400, 10), (400, 1), (7, 1), (1_000_000, 1000), (100, 33)]
    )
    def test_without_a_terminal_few_plain_lines(self, total: int, every: int) -> None:
        lines = self.lines(total, every)
        assert min(total // every, 15) <= len(lines) <= 22
        steps = [int(re.findall(r"step (\d+)/", line)[0]) for line in lines]
        assert steps[0] == every
        assert steps == sorted(set(steps))
        assert steps[-1] == total // every * every or total % every

    def test_a_plain_line_says_what_matters(self) -> None:
        expected = "student step 10/400 loss 1.235  812 samples/s  ETA 1:01:40"
        assert self.lines(400, 10)[0] == expected

    def test_a_resumed_run_speaks_at_once(self) -> None:
        assert "step 210/400" in self.lines(400, 10, resume=200)[0]

    def test_class_names_and_brackets_are_no_markup(self) -> None:
        stream = io.StringIO()
        sink = ConsoleSink(1, title="[red]x[/red]", console=Console(file=stream))
        sink.log(1, {"loss": 1.0})
        assert stream.getvalue().startswith("[red]x[/red] step 1/1")

    def test_on_a_terminal_a_bar(self) -> None:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=120)
        sink = ConsoleSink(400, title="student", console=console)
        sink.log(100, {"loss": 1.5, "learning_rate": 1e-3})
        sink.log(100, {"checkpoint_seconds": 0.1})
        sink.close()
        text = stream.getvalue()
        last = text.rsplit("student", 1)[1]
        assert "100/400" in last
        assert "loss 1.5  lr 0.001" in last


@pytest.fixture
def exporter() -> Iterator[PrometheusSink]:
    sink = PrometheusSink(0, modality="audio", resume_step=100, clock=lambda: 1234.5)
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


class TestPrometheus:
    def test_a_scrape_returns_what_was_logged(self, exporter: PrometheusSink) -> None:
        exporter.log(
            110,
            {
                "loss": 2.5,
                "loss/transport_cost": 0.5,
                "samples_seen": 14080.0,
                "step_seconds": 0.2,
                "data_wait_seconds": 0.25,
                "epoch_progress": 0.75,
                "eta_seconds": 60.0,
                "alignment_marginal_error": 0.125,
                "learning_rate": 1e-3,
            },
        )
        exporter.log(120, {"loss": 2.0, "samples_seen": 15360.0, "data_wait_seconds": 0.5})
        exporter.log(120, {"checkpoint_seconds": 1.5, "restarts/resume": 3, "restarts/rollback": 1})
        exporter.log(130, {"restarts/resume": 3, "restarts/rollback": 2})
        seen = scrape(exporter)
        assert seen["cmkd_train_step"] == 130
        assert seen["cmkd_restarts_total{reason=resume}"] == 3
        assert seen["cmkd_restarts_total{reason=rollback}"] == 2
        assert seen["cmkd_train_last_step_timestamp_seconds"] == 1234.5
        assert seen["cmkd_train_samples_total{modality=audio}"] == 15360
        assert seen["cmkd_train_loss{component=total}"] == 2.0
        assert seen["cmkd_train_loss{component=transport_cost}"] == 0.5
        assert seen["cmkd_train_step_duration_seconds_count"] == 10
        assert seen["cmkd_train_step_duration_seconds_sum"] == pytest.approx(2.0)
        assert seen["cmkd_train_step_duration_seconds_bucket{le=0.1}"] == 0
        assert seen["cmkd_train_step_duration_seconds_bucket{le=0.25}"] == 10
        assert seen["cmkd_data_wait_seconds_total"] == 0.75
        assert seen["cmkd_data_epoch_progress_ratio{modality=audio}"] == 0.75
        assert seen["cmkd_alignment_marginal_error"] == 0.125
        assert seen["cmkd_checkpoint_duration_seconds"] == 1.5
        assert seen["cmkd_checkpoint_last_success_timestamp_seconds"] == 1234.5
        assert seen["cmkd_eta_seconds"] == 60.0

    def test_before_the_first_step_counters_are_zero_and_gauges_absent(
        self, exporter: PrometheusSink
    ) -> None:
        seen = scrape(exporter)
        assert seen.pop("cmkd_train_samples_total{modality=audio}") == 0
        build = [name for name in seen if name.startswith("cmkd_build_info{")]
        assert len(build) == 1
        assert seen.pop(build[0]) == 1
        assert set(seen.values()) == {0}
        assert not any("timestamp" in name or "eta" in name for name in seen)

    def test_every_exposed_family_is_in_the_vocabulary(self, exporter: PrometheusSink) -> None:
        plain = [key for metric in METRICS for key in metric.keys if not key.endswith("*")]
        exporter.log(
            110,
            {
                **dict.fromkeys(plain, 1.0),
                "loss/any": 1.0,
                "restarts/any": 1.0,
                "samples_skipped/any": 1.0,
                "alignment_distance/any": 1.0,
            },
        )
        families = text_string_to_metric_families(get(exporter, "/metrics"))
        suffix = {"counter": "_total"}
        exposed = {
            family.name + suffix.get(family.type, ""): (family.type, family.documentation)
            for family in families
        }
        assert exposed == {metric.name: (metric.kind, metric.help) for metric in METRICS}

    def test_not_a_number_spoils_no_counter(self, exporter: PrometheusSink) -> None:
        nan = math.nan
        exporter.log(
            101, {"loss": nan, "samples_seen": nan, "data_wait_seconds": nan, "step_seconds": nan}
        )
        exporter.log(102, {"samples_seen": 128.0, "data_wait_seconds": 1.0, "step_seconds": 1.0})
        seen = scrape(exporter)
        assert math.isnan(seen["cmkd_train_loss{component=total}"])
        assert seen["cmkd_train_samples_total{modality=audio}"] == 128
        assert seen["cmkd_data_wait_seconds_total"] == 1.0
        assert seen["cmkd_train_step_duration_seconds_sum"] == 1.0

    def test_healthz_and_unknown_paths(self, exporter: PrometheusSink) -> None:
        assert get(exporter, "/healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            get(exporter, "/")
        caught.value.close()

    def test_a_taken_port_gives_the_next_one_and_says_so(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
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
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        sink = PrometheusSink(9400, address="192.0.2.1")
        assert sink.port is None
        assert "metrics are not served" in caplog.text
        sink.log(1, {"loss": 1.0})
        sink.close()

    def test_two_exporters_in_one_process_do_not_mix(self, exporter: PrometheusSink) -> None:
        other = PrometheusSink(0)
        other.log(7, {"loss": 1.0})
        assert scrape(other)["cmkd_train_step"] == 7
        assert "cmkd_train_step" not in scrape(exporter)
        other.close()

    def test_a_closed_exporter_frees_its_port(self) -> None:
        first = PrometheusSink(0)
        assert first.port is not None
        first.close()
        second = PrometheusSink(first.port)
        assert second.port == first.port
        second.close()


def test_counted_work_without_a_terminal_is_one_line() -> None:
    buffer = io.StringIO()
    with counting("clips [train]", Console(file=buffer)) as advance:
        for done in range(1, 1201):
            advance(done, 1200)
    assert buffer.getvalue() == "clips [train]: 1,200\n"
