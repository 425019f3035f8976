"""Sinks against what independent readers see: json, a terminal's text, a real scrape."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.console import counting
from cmkd_scale.monitoring.jsonl import JsonlSink, read_jsonl
from cmkd_scale.monitoring.sinks import Sinks


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


def test_counted_work_without_a_terminal_is_one_line() -> None:
    buffer = io.StringIO()
    with counting("clips [train]", Console(file=buffer)) as advance:
        for done in range(1, 1201):
            advance(done, 1200)
    assert buffer.getvalue() == "clips [train]: 1,200\n"
