from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from cmkd_scale.config import Config, make_config, with_changes
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.records import Sample
from cmkd_scale.stages.quickstart import _config as quickstart_config
from cmkd_scale.stages.through_faults import alignment_options
from cmkd_scale.training.alignment_options import AlignmentOptions, check_options
from cmkd_scale.training.exchange import Outgoing
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.methods import METHODS
from tests.data.examples import Toy, ToySplit, build_toy
from tests.memory.examples import batches_of, build_with, spool_of, teacher_data
from tools.bench import _ablation_minibatch as minibatch
from tools.bench import _ablation_shift as shift
from tools.bench import _ablation_statistics as statistics
from tools.bench import ablation
from tools.bench._ablation_plot import write_plot
from tools.bench._ablation_rows import QUICK, REFERENCE, ROWS, Row, known_methods

# ---------------------------------------------------------------------------- statistics


def clips(share: float, size: int, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(size) < share


def test_the_sign_flip_of_one_seed_is_the_exact_test_of_mcnemar() -> None:
    row, reference = clips(0.50, 300, 0), clips(0.42, 300, 1)
    better, worse = int((row & ~reference).sum()), int((~row & reference).sum())
    exact = stats.binomtest(better, better + worse).pvalue
    assert statistics.compare({4: row}, {4: reference})["p"] == pytest.approx(exact, abs=0.01)


def test_the_sign_flip_of_several_seeds_is_that_of_all_patterns_of_signs() -> None:
    parts = [np.array([1.0, 1.0, 0.0, -1.0, 1.0]), np.array([0.0, 1.0, 1.0])]
    whole = np.concatenate([parts[0] / 5, parts[1] / 3])
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(whole))))
    exact = float((np.abs(signs @ whole) >= abs(whole.sum()) - 1e-12).mean())
    found = statistics.sign_flip(parts, np.random.default_rng(0))
    assert found == pytest.approx(exact, abs=0.02)


def test_the_bootstrap_has_the_variance_of_clips_and_of_seeds() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.choice([-1.0, 0.0, 1.0], 400, p=[0.2, 0.6, 0.2]) + 0.0 for _ in range(3)]
    parts[1] = np.abs(parts[1])
    means = np.array([part.mean() for part in parts])
    within = np.mean([part.var() / len(part) for part in parts])
    drawn = statistics.bootstrap(parts, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(means.mean(), abs=0.005)
    assert drawn.var() == pytest.approx((within + means.var()) / 3, rel=0.05)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(5, 60), st.integers(0, 99))
def test_a_comparison_is_the_mean_difference_and_turns_round(
    seeds: int, size: int, seed: int
) -> None:
    one = {s: clips(0.6, size + s, seed + s) for s in range(seeds)}
    two = {s: clips(0.3, size + s, seed + s + 50) for s in range(seeds)}
    found, back = statistics.compare(one, two), statistics.compare(two, one)
    expected = np.mean([one[s].mean() - two[s].mean() for s in one])
    assert found["difference"] == pytest.approx(expected)
    assert back["difference"] == pytest.approx(-expected)
    assert found["low"] <= found["high"]
    same = statistics.compare(one, one)
    assert same["low"] == same["high"] == 0.0
    assert same["p"] == 1.0


def test_rows_without_the_same_clips_are_not_compared() -> None:
    with pytest.raises(UsageError, match="clip by clip"):
        statistics.compare({0: clips(0.5, 9, 0)}, {1: clips(0.5, 9, 0)})
    with pytest.raises(UsageError, match="clip by clip"):
        statistics.compare({0: clips(0.5, 9, 0)}, {0: clips(0.5, 8, 0)})


# ----------------------------------------------------------------------------- minibatch


def test_the_minibatch_plan_is_that_of_pot_and_its_gradient_that_of_the_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator, requires_grad=True)
    y = torch.randn(17, 5, generator=generator) + 1.0
    cost, plan = minibatch.minibatch_plan(x, y, 3.0)
    x64 = x.detach().double().requires_grad_()
    cost64 = (x64.unsqueeze(1) - y.double()).norm(dim=2) / 3.0
    exact = cost64.detach().numpy()
    expected = ot.sinkhorn(
        np.full(12, 1 / 12), np.full(17, 1 / 17), exact, 0.1 * exact.mean(), stopThr=1e-10
    )
    np.testing.assert_allclose(plan.numpy(), expected, atol=2e-5)
    (gradient,) = torch.autograd.grad((plan * cost).sum(), x)
    (expected_gradient,) = torch.autograd.grad((torch.from_numpy(expected) * cost64).sum(), x64)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-3, atol=1e-5)


def moved(prototypes: int, seed: int = 3) -> tuple[dict[str, Any], dict[str, float], float]:
    """Values and measures of a batch, and what its loss should be."""
    features, labels, weight, bias = teacher_data()
    spool = spool_of(batches_of(features, labels))
    built = build_with(spool, weight, bias, prototypes_per_class=prototypes)
    memory = replace(built, cost_scale=torch.tensor(2.0))  # which would follow the prototypes
    taught = minibatch.TeacherFeatures(features, labels)
    targets = minibatch.MinibatchTargets(
        memory,
        taught=taught,
        steps=10,
        options=AlignmentOptions(),
        needs=frozenset({"transported"}),
    )
    batch, own = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), labels[:9]
    torch.manual_seed(seed)
    values: dict[str, Any] = {}
    sums = targets._move(batch, own, torch.ones(9), 0, values)
    targets.finish(targets.start([Outgoing(sums, None)]), 0)
    torch.manual_seed(seed)
    drawn = torch.randperm(len(features))[: minibatch.TEACHER_BATCH]
    cost, plan = minibatch.minibatch_plan(batch, features[drawn], 2.0)
    return values, targets.measures(0), float((plan * cost).sum())


def test_the_loss_is_the_transport_of_the_batch_and_knows_no_prototype() -> None:
    values, measures, expected = moved(prototypes=2)
    others, _, _ = moved(prototypes=5)
    assert float(values["transported"].mean()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(values["transported"], others["transported"])
    assert measures["alignment_distance/transport"] == pytest.approx(expected, rel=1e-5)
    # Drawn and moved blind to six classes.
    assert 0.3 < measures["alignment_wrong_class_mass"] < 1.0
    assert set(values) == {"transported"}


def test_a_step_draws_what_it_drew_before() -> None:
    first, again, other = (moved(2, seed)[0]["transported"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------- label shift


def test_shifted_counts_go_from_one_to_ten_in_an_order_of_the_seeds() -> None:
    counts = shift.shifted_counts(100, 0)
    assert (min(counts), max(counts), sum(counts)) == (1, 10, 391)
    assert counts != sorted(counts)
    assert sorted(counts) == sorted(shift.shifted_counts(100, 1))
    assert counts != shift.shifted_counts(100, 1)
    assert counts == shift.shifted_counts(100, 0)


class ToyNumbers(Toy):
    def __init__(self, source: Path | None, options: dict[str, str]) -> None:
        super().__init__(count=40, classes=4)
        assert options["train_per_class"] == "10"

    def open(self, modality: str, split: str) -> ToySplit:
        return super().open("text", split)


def test_the_training_split_alone_is_cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "Numbers", ToyNumbers)
    dataset = shift.ShiftedNumbers(None, {"train_per_class": 10}, 5)
    train, whole = dataset.open("audio", "train"), ToyNumbers(None, {"train_per_class": "10"})
    samples: list[Sample] = [train[i] for i in range(len(train))]
    counts = Counter(sample.label for sample in samples)
    assert [counts[label] for label in range(4)] == shift.shifted_counts(4, 5)
    assert len({sample.key for sample in samples}) == len(samples)
    assert len(dataset.open("audio", "test")) == len(whole.open("audio", "test"))


# ---------------------------------------------------------------------------------- rows


def test_every_row_is_a_valid_student_of_its_own(tmp_path: Path) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert set(QUICK) <= {row.name for row in ROWS}
    assert {row.reference for row in ROWS} <= {row.name for row in ROWS}
    setting = ablation.Setting(tmp_path, tmp_path, {})
    usual = with_changes(
        quickstart_config(
            tmp_path / REFERENCE, 1, "audio", tmp_path, REFERENCE, "none", tmp_path, n_per_class=3
        ),
        {"method.guard": False},  # each part is judged by itself
    )
    before = set(METHODS)
    with known_methods():
        digests, directories = [], []
        for row in ROWS:
            if row.shifted:
                continue  # as the others, on shards that a test does not build
            config = setting.config(row, 1, tmp_path)
            resolve_method(str(config.method.name), config.method.weights)
            check_options(alignment_options(config))
            directories.append(config.run.dir)
            digests.append((config.digest(), row.prototypes, row.minibatch))
            if row.name == REFERENCE:
                assert config.digest() == usual.digest()
    assert set(METHODS) == before
    assert len(set(digests)) == len(set(directories)) == len(digests)


def test_what_rows_leave_out_is_left_out() -> None:
    weights = {}
    with known_methods():
        for row in ROWS:
            method = resolve_method(row.method, row.changes.get("method.weights", {}))
            weights[row.name] = {name for name, weight in method.weights.items() if weight > 0}
    whole = weights[REFERENCE]
    soft = {"transported_soft_label", "teacher_head_soft_label"}
    assert weights["no soft labels"] == whole - soft
    assert weights["no transport cost"] == whole - {"transport_cost"}
    assert weights["no teacher_head"] == whole - {"teacher_head"}
    assert weights["no head transfer"] == whole - {"head_pull"}
    assert weights["minibatch OT, teacher's head"] == whole - soft
    assert weights["minibatch OT"] == whole - soft - {"teacher_head", "head_pull"}
    assert weights["class_bures 0.1"] == whole | {"class_bures"}


# ------------------------------------------------------------------------------- the tool


def toy_config(
    shards: Path,
    run: Path,
    seed: int,
    modality: str,
    memory_run: Path | None = None,
    method: str | None = None,
    control: str = "none",
    fsdd: Path | None = None,
    n_per_class: int | None = None,
) -> Config:
    """In place of the quickstart's: twelve steps on a few texts."""
    return make_config(
        {
            "run": {"dir": str(run), "seed": seed},
            "data": {"shards": str(shards)},
            "model": {"width": 16, "feature_dim": 8},
            "memory": {"run": None if memory_run is None else str(memory_run)},
            "method": {"name": method, "control": control},
            "train": {"steps": 12, "global_batch_size": 12, "warmup_steps": 2},
        }
    )


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ablation.Setting:
    for split in ("train", "validation", "test"):
        build_toy(tmp_path / "shards", split)
    config = partial(toy_config, tmp_path / "shards")
    monkeypatch.setattr(ablation, "quickstart_config", config)
    return ablation.Setting(tmp_path / "out", None, {"train.steps": 8})


def test_it_runs_and_starts_again_where_it_stopped(
    setting: ablation.Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("ce_ls", REFERENCE, "minibatch OT", "4 prototypes a class")
    rows = [row for row in ROWS if row.name in names]
    table = ablation.run(setting, rows, [0, 1])
    assert list(table) == list(names)
    assert "difference" not in table[REFERENCE]
    ce_ls = table["ce_ls"]
    assert ce_ls["difference"] == pytest.approx(ce_ls["mean"] - table[REFERENCE]["mean"])
    assert table["minibatch OT"]["wrong_mass"] > 0
    assert table[REFERENCE]["wrong_mass"] == 0.0
    for name in names:
        assert name in ablation.markdown(table)
    write_plot(table, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as image:
        assert image.size[0] == 1000

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("everything was finished")

    for stage in ("teacher", "memory", "student"):
        monkeypatch.setattr(ablation, stage, never)
    assert ablation.run(setting, rows, [0, 1]) == table


def test_results_that_do_not_fit_their_predictions_are_refused(setting: ablation.Setting) -> None:
    ablation.run(setting, [Row("harmed", "ce_ls")], [0])
    results = setting.out / "harmed-seed0" / "results.json"
    results.write_text(results.read_text().replace('"test/accuracy": ', '"test/accuracy": 1'))
    with pytest.raises(IntegrityError, match="another accuracy"):
        ablation.run(setting, [Row("harmed", "ce_ls")], [0])
