from __future__ import annotations

import pytest

from cmkd_scale.errors import UsageError
from cmkd_scale.losses import LOSSES
from cmkd_scale.training.methods import METHODS, check_needs, resolve_method
from cmkd_scale.training.targets import MemoryTargets


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_row_is_made_of_known_losses_and_can_be_met(name: str) -> None:
    method = METHODS[name]
    assert set(method.weights) <= set(LOSSES)
    assert method.summary
    check_needs(name, method, MemoryTargets.provides)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_row_that_needs_a_memory_is_refused_without_one(name: str) -> None:
    if METHODS[name].needs_memory:
        with pytest.raises(UsageError, match=r"memory\.run"):
            check_needs(name, METHODS[name], frozenset())
    else:
        check_needs(name, METHODS[name], frozenset())


def test_weights_are_overridden_one_by_one() -> None:
    method = resolve_method("ucmkd_global", {"transport_cost": 0.0})
    assert method.weights["transport_cost"] == 0.0
    assert method.weights["teacher_head"] == METHODS["ucmkd_global"].weights["teacher_head"]
    assert method.head_transfer


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("ucmkd_globel", {}, "did you mean 'ucmkd_global'"),
        ("ce", {"transport_cost": 1.0}, "not a component of 'ce'"),
        ("ucmkd_global", {"transport_kost": 1.0}, "did you mean 'transport_cost'"),
        ("ucmkd_global", {"transport_cost": -1.0}, "0 or more"),
        ("ucmkd_global", {"transport_cost": float("nan")}, "0 or more"),
        ("ce", {"cross_entropy": 0.0}, "trains the student's head"),
        (
            "ucmkd_global",
            {"smoothed_cross_entropy": 0.0, "transported_soft_label": 0.0},
            "trains the student's head",
        ),
    ],
)
def test_wrong_choices(name: str, weights: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_method(name, weights)
