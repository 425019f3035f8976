from __future__ import annotations

from collections.abc import Mapping

from tools.bench import monitoring
from tools.bench._step_variants import Setting

TINY = Setting(classes=4, dim=8, batch=8, width=8, depth=1, student_shape=(1, 8, 12))


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logged: list[int] = []
        self.closed = False

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        self.steps.append(step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append(step)

    def close(self) -> None:
        self.closed = True


def test_what_is_timed_arrives_and_outlives_its_runs() -> None:
    recorder = Recorder()
    timed = monitoring.Timed(recorder)
    timed.step(1, 0.1, 0.0)
    timed.log(1, {"loss": 1.0})
    timed.close()
    assert (recorder.steps, recorder.logged, recorder.closed) == ([1], [1], False)
    assert timed.seconds > 0


def test_every_way_of_watching_sees_the_same_steps() -> None:
    rows = monitoring.table(TINY, rounds=1, steps=11)
    assert list(rows) == list(monitoring.WAYS)
    for name, row in rows.items():
        assert (row["calls_milliseconds"] > 0) == bool(monitoring.WAYS[name])
        assert row["share"] == row["calls_milliseconds"] / row["milliseconds"]
