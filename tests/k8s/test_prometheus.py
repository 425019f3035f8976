"""Runs on two ranks in a real server's eyes: one that recovers, one that is killed, one that hangs.

The rules are those of ``k8s/monitoring`` with every duration divided by ``FASTER``; promtool
tests them as they are (``test_rules.py``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from cmkd_scale.files import read_json
from cmkd_scale.monitoring.jsonl import read_jsonl
from tests.conftest import REPOSITORY, kill_tree
from tests.data.examples import build_toy
from tests.k8s.files import rules, shortened
from tests.k8s.server import POLL, Server, serve, wait_for

FASTER = 30
SLACK_SECONDS = 20.0  # a scrape, an evaluation, and what a loaded machine adds
STEPS = 120
MANY = 100_000
NAN, ROLLBACK = "the gradient is not finite", "Rolling back to the newest checkpoint"

SCRIPT = REPOSITORY / "tests" / "k8s" / "slow_run.py"


class Training:
    """A run of two ranks under torchrun."""

    def __init__(self, root: Path, name: str, steps: int, first: int, last: int) -> None:
        self.name = name
        self.job = f"{root.name}/{name}"
        self.directory = root / name
        tree = {
            "run": {"dir": str(self.directory)},
            "data": {"shards": str(root / "shards")},
            "model": {"width": 16, "feature_dim": 8},
            "train": {
                "steps": steps,
                "global_batch_size": 12,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "checkpoint_every_steps": 20,
                "max_skipped_steps": 2,
            },
            "monitor": {"prometheus_port": 0},
        }
        config = root / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", str(SCRIPT), str(first), str(last)]
        self.output = root / f"{name}.txt"
        with self.output.open("w") as output:
            self.launcher = subprocess.Popen(
                [*command, "teacher", "--config", str(config)],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "ACCELERATE_USE_CPU": "true",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(REPOSITORY),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and process.ppid() == (
                    self.launcher.pid
                ):
                    return process
        raise AssertionError(f"no rank {number} in {self.name}")

    def kill(self) -> None:
        """Kill the launcher and all ranks, without a word to any."""
        kill_tree(self.launcher.pid)
        self.launcher.wait(30)


@contextmanager
def training(root: Path, name: str, **more: int) -> Iterator[Training]:
    run = Training(root, name, **more)
    try:
        yield run
    finally:
        run.kill()


@contextmanager
def until_ended(work: Callable[[], None]) -> Iterator[None]:
    """Do ``work`` again and again in a thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(POLL):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def watched(prometheus: str, root: Path, names: list[str]) -> Iterator[Server]:
    """A server that finds the runs of these names by the files that their ranks leave."""
    (root / "rules.yaml").write_text(yaml.safe_dump(shortened(rules(), FASTER), width=1000))
    found = [str(root / name / "targets" / "*.json") for name in names]
    second = "1s"
    config = {
        "global": {
            "scrape_interval": second,
            "scrape_timeout": second,
            "evaluation_interval": second,
        },
        "rule_files": [str(root / "rules.yaml")],
        "scrape_configs": [
            {
                "job_name": "cmkd",
                "file_sd_configs": [{"files": found, "refresh_interval": second}],
            }
        ],
    }
    with serve(prometheus, root, config) as server:
        yield server


def alerts_of(name: str) -> set[str]:
    """Alerts of a group of rules."""
    (group,) = (group for group in rules()["groups"] if group["name"] == name)
    return {rule["alert"] for rule in group["rules"]}


def steps_of(server: Server, run: Training) -> dict[tuple[str, ...], float]:
    joined = "* on (job, instance) group_left (rank) cmkd_run_info"
    return server.query(f'cmkd_train_step{{job="{run.job}"}} {joined}', "rank")


def check_against_log(server: Server, run: Training) -> None:
    """What the server has kept of a run that is over is what the run has written."""
    lines = read_jsonl(run.directory / "metrics.jsonl")
    last = [line for line in lines if "loss" in line][-1]
    results = read_json(run.directory / "results.json")
    joined = "* on (job, instance) group_left (rank) last_over_time(cmkd_run_info[10m])"

    def seen(metric: str, label: str) -> dict[str, float]:
        series = f'last_over_time({metric}{{job="{run.job}"}}[10m])'
        return {value: x for (value,), x in server.query(f"{series} {joined}", label).items()}

    assert seen("cmkd_train_step", "rank") == {"0": last["step"], "1": last["step"]}
    assert seen("cmkd_train_planned_steps", "rank") == {"0": last["step"]} == {"0": STEPS}
    assert seen("cmkd_train_samples_total", "modality") == {"text": last["samples_seen"]}
    assert seen("cmkd_train_loss", "component") == {
        "total" if key == "loss" else key.removeprefix("loss/"): value
        for key, value in last.items()
        if key == "loss" or key.startswith("loss/")
    }
    assert seen("cmkd_restarts_total", "reason") == results["restarts"]
    assert results["restarts"] == {"resume": 0, "rollback": 1}
    assert seen("cmkd_train_steps_skipped_total", "rank") == {"0": 3}
    stored = [line for line in lines if "checkpoint_seconds" in line]
    written = stored[-1]["checkpoint_seconds"]
    assert seen("cmkd_checkpoint_duration_seconds", "rank") == {"0": written}
    # Steps that were rolled back are no longer in the log, but have waited, too.
    waited = seen("cmkd_data_wait_seconds_total", "rank")
    assert set(waited) == {"0", "1"}
    logged = sum(line.get("data_wait_seconds", 0.0) for line in lines)
    assert 0 < 0.999 * logged <= waited["0"] < 3 * logged


class Observer:
    """Notes when an alert fires and when a run writes something, on one clock."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.fired: dict[tuple[str, str], float] = {}
        self.written: dict[tuple[str, str], float] = {}

    def look(self, run: Training, text: str) -> None:
        now = time.monotonic()
        for alert in self.server.firing():
            self.fired.setdefault(alert, now)
        if text in run.output.read_text():
            self.written.setdefault((run.name, text), now)

    def fires(self, run: Training, alert: str, since: float, seconds: float) -> None:
        """Fail unless the alert fires ``seconds`` after the time ``since``, no earlier."""
        key = alert, run.job
        wait_for(
            lambda: key in self.fired or self._missed(since + seconds),
            60,
            lambda: self.server.firing(),
        )
        assert key in self.fired, (key, self.server.firing(), run.output.read_text()[-2000:])
        after = self.fired[key] - since
        assert seconds - 1.5 <= after <= seconds + SLACK_SECONDS, (key, after)

    def fired_of(self, run: Training) -> set[str]:
        """Less those of speed: of six ranks on few cores, one may well be slow."""
        speed = alerts_of("cmkd.speed") | {"CmkdDataStarvation"}
        return {alert for alert, job in self.fired if job == run.job} - speed

    def _missed(self, due: float) -> bool:
        return time.monotonic() > due + SLACK_SECONDS


@pytest.mark.slow
@pytest.mark.multirank
def test_what_a_server_sees_and_says_of_runs(prometheus: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        build_toy(tmp_path / "shards", split)
    with (
        watched(prometheus, tmp_path, ["recovers", "killed", "stalled"]) as server,
        training(tmp_path, "recovers", steps=STEPS, first=90, last=92) as recovers,
        training(tmp_path, "killed", steps=MANY, first=0, last=-1) as killed,
        training(tmp_path, "stalled", steps=MANY, first=0, last=-1) as stalled,
    ):
        runs = (recovers, killed, stalled)
        observer = Observer(server)

        def look() -> None:
            observer.look(recovers, NAN)
            observer.look(recovers, ROLLBACK)

        def begun(run: Training) -> bool:
            steps = steps_of(server, run)
            return len(steps) == 2 and min(steps.values()) >= 1

        def said() -> list[str]:
            return [run.output.read_text()[-1500:] for run in runs]

        wait_for(lambda: all(begun(run) for run in runs), 60, said)
        assert not {alert for alert, _ in server.firing()} - alerts_of("cmkd.speed")

        killed.kill()
        stalled.rank(1).send_signal(signal.SIGSTOP)
        event = time.monotonic()
        with until_ended(look):
            observer.fires(stalled, "CmkdExporterAbsent", event, 2 * 60 / FASTER)
            absent = 'ALERTS{alertname="CmkdExporterAbsent", alertstate="firing"}'
            assert server.query(absent, "job", "rank") == {(stalled.job, "1"): 1}
            observer.fires(killed, "CmkdRunLost", event, 5 * 60 / FASTER)
            observer.fires(stalled, "CmkdRunStalled", event, 6 * 60 / FASTER)
            for alert, text in (("CmkdStepsNotFinite", NAN), ("CmkdRollback", ROLLBACK)):
                key = recovers.name, text
                wait_for(lambda key=key: key in observer.written, 30, said)  # type: ignore[misc]
                observer.fires(recovers, alert, observer.written[key], 0)
            assert recovers.launcher.wait(60) == 0, recovers.output.read_text()
            time.sleep(5 * 60 / FASTER + 3)  # for which CmkdRunLost would wait
        check_against_log(server, recovers)
        assert observer.fired_of(recovers) == {"CmkdStepsNotFinite", "CmkdRollback"}
        assert observer.fired_of(killed) == {"CmkdRunLost"}
