"""What somebody who scrapes a run sees of it, against what the run has written."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cmkd_scale.errors import PreemptedError
from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.monitoring.sinks import Sink
from cmkd_scale.stages.student import student
from cmkd_scale.stages.watching import TARGETS, Watch
from tests.stages.conftest import Story

PORT = {"prometheus_port": 0, "linger_seconds": 3600.0}


def series(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{v}}}" for _, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraper:
    """Scrapes a run as often as it can, like a server that finds it by its file.

    ``texts`` are those from the beginning of the last training on.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.another = threading.Event()
        self.ended = threading.Event()
        self.texts: list[str] = []
        self.group: dict[str, Any] = {}

    def __call__(self) -> None:
        while not self.ended.wait(0.01):
            try:
                (self.group,) = json.loads(self.target.read_text())
                (target,) = self.group["targets"]
                url = f"http://{target}/metrics"
                with urllib.request.urlopen(url, timeout=60) as answer:
                    self.texts.append(answer.read().decode())
                self.another.set()
            except (FileNotFoundError, urllib.error.URLError, ConnectionError):
                continue  # not yet, or no longer


@contextmanager
def scraped(target: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scraper]:
    scraper = Scraper(target)
    begin = Watch.sink

    def sink(self: Watch, *arguments: object) -> Sink:
        found = begin(self, *arguments)  # type: ignore[arg-type]
        for _ in range(2):  # one may have begun before
            scraper.another.clear()
            assert scraper.another.wait(60)
        del scraper.texts[:-1]
        return found

    thread = threading.Thread(target=scraper)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "sink", sink)
        thread.start()
        try:
            yield scraper
        finally:
            scraper.ended.set()
            thread.join()


def test_the_last_scrape_says_what_the_log_says(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "targets"
    config = story.config(tmp_path / "run", monitor={**PORT, "targets_dir": str(shared)})
    with scraped(shared / f"{tmp_path.name}_run_rank_00000.json", monkeypatch) as scraper:
        student(config, console=False)
    seen = series(scraper.texts[-1])
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert scraper.group["labels"] == {"job": f"{tmp_path.name}/run"}
    assert seen["cmkd_train_step"] == seen["cmkd_train_planned_steps"] == steps[-1]["step"] == 12
    assert seen["cmkd_train_samples_total{text}"] == steps[-1]["samples_seen"]
    assert seen["cmkd_train_loss{total}"] == steps[-1]["loss"]
    assert seen["cmkd_train_learning_rate"] == steps[-1]["learning_rate"]
    assert seen["cmkd_train_step_duration_seconds_count"] == 12
    waits = sum(line["data_wait_seconds"] for line in steps)
    assert seen["cmkd_data_wait_seconds_total"] == pytest.approx(waits)
    assert seen["cmkd_checkpoint_interval_seconds"] == pytest.approx(4 * steps[-1]["step_seconds"])
    assert seen["cmkd_train_phase_seconds_total{evaluation}"] > 0
    assert seen["cmkd_data_bad_samples_limit_ratio"] == config.data.max_bad_fraction
    assert not list(shared.iterdir())


def test_a_run_that_goes_on_counts_on(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = story.config(tmp_path / "run", monitor=PORT)
    with monkeypatch.context() as patch:
        begin = Watch.sink

        class Stopping:
            def __init__(self, sink: Sink) -> None:
                self.log, self.close = sink.log, sink.close

            def step(self, step: int, seconds: float, waited_seconds: float) -> None:
                if step == 6:
                    os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Watch, "sink", lambda *arguments: Stopping(begin(*arguments)))
        with pytest.raises(PreemptedError):
            student(config, console=False)
    with scraped(tmp_path / "run" / TARGETS / "rank_00000.json", monkeypatch) as scraper:
        student(config, console=False)
    first, last = series(scraper.texts[0]), series(scraper.texts[-1])
    saved = int(first["cmkd_train_step"])
    assert 6 <= saved < 12
    assert first["cmkd_train_samples_total{text}"] == 12 * saved
    assert first["cmkd_restarts_total{resume}"] == 1
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{saved:08}"
    known = first["cmkd_checkpoint_last_success_timestamp_seconds"]
    assert known <= last["cmkd_checkpoint_last_success_timestamp_seconds"]
    assert not checkpoint.exists() or known == pytest.approx(checkpoint.stat().st_mtime)
    assert last["cmkd_train_samples_total{text}"] == 12 * 12


def test_the_guards_steps_show_that_the_run_lives_and_are_not_counted(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = {"guard": True, "guard_steps": 5}
    config = story.config(tmp_path / "run", monitor=PORT, method=guarded)
    with scraped(tmp_path / "run" / TARGETS / "rank_00000.json", monkeypatch) as scraper:
        student(config, console=False)
    before = series(scraper.texts[0])
    assert before["cmkd_train_step_duration_seconds_count"] == 5
    assert before["cmkd_train_samples_total{text}"] == 0
    assert before["cmkd_train_step"] == 0
    assert series(scraper.texts[-1])["cmkd_train_step_duration_seconds_count"] == 17
