from __future__ import annotations

import dataclasses

import pytest

from cmkd_scale.errors import UsageError
from cmkd_scale.losses import LOSSES, OWN_VALUES
from cmkd_scale.training.live_teacher import LiveTeacher
from cmkd_scale.training.method_checks import Offer, check_needs, resolve_method
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.targets import MemoryTargets
from cmkd_scale.training.updates import check_update

EVERYTHING = Offer(memories=2, teacher=True, mode="class_matched", unlabelled=True)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_row_is_made_of_known_losses_and_can_be_met(name: str) -> None:
    method = METHODS[name]
    assert set(method.components) <= set(LOSSES)
    assert method.summary
    assert method.source or name == "ce"
    provided = LiveTeacher.provides if method.live else MemoryTargets.provides
    assert method.values <= OWN_VALUES | provided
    check_needs(name, method, EVERYTHING)


LIVE = sorted(name for name, method in METHODS.items() if method.live)
CLASS_MATCHED = sorted(name for name in LIVE if "unpaired" not in METHODS[name].modes)
OF_MEMORY = sorted(name for name, method in METHODS.items() if method.needs_memory)
UNLABELLED = sorted(name for name, method in METHODS.items() if method.unlabelled)
SEVERAL = sorted(name for name, method in METHODS.items() if method.memories > 1)


def test_the_rows_are_of_the_kinds_that_the_refusals_are_about() -> None:
    assert {"kd", "dkd", "rkd", "sumall", "ucmkd_reference", "mutual"} <= set(CLASS_MATCHED)
    assert {"jumbot", "deepjdot", "feature_ot"} == set(LIVE) - set(CLASS_MATCHED)
    assert {"kd_memory", "ucmkd_global", "coral", "mmd", "robust_cmkd"} <= set(OF_MEMORY)
    assert UNLABELLED == ["fixmatch", "socket", "ucmkd_semi"]
    assert SEVERAL == ["rich_kd"]


@pytest.mark.parametrize(
    ("name", "lack", "words"),
    [
        *(
            (name, {"mode": "unpaired"}, r"set data\.mode=class_matched or")
            for name in CLASS_MATCHED
        ),
        *((name, {"teacher": False}, r"set teacher\.run") for name in LIVE),
        *((name, {"memories": 0}, r"set memory\.run") for name in OF_MEMORY),
        *((name, {"memories": 1}, "joins 2 teachers, and memory.run names 1") for name in SEVERAL),
        *((name, {"unlabelled": False}, r"set data\.unlabelled") for name in UNLABELLED),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    name: str, lack: dict[str, object], words: str
) -> None:
    offer = dataclasses.replace(EVERYTHING, **lack)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words) as refused:
        check_needs(name, METHODS[name], offer)
    assert f"Method '{name}' cannot be run like this" in str(refused.value)


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].live])
def test_what_a_teacher_has_said_serves_where_no_more_is_read(name: str) -> None:
    offer = dataclasses.replace(EVERYTHING, teacher=False, cached=True)
    wants = {"c2kd": "it trains its teacher along", "review_kd": r"review_kd \(live_stages\)"}
    if name in wants:
        with pytest.raises(UsageError, match=rf"{wants[name]}.*unset teacher\.cache"):
            check_needs(name, METHODS[name], offer)
    else:
        check_needs(name, METHODS[name], offer)


@pytest.mark.parametrize("name", ["ce", "ce_ls"])
def test_a_row_without_a_teacher_needs_nothing(name: str) -> None:
    check_needs(name, METHODS[name], Offer())


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(UsageError, match=r"teacher\.run.*; it compares.*data\.mode=class_matched"):
        check_needs("kd", METHODS["kd"], Offer())


@pytest.mark.parametrize("name", ["ucmkd_reference", "ucmkd_fixed"])
def test_bilevel_rows_want_whole_weights_and_whole_batches(name: str) -> None:
    for backend in ("single", "ddp"):
        check_update(METHODS[name], backend, parts=1)
    for backend in ("fsdp2", "zero1", "zero2", "zero3"):
        with pytest.raises(UsageError, match=rf"under {backend} no process holds them whole"):
            check_update(METHODS[name], backend, parts=1)
        check_update(METHODS["kd"], backend, parts=1)
    with pytest.raises(UsageError, match=r"gradient_accumulation_steps=1"):
        check_update(METHODS[name], "single", parts=2)


def test_weights_are_overridden_one_by_one() -> None:
    method = resolve_method("ucmkd_global", {"transport_cost": 0.0})
    assert method.weights["transport_cost"] == 0.0
    assert method.weights["teacher_head"] == METHODS["ucmkd_global"].weights["teacher_head"]
    assert method.head_transfer


def test_a_weight_that_is_switched_off_changes_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"data\.unlabelled"):
        check_needs("ucmkd_semi", resolve_method("ucmkd_semi", {}), Offer(memories=1))
    method = resolve_method("ucmkd_semi", {"pseudo_soft_label": 0.0})
    assert not method.unlabelled
    check_needs("ucmkd_semi", method, Offer(memories=1))


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
