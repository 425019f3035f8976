"""Trackers against what their own readers find afterwards, and what a real scrape returns."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from prometheus_client.parser import text_string_to_metric_families

from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring.exporter import PrometheusSink
from cmkd_scale.training import trackers
from cmkd_scale.training.trackers import (
    PrometheusTracker,
    TrackedRun,
    TrackerSink,
    check_trackers,
)

CONFIG = {"run": {"dir": Path("runs/a"), "seed": 3}, "train": {"learning_rate": 0.5, "ema": None}}


@pytest.fixture(autouse=True)
def nothing_went_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which a tracker was left out, unless it expects that and clears the log."""
    yield
    assert not [record for record in caplog.get_records("call") if "left out" in record.message]


def track(
    name: str, directory: Path, steps: range, *, resume_step: int = 0, scale: float = 1.0
) -> None:
    """One life of a run that logs ``loss`` = step x scale."""
    sink = TrackerSink(
        [name],
        directory,
        run_id="digits-00c0ffee",
        config=CONFIG,
        resume_step=resume_step,
        close_seconds=60.0,
    )
    for step in steps:
        sink.log(step, {"loss": step * scale, "test/accuracy": 0.5})
    sink.close()


def tensorboard_scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    event_accumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    reader = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


class TestTensorBoard:
    def test_steps_beyond_the_checkpoint_are_there_once(self, tmp_path: Path) -> None:
        track("tensorboard", tmp_path, range(1, 8))  # killed; its checkpoint is of step 4
        track("tensorboard", tmp_path, range(5, 10), resume_step=4, scale=2.0)
        found = tensorboard_scalars(tmp_path / "tensorboard", "loss")
        assert found == [(n, float(n)) for n in range(1, 5)] + [(n, 2.0 * n) for n in range(5, 10)]
        accuracy = tensorboard_scalars(tmp_path / "tensorboard", "test/accuracy")
        assert [step for step, _ in accuracy] == list(range(1, 10))

    def test_a_roll_back_forgets_what_went_wrong(self, tmp_path: Path) -> None:
        sink = TrackerSink(["tensorboard"], tmp_path, run_id="r", config=CONFIG, close_seconds=60.0)
        for step in (1, 2, 3):
            sink.log(step, {"loss": 10.0**step})
        sink.roll_back(1)
        for step in (2, 3, 4):
            sink.log(step, {"loss": 0.5})
        sink.close()
        found = tensorboard_scalars(tmp_path / "tensorboard", "loss")
        assert found == [(1, 10.0), (2, 0.5), (3, 0.5), (4, 0.5)]
        assert len(list(tmp_path.rglob("hparams.yml"))) == 1

    def test_a_run_killed_before_its_first_checkpoint_begins_again(self, tmp_path: Path) -> None:
        track("tensorboard", tmp_path, range(1, 6))
        track("tensorboard", tmp_path, range(1, 4), scale=2.0)
        found = tensorboard_scalars(tmp_path / "tensorboard", "loss")
        assert found == [(1, 2.0), (2, 4.0), (3, 6.0)]

    def test_the_configuration_is_stored_once(self, tmp_path: Path) -> None:
        track("tensorboard", tmp_path, range(1, 3))
        track("tensorboard", tmp_path, range(2, 4), resume_step=1)
        [stored] = (tmp_path / "tensorboard").rglob("hparams.yml")
        yaml = importlib.import_module("yaml")
        assert yaml.safe_load(stored.read_text()) == {
            "run.dir": "runs/a",
            "run.seed": 3,
            "train.learning_rate": 0.5,
            "train.ema": "None",
        }


class TestMLflow:
    @pytest.fixture
    def mlflow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
        return mlflow

    def test_a_requeue_continues_the_run(self, mlflow: Any, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        check_trackers(["mlflow"])
        track("mlflow", run, range(1, 5))
        track("mlflow", run, range(5, 8), resume_step=4)
        client = mlflow.MlflowClient()
        [experiment] = client.search_experiments(filter_string="name = 'cmkd_scale'")
        [found] = client.search_runs([experiment.experiment_id])
        assert found.info.run_name == "digits-00c0ffee"
        assert found.info.status == "FINISHED"
        assert found.data.params["train.learning_rate"] == "0.5"
        history = client.get_metric_history(found.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [
            (step, float(step)) for step in range(1, 8)
        ]

    def test_without_a_server_it_is_refused(
        self, mlflow: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        with pytest.raises(UsageError, match=r"set MLFLOW_TRACKING_URI"):
            check_trackers(["mlflow"])


class TestWandb:
    @pytest.fixture
    def wandb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_PROJECT", "digits")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        yield wandb
        wandb.teardown()

    def records(self, file: Path) -> list[Any]:
        """Everything in the file of an offline run: protobuf in the log format of LevelDB."""
        messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
        content, place, parts, found = file.read_bytes(), 7, b"", []  # after the file's header
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # no record begins at the very end of a block
                place += 32768 - place % 32768
                continue
            size = int.from_bytes(content[place + 4 : place + 6], "little")
            kind = content[place + 6]  # whole, first, middle, last
            parts += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                found.append(messages.Record.FromString(parts))
                parts = b""
        return found

    def test_a_requeue_has_the_same_id(self, wandb: Any, tmp_path: Path) -> None:
        check_trackers(["wandb"])
        track("wandb", tmp_path, range(1, 4))
        track("wandb", tmp_path, range(4, 6), resume_step=3)
        wandb.teardown()  # what writes the files has ended
        files = sorted(tmp_path.rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns)
        assert [file.name for file in files] == ["run-digits-00c0ffee.wandb"] * 2
        steps = []
        for file in files:
            records = self.records(file)
            [run] = [record.run for record in records if record.HasField("run")]
            assert (run.run_id, run.display_name) == ("digits-00c0ffee", "digits-00c0ffee")
            assert run.project == "digits"
            for record in records:
                if record.HasField("history"):
                    row = {item.nested_key[0] or item.key: item for item in record.history.item}
                    steps.append(record.history.step.num)
                    assert float(row["loss"].value_json) == steps[-1]
        assert steps == [1, 2, 3, 4, 5]

    def test_without_an_account_it_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("wandb")
        program = (
            "from cmkd_scale.errors import UsageError\n"
            "from cmkd_scale.training.trackers import check_trackers\n"
            "try: check_trackers(['wandb'])\n"
            "except UsageError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "PATH": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert "WANDB_API_KEY" in done.stdout, done.stderr
        assert "WANDB_MODE=offline" in done.stdout


def test_trackio_takes_the_arguments(tmp_path: Path) -> None:
    trackio = pytest.importorskip("trackio")
    tracker = trackers.TRACKERS["trackio"](TrackedRun(tmp_path, "digits-00c0ffee", None, 0, 1.0))
    inspect.signature(trackio.init).bind(project=tracker.run_name, **tracker.init_kwargs)
    assert tracker.init_kwargs == {"name": "digits-00c0ffee", "resume": "allow"}


class Fake(GeneralTracker):  # type: ignore[misc] # accelerate has no types
    """Does as it is told, in the thread of the sink."""

    name = "fake"
    requires_logging_directory = False
    tracker = None

    def __init__(self, on_log: Callable[[int], object] = lambda step: None) -> None:
        super().__init__()
        self.on_log = on_log
        self.steps: list[int] = []
        self.finished = False

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.on_log(step)
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """What stands in ``TRACKERS`` by name."""
    known: dict[str, Fake] = {"good": Fake()}
    monkeypatch.setitem(trackers.TRACKERS, "good", lambda run: known["good"])
    monkeypatch.setitem(trackers.TRACKERS, "bad", lambda run: known["bad"])
    return known


def sink_of(directory: Path, *, close_seconds: float = 60.0) -> TrackerSink:
    return TrackerSink(
        ["bad", "good"], directory, run_id="r", config={}, close_seconds=close_seconds
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned about, taken off the record."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def test_a_tracker_that_fails_is_left_out_and_warned_about_once(
    tmp_path: Path, fakes: dict[str, Fake], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise ConnectionError("the network\nis gone")

    fakes["bad"] = Fake(fail)
    sink = sink_of(tmp_path)
    for step in range(1, 6):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert fakes["bad"].steps == [1]
    assert fakes["good"].steps == [1, 2, 3, 4, 5]
    assert fakes["good"].finished
    [warning] = warnings_of(caplog)
    assert "bad is left out from now on (ConnectionError: the network is gone)" in warning


def test_a_tracker_that_cannot_start_ends_nothing(
    tmp_path: Path, fakes: dict[str, Fake], caplog: pytest.LogCaptureFixture
) -> None:
    sink = sink_of(tmp_path)  # there is no "bad"
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert fakes["good"].steps == [1]
    assert len(warnings_of(caplog)) == 1


def test_a_tracker_that_hangs_holds_up_neither_training_nor_the_end(
    tmp_path: Path,
    fakes: dict[str, Fake],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 10)
    released, seen = threading.Event(), threading.Semaphore(0)
    fakes["bad"] = Fake(lambda step: bool(released.wait()))
    fakes["good"] = Fake(lambda step: seen.release())
    sink = sink_of(tmp_path, close_seconds=0.2)
    warned: list[list[str]] = []
    for step in range(1, 15):
        sink.log(step, {})
        assert seen.acquire(timeout=60)
        warned.append(warnings_of(caplog))
    sink.close()
    assert fakes["good"].finished
    assert not fakes["bad"].finished
    assert not warnings_of(caplog)
    [warning] = itertools.chain(*warned)
    assert "bad is left out from now on (it is 10 logged steps behind)" in warning
    assert warned.index([warning]) in (10, 11)  # of which it may have taken the first
    released.set()


def test_a_tracker_that_does_not_end_is_left_alone(
    tmp_path: Path, fakes: dict[str, Fake], caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    fakes["bad"] = Fake(lambda step: bool(released.wait()))
    sink = sink_of(tmp_path, close_seconds=0.1)
    sink.log(1, {})
    sink.close()
    [warning] = warnings_of(caplog)
    assert "bad is left out from now on (it does not come to an end)" in warning
    released.set()


def test_what_is_missing_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(UsageError, match=r"names wandb, trackio.*pip install wandb trackio"):
        check_trackers(["tensorboard", "wandb", "trackio"])


def test_a_damaged_record_of_trackers_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trackers.json").write_text("{")
    track("tensorboard", tmp_path, range(1, 3))
    assert len(tensorboard_scalars(tmp_path / "tensorboard", "loss")) == 2
    [warning] = warnings_of(caplog)
    assert "trackers.json is damaged" in warning


class TestPrometheusTracker:
    def test_any_accelerate_loop_is_exported_beside_tensorboard(self, tmp_path: Path) -> None:
        sink = PrometheusSink(0)
        accelerator = Accelerator(
            log_with=[PrometheusTracker(sink), "tensorboard"], project_dir=tmp_path
        )
        accelerator.init_trackers("mine", config={"lr": 0.1})
        for step in range(10, 31, 10):
            accelerator.log({"loss": 40.0 - step, "loss/ce": 1.0, "note": "text"}, step=step)
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        accelerator.end_training()
        seen = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert seen["cmkd_train_step",] == 30
        assert seen["cmkd_train_step_duration_seconds_count",] == 30
        assert seen["cmkd_train_loss", "total"] == 10
        assert seen["cmkd_train_loss", "ce"] == 1
        assert tensorboard_scalars(tmp_path / "mine", "loss") == [
            (10, 30.0),
            (20, 20.0),
            (30, 10.0),
        ]
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10)

    def test_steps_between_two_calls_share_their_time(self) -> None:
        times = iter([0.0, 6.0, 8.0, 9.0])
        told: list[tuple[Any, ...]] = []

        class Recorder:
            def step(self, step: int, seconds: float, waited_seconds: float) -> None:
                told.append((step, seconds, waited_seconds))

            def log(self, step: int, values: Mapping[str, float]) -> None:
                told.append((step, dict(values)))

            def close(self) -> None:
                told.append(())

        tracker = PrometheusTracker(Recorder(), step=4, clock=lambda: next(times))
        tracker.log({"loss": 1, "data_wait_seconds": 1.5}, step=7)
        tracker.log({"test/accuracy": 0.5}, step=7)
        tracker.log({"loss": 2.0})
        tracker.finish()
        assert told == [
            *((step, 2.0, 0.5) for step in (5, 6, 7)),
            (7, {"loss": 1.0, "data_wait_seconds": 1.5}),
            (7, {"test/accuracy": 0.5}),
            (8, 2.0, 0.0),
            (8, {"loss": 2.0}),
            (),
        ]

    def test_accelerate_takes_it_for_one_of_its_own(self) -> None:
        tracker = PrometheusTracker(PrometheusSink(0))
        try:
            assert PartialState().num_processes == 1
            assert Accelerator(log_with=tracker).log_with == [tracker]
            assert isinstance(tracker.tracker, PrometheusSink)
        finally:
            tracker.finish()
