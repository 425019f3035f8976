from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cmkd_scale.config_sections import TrainConfig
from tests.conftest import REPOSITORY, Launch
from tools.bench import scaling
from tools.bench._scaling_loops import Bare, Noise
from tools.bench._step_variants import Setting

TINY = Setting(classes=4, dim=8, batch=8, width=8, depth=1, student_shape=(1, 8, 12))
WORKER = """
from pathlib import Path
from tests.tools.test_bench_scaling import TINY
from tools.bench.scaling import work
work(TINY, 2, 3, Path({file!r}))
"""


def test_batches_are_the_same_whenever_they_are_made() -> None:
    first, second = Noise(TINY).batches(), Noise(TINY).batches()
    seen = [next(first) for _ in range(5)]
    assert all(torch.equal(batch.inputs, next(second).inputs) for batch in seen)
    assert not torch.equal(seen[0].inputs, seen[1].inputs)
    assert torch.equal(seen[0].inputs, seen[4].inputs)
    assert len(seen[0].labels) == len(seen[0].keys) == TINY.batch


def test_the_bare_loop_trains_and_is_timed_by_its_turns() -> None:
    bare = Bare(TINY)
    losses = bare.run(scaling.train_config(TINY, 12, log_every=1))
    assert losses.shape == (12,)
    # The same four batches, again and again.
    assert losses[8:].mean() < losses[:4].mean()
    wall, cpu = bare(scaling.train_config(TINY, 2, log_every=1))
    assert wall > 0.0
    assert cpu > 0.0


def test_ratios_are_of_the_same_round() -> None:
    row = scaling.row([2.0, 30.0, 8.0], [3.0, 5.0, 2.0], [1.0, 10.0, 2.0], [1.0, 5.0, 1.0])
    assert (row["ratio"], row["cpu_ratio"]) == (3.0, 2.0)
    assert (row["quartile_1"], row["quartile_3"]) == (2.0, 4.0)
    assert (row["milliseconds"], row["cpu_milliseconds"]) == (8000.0, 3000.0)


def test_loops_are_timed_in_turns() -> None:
    calls: list[str] = []

    def loop(name: str) -> scaling.Loop:
        def run(config: TrainConfig) -> tuple[float, float]:
            calls.append(name)
            return float(len(calls)), 1.0

        return run

    loops = {name: loop(name) for name in (scaling.BARE, scaling.OURS)}
    rows = scaling.in_turns(loops, scaling.train_config(TINY, 2, log_every=1), rounds=2)
    assert len(calls) == 6
    places = {name: [1 + n for n, called in enumerate(calls) if called == name] for name in loops}
    # Of three rounds the first warms up.
    pairs = zip(places[scaling.OURS][1:], places[scaling.BARE][1:], strict=True)
    ratios = [mine / base for mine, base in pairs]
    assert rows[scaling.OURS]["ratio"] == pytest.approx(sum(ratios) / 2)
    assert rows[scaling.BARE]["ratio"] == 1.0


def made_up() -> dict[str, dict[str, Any]]:
    """Tables of the form that the ranks make."""

    def found(ratio: float, losses: list[float]) -> dict[str, Any]:
        bare = scaling.row([1.0], [1.0], [1.0], [1.0])
        ours = scaling.row([ratio], [ratio], [1.0], [1.0])
        rows = {scaling.BARE: bare, scaling.OURS: ours}
        exact = [2.0, 1.0]
        by_loop = {scaling.OURS: losses, scaling.BARE: exact, scaling.OURS_64: exact}
        return {"rows": rows, "losses": by_loop}

    return {"1 ranks": found(1.01, [2.0, 1.0]), "2 ranks": found(1.2, [2.0, 1.0001])}


def test_goals_name_what_is_slow_and_what_is_apart(capsys: pytest.CaptureFixture[str]) -> None:
    tables = made_up()
    scaling.compare(tables)
    assert set(tables["1 ranks"]["apart"].values()) == {0.0}
    assert tables["2 ranks"]["apart"] == {
        "Trainer and bare DDP loop": pytest.approx(1e-4),
        "Trainer and one rank": pytest.approx(1e-4),
        "Trainer, float64 model and one rank": 0.0,
    }
    met = {goal.name: goal.met for goal in scaling.goals_of(tables)}
    assert met == {
        "Trainer over bare DDP loop, 1 ranks": True,
        "Trainer over bare DDP loop, 2 ranks": False,
        "losses of Trainer, number of ranks": False,
        "losses of Trainer, float64 model, number of ranks": True,
    }
    scaling.show("2 ranks", tables["2 ranks"], alone=2000.0)
    printed = capsys.readouterr().out
    assert "1.0e-04" in printed
    assert "2.00" in printed


@pytest.mark.multirank
@pytest.mark.slow
def test_all_loops_train_the_same_on_one_rank_and_on_two(tmp_path: Path, launch: Launch) -> None:
    tables = {}
    for ranks in (1, 2):
        file, script = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.py"
        script.write_text(WORKER.format(file=str(file)))
        launch(script, processes=ranks, cwd=REPOSITORY)
        tables[f"{ranks} ranks"] = json.loads(file.read_text())
    scaling.compare(tables)
    for found in tables.values():
        assert {len(losses) for losses in found["losses"].values()} == {scaling.FOLLOWED_STEPS}
        apart = found["apart"]
        assert apart["Trainer and bare DDP loop"] < 1e-5
        assert apart["Trainer, float64 model and one rank"] < 1e-6  # of losses in float32
        assert apart["Trainer and one rank"] < 1e-3  # rounding, magnified by training
        assert set(found["rows"]) == {scaling.OURS, scaling.BARE, f"{scaling.BARE} again"}
        assert all(row["milliseconds"] > 0.0 for row in found["rows"].values())
    first = tables["1 ranks"]["losses"][scaling.OURS]
    assert first[-1] < first[0]
