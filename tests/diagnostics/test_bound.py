"""The error bound against its definition, loops, POT and scipy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from cmkd_scale.diagnostics.bound import BoundInputs, bound_report, memory_bound
from cmkd_scale.diagnostics.bound_classes import LIPSCHITZ
from tests.diagnostics.examples import QUICK, make, teacher_losses
from tests.memory.examples import example_memory


def by_hand(inputs: BoundInputs) -> dict[int, dict[str, Any]]:
    """The sides of each class and its terms, in loops."""
    labels = inputs.labels.tolist()
    own = torch.log_softmax(inputs.logits.double(), 1).numpy()
    kept = inputs.known[inputs.labels]
    crossed = dict(
        zip(
            kept.nonzero()[:, 0].tolist(),
            teacher_losses(inputs, inputs.features[kept], inputs.labels[kept]),
            strict=True,
        )
    )
    theirs = teacher_losses(inputs, inputs.prototypes, inputs.prototype_class)
    rows: dict[int, dict[str, Any]] = {}
    for y in sorted({labels[i] for i in crossed}):
        mine = [i for i in crossed if labels[i] == y]
        points = (inputs.prototype_class == y).nonzero()[:, 0].tolist()
        mass = [float(inputs.prototype_mass[j]) for j in points]
        term = sum(w * theirs[j] * math.exp(-theirs[j]) for w, j in zip(mass, points, strict=True))
        seen = [crossed[i] * math.exp(-crossed[i]) for i in mine]
        rows[y] = {
            "mine": mine,
            "points": points,
            "mass": mass,
            "crossed": [crossed[i] for i in mine],
            "theirs": [theirs[j] for j in points],
            "share": len(mine) / len(crossed),
            "risk": -sum(own[i, y] for i in mine) / len(mine),
            "teacher_term": term,
            "transfer_gap": sum(seen) / len(mine) - term,
        }
    return rows


inputs_of_any_kind = st.builds(
    make,
    st.integers(0, 10**6),
    classes=st.integers(2, 5),
    dim=st.integers(1, 4),
    samples=st.integers(10, 30),
    points=st.integers(0, 14),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    missing=st.integers(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(inputs=inputs_of_any_kind)
def test_the_terms_add_up_and_the_bounds_hold_in_every_class(inputs: BoundInputs) -> None:
    report = bound_report(inputs, **QUICK)
    if report["samples"] == 0:
        assert not inputs.known[inputs.labels].any()
        return
    terms = {name: report[name]["value"] for name in ("teacher_term", "label_gap", "transfer_gap")}
    assert sum(terms.values()) == pytest.approx(report["risk"]["value"], abs=1e-12)
    plain = report["without_kappa"]
    assert sum(plain.values()) == pytest.approx(report["risk"]["value"], abs=1e-11)
    for row in [*report["per_class"].values()]:
        assert row["teacher_term"] + row["label_gap"] + row["transfer_gap"] == pytest.approx(
            row["risk"], abs=1e-12
        )
        for name in ("U1", "U2", "U3"):
            assert row[name] >= abs(row["transfer_gap"]) - 1e-11
        assert row["U2"] <= row["U1"] + 1e-9
    for name, bound in report["bounds"].items():
        assert bound["value"] >= abs(terms["transfer_gap"]) - 1e-11
        assert 0 <= report["tightness"][name] <= 1 + 1e-9
    assert report["bounds"]["U3"]["value"] >= abs(plain["transfer_gap"]) - 1e-11


@pytest.mark.parametrize(("seed", "missing"), [(0, 0), (1, 1), (2, 0)])
def test_every_number_is_the_one_of_loops_scipy_and_pot(seed: int, missing: int) -> None:
    inputs = make(seed, missing=missing)
    report, expected = bound_report(inputs, **QUICK), by_hand(inputs)
    assert {int(y) for y in report["per_class"]} == set(expected)
    weight, z, t = (
        x.double().numpy() for x in (inputs.head_weight, inputs.features, inputs.prototypes)
    )
    known = np.flatnonzero(inputs.known.numpy())
    for y, row in expected.items():
        found = report["per_class"][str(y)]
        for name in ("share", "risk", "teacher_term", "transfer_gap"):
            assert found[name] == pytest.approx(row[name], abs=1e-12)
        line = wasserstein_distance(row["crossed"], row["theirs"], None, row["mass"])
        assert found["U3"] == pytest.approx(line, abs=1e-10)
        assert found["teacher_cross_entropy"] == pytest.approx(np.mean(row["crossed"]), abs=1e-12)
        apart = weight[y] - weight[[j for j in known if j != y]]
        pairs = z[row["mine"], None] - t[None, row["points"]]
        uniform = np.full(len(row["mine"]), 1 / len(row["mine"]))
        mass = np.array(row["mass"]) / sum(row["mass"])
        features = ot.emd2(uniform, mass, np.linalg.norm(pairs, axis=2))
        margins = ot.emd2(uniform, mass, np.abs(pairs @ apart.T).max(2))
        steepest = max(np.linalg.norm(apart, axis=1))
        assert found["U1"] == pytest.approx(LIPSCHITZ * steepest * features, rel=1e-8)
        assert found["U2"] == pytest.approx(LIPSCHITZ * margins, rel=1e-8)
    for name in ("risk", "teacher_term", "transfer_gap"):
        total = sum(row["share"] * row[name] for row in expected.values())
        assert report[name]["value"] == pytest.approx(total, abs=1e-12)
    assert report["bounds"]["U1"]["exact_classes"] == len(expected)


def test_the_constant_is_the_largest_slope_in_the_margins() -> None:
    kappa = np.linspace(1e-9, 1 - 1e-9, 2_000_001)
    slopes = np.abs(1 + np.log(kappa)) * kappa * (1 - kappa)
    assert LIPSCHITZ - 1e-9 <= slopes.max() <= LIPSCHITZ
    # And kappa l_T as a function of the margins has slopes that sum to this expression.
    g = torch.Generator().manual_seed(0)
    margins = (3 * torch.randn(2000, 5, generator=g, dtype=torch.float64)).requires_grad_()
    loss = torch.log1p(torch.exp(-margins).sum(1))
    (loss * torch.exp(-loss)).sum().backward()
    assert margins.grad is not None
    steep = margins.grad.abs().sum(1)
    assert 0.9 * LIPSCHITZ < float(steep.max()) <= LIPSCHITZ


def test_held_out_samples_of_the_teacher_are_preferred() -> None:
    inputs = make(3)
    g = torch.Generator().manual_seed(4)
    features = torch.randn(20, 3, generator=g)
    labels = torch.arange(20) % 3  # none of class 3
    report = bound_report(replace(inputs, teacher_features=features, teacher_labels=labels))
    assert report["teacher_side"] == "samples"
    assert report["classes_left_out"] == 1
    assert report["samples_left_out"] == int((inputs.labels == 3).sum())
    losses = np.array(teacher_losses(inputs, features, labels))
    term = 0.0
    for y in range(3):
        own = losses[labels.numpy() == y]
        share = float((inputs.labels == y).sum()) / report["samples"]
        term += share * float(np.mean(own * np.exp(-own)))
    assert report["teacher_term"]["value"] == pytest.approx(term, abs=1e-12)
    # They are drawn, too, so the teacher's term has an interval; prototypes have none.
    assert report["teacher_term"]["high"] - report["teacher_term"]["low"] > 0.01
    fixed = bound_report(inputs, **QUICK)["teacher_term"]
    assert fixed["high"] == pytest.approx(fixed["low"], abs=1e-12)


def test_a_student_that_stands_where_the_teacher_does_loses_nothing() -> None:
    inputs = make(5)
    g = torch.Generator().manual_seed(6)
    labels = torch.arange(24) % 4
    z = torch.randn(24, 3, generator=g)
    same = replace(
        inputs,
        features=z,
        labels=labels,
        logits=torch.randn(24, 4, generator=g),
        teacher_features=z.flip(0),
        teacher_labels=labels.flip(0),
    )
    report = bound_report(same, **QUICK)
    assert report["transfer_gap"]["value"] == pytest.approx(0.0, abs=1e-12)
    for name in ("U1", "U2", "U3"):
        assert report["bounds"][name]["value"] == pytest.approx(0.0, abs=1e-9)
    one = replace(same, features=z[:1], labels=labels[:1], logits=same.logits[:1])
    alone = bound_report(one, **QUICK)
    assert alone["samples"] == 1
    assert alone["risk"]["low"] == pytest.approx(alone["risk"]["high"], abs=1e-12)


def test_classes_that_the_teacher_lacks_change_nothing_but_the_counts() -> None:
    inputs = make(7, classes=5, missing=1, samples=40)
    kept = inputs.labels < 4
    assert not kept.all()
    rest = replace(
        inputs,
        features=inputs.features[kept],
        logits=inputs.logits[kept],
        labels=inputs.labels[kept],
    )
    everything, without = bound_report(inputs, **QUICK), bound_report(rest, **QUICK)
    assert everything.pop("samples_left_out") == int((~kept).sum())
    assert everything.pop("classes_left_out") == 1
    del without["samples_left_out"], without["classes_left_out"]
    assert everything == without
    nothing = replace(rest, labels=torch.full_like(rest.labels, 4))
    assert bound_report(nothing) == {"samples": 0, "classes": 0, "classes_left_out": 1}


def test_wrong_class_mass_is_that_of_the_nearest_prototypes() -> None:
    inputs = make(8, samples=60)
    wrong = []
    for z, y in zip(inputs.features, inputs.labels.tolist(), strict=True):
        distance = [float((z - t).norm()) for t in inputs.prototypes]
        wrong.append(int(inputs.prototype_class[int(np.argmin(distance))]) != y)
    assert 0 < sum(wrong) < 60
    found = bound_report(inputs, **QUICK)["wrong_class_mass"]
    assert found == pytest.approx(sum(wrong) / 60, abs=1e-12)


def test_the_teachers_held_out_risk_is_weighted_by_the_students_classes() -> None:
    inputs = make(9)
    counts = torch.bincount(inputs.labels, minlength=4)
    risk = torch.tensor([0.5, 1.0, float("nan"), 2.0])
    report = bound_report(replace(inputs, class_risk=risk), **QUICK)
    sums = counts[0] * 0.5 + counts[1] * 1.0 + counts[3] * 2.0
    expected = float(sums) / float(counts[[0, 1, 3]].sum())
    assert report["teacher_risk_held_out"] == pytest.approx(expected)
    assert bound_report(inputs, **QUICK)["teacher_risk_held_out"] is None


def test_a_memory_is_read_by_class_names_and_what_is_returned_is_json() -> None:
    memory = example_memory()
    g = torch.Generator().manual_seed(10)
    labels = torch.arange(60) % 6
    z = memory.class_mean[labels] + torch.randn(60, 8, generator=g)
    report = memory_bound(memory, z, torch.randn(60, 6, generator=g), labels)
    assert set(report["per_class"]) == set(memory.class_names)
    assert report["teacher_risk_held_out"] == pytest.approx(0.5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_it_refuses_what_it_cannot_measure() -> None:
    inputs = make()
    with pytest.raises(ValueError, match="labels from -1"):
        bound_report(replace(inputs, labels=torch.full_like(inputs.labels, -1)))
    with pytest.raises(ValueError, match="1 or more"):
        bound_report(inputs, draws=0)
    with pytest.raises(ValueError, match="1 or more"):
        bound_report(inputs, permutations=0)
    with pytest.raises(ValueError, match="together"):
        bound_report(replace(inputs, teacher_features=torch.zeros(1, 3)))
