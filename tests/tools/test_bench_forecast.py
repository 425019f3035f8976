from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.bench import forecast
from tools.bench._accuracy_setting import Item, Setting
from tools.bench._accuracy_tasks import BASELINE, OURS, Row
from tools.bench.forecast import Pair, all_pairs, fitted, leave_one_out, students_of


def test_there_are_pairs_enough_and_each_is_one() -> None:
    pairs = all_pairs(speech=True)
    names = [pair.name for pair in pairs]
    assert len(names) == len(set(names)) >= forecast.LEAST_PAIRS
    assert {"numbers-image-audio-3", "numbers-image-audio-3-permuted"} <= set(names)
    assert any(name.startswith("digits") for name in names)
    assert not any("spoken" in name for name in [p.name for p in all_pairs(speech=False)])
    assert len(all_pairs(speech=False, quick=True)) == 2


def test_pairs_of_one_student_share_its_training() -> None:
    groups = {tuple(pair.name for pair in group) for group in students_of(all_pairs(speech=True))}
    assert sum(map(len, groups)) == len(all_pairs(speech=True))
    assert ("numbers-image-text-3", "numbers-audio-text-3") in groups
    mine = next(group for group in groups if "numbers-image-audio-3" in group)
    assert set(mine) == {
        "numbers-image-audio-3",
        "numbers-text-audio-3",
        *(f"numbers-image-audio-3-{name}" for name in ("permuted", "random", "orthogonal")),
    }


def test_the_constant_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    scores, noise = rng.uniform(size=20), rng.normal(size=20)
    gains = 0.7 * scores + 0.1 * noise
    expected = np.linalg.lstsq(scores[:, None], gains, rcond=None)[0][0]
    assert fitted(scores, gains) == pytest.approx(expected)
    assert fitted(np.zeros(3), np.ones(3)) == 0.0


def test_no_pair_is_predicted_from_itself() -> None:
    scores, gains = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 30.0])
    predicted = leave_one_out(scores, gains)
    assert predicted[2] == pytest.approx(3.0)  # as the others say, not 30
    assert predicted[0] == pytest.approx((4 + 90) / 13)


def student(setting: Setting, pair: Pair, row: Row, seed: int, accuracy: float) -> None:
    directory = setting.out / "students" / Item(pair.task, row, seed).name
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps({"metrics": {"test/accuracy": accuracy}}))


def test_gains_and_forecasts_are_means_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, None)
    pairs = all_pairs(speech=False, quick=True)
    gains = {pairs[0]: (0.2, 0.3), pairs[1]: (-0.1, -0.1)}
    for pair, values in gains.items():
        for seed, gain in enumerate(values):
            student(setting, pair, pair.rows[0], seed, 0.4 + gain)
    for seed in range(2):
        student(setting, pairs[0], Row(BASELINE), seed, 0.4)
    trained: list[Item] = []
    monkeypatch.setattr(forecast, "train_all", lambda setting, items, jobs: trained.extend(items))
    told = {pairs[0].name: 0.1, pairs[1].name: -0.06}

    def forecasts(setting: Setting, pairs: Any, seeds: Any, jobs: int) -> dict[str, Any]:
        return {
            name: [
                {
                    "agreement": {"z": 9.0, "correlation": 0.2} if gain > 0 else None,
                    "trial": {"gain": gain + 0.02 * seed, "error": 0.01},
                }
                for seed in seeds
            ]
            for name, gain in told.items()
        }

    monkeypatch.setattr(forecast, "forecasts_of", forecasts)
    found = forecast.measure(setting, pairs, range(2))
    assert {item.row for item in trained} == {
        Row(OURS, guarded=False),
        Row(OURS, "permuted", guarded=False),
        Row(BASELINE),
    }
    assert [row["gain"] for row in found["pairs"]] == pytest.approx([0.25, -0.1])
    assert [row["score"] for row in found["pairs"]] == pytest.approx([0.11, -0.05])
    assert [row["z"] for row in found["pairs"]] == [9.0, 0.0]
    assert found["spearman"] == pytest.approx(1.0)
    text = forecast.markdown(found)
    assert "| numbers-image-audio-3 | +25.0 |" in text
    forecast.write_plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
