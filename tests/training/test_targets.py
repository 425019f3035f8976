"""The three transports on a shifted problem, searching, refreshing, following, several ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.moving import MovingMemory
from cmkd_scale.memory.soft_labels import SoftLabels, compress
from cmkd_scale.training.alignment_options import AlignmentOptions, Kind, check_options
from cmkd_scale.training.memory_buffers import SoftLabelTable
from cmkd_scale.training.open_transport import OpenTransport
from cmkd_scale.training.targets import MemoryTargets
from cmkd_scale.training.transports import Moment
from tests.conftest import REPOSITORY, Launch
from tests.memory.examples import build_from, example_memory, teacher_data

SCRIPT = REPOSITORY / "tests" / "scripts" / "targets.py"
CLASSES, DIM = 28, 16


def shifted(seed: int = 0) -> tuple[PrototypeMemory, Tensor, Tensor]:
    """A memory of near-balanced classes, and features of a student whose marginal is 10 x off."""
    features, labels, weight, bias = teacher_data(
        classes=CLASSES, per_class=120, dim=DIM, seed=seed
    )
    memory = build_from(features, labels, weight, bias)
    generator = torch.Generator().manual_seed(seed + 1)
    marginal = 10.0 ** torch.linspace(0, -1, CLASSES)
    drawn = torch.multinomial(marginal, 4000, replacement=True, generator=generator)
    noise = torch.randn(4000, DIM, generator=generator)
    return memory, memory.class_mean[drawn] + noise, drawn


def run(
    memory: PrototypeMemory, features: Tensor, labels: Tensor, steps: int = 150, **options: Any
) -> tuple[MemoryTargets, dict[str, float]]:
    """Feed batches of 256 through the targets; the measures are means of the last 30 steps."""
    targets = MemoryTargets(memory, steps=steps, options=AlignmentOptions(**options))
    rows: list[dict[str, float]] = []
    for step in range(steps):
        place = torch.arange(256 * step, 256 * (step + 1)) % len(labels)
        _, outgoing = targets(features[place], labels[place], step)
        targets.finish(targets.start([outgoing]), step)
        rows.append(targets.measures(step))
    return targets, {name: sum(row[name] for row in rows[-30:]) / 30 for name in rows[0]}


@pytest.mark.parametrize("transport", ["soft_label", "label_free"])
def test_label_shift_sends_no_mass_to_wrong_classes_with_reweighting(transport: str) -> None:
    memory, features, labels = shifted()
    _, reweighted = run(memory, features, labels, steps=200, transport=transport)
    _, plain = run(memory, features, labels, steps=200, transport=transport, reweight=False)
    wrong, error = "alignment_wrong_class_mass", "alignment_marginal_error"
    assert reweighted[wrong] < 0.01
    # Without it the teacher's masses are met by moving mass to other classes, or, where labels
    # make that dear, not met for a long time.
    if transport == "label_free":
        assert plain[wrong] > max(0.01, 10 * reweighted[wrong])
    else:
        assert plain[error] > 3 * reweighted[error]


def test_class_masked_transport_meets_the_masses_of_each_class() -> None:
    memory, features, labels = shifted()
    _, first = run(memory, features, labels, steps=30)
    _, last = run(memory, features, labels, steps=200)
    assert last["alignment_marginal_error"] < 0.5 * first["alignment_marginal_error"]
    assert last["alignment_wrong_class_mass"] == 0.0


@pytest.mark.parametrize("transport", ["class_masked", "label_free"])
def test_potentials_place_mass_better_than_none_at_the_usual_batch(transport: Kind) -> None:
    """Measured over all data under the potentials as they are, not over the steps that led there:
    steps too large for a batch's noise would be worse than no potentials."""
    memory, features, labels = shifted()
    at, count, errors = Moment(1000, 0.02), len(memory.prototypes), {}
    for rate in (1e-9, 0.1):
        options = AlignmentOptions(transport=transport, potential_rate=rate, ring_size=0)
        targets = MemoryTargets(memory, steps=500, options=options)
        for step in range(500):
            rows = torch.arange(64 * step, 64 * (step + 1)) % len(labels)
            _, outgoing = targets(features[rows], labels[rows], step)
            targets.finish(targets.start([outgoing]), step)
        assert targets.transport is not None
        everything = torch.ones(len(labels))
        moved = targets.transport.move(features, labels, everything, targets.potentials, at)
        received = torch.zeros(count).index_add_(
            0, moved.ids.flatten(), moved.assignment.plan.flatten()
        )
        counts = torch.bincount(labels, minlength=CLASSES).float()
        wanted = counts[memory.prototype_class] * memory.prototype_mass
        errors[rate] = float((received - wanted).abs().sum()) / len(labels)
    assert errors[0.1] < 0.75 * errors[1e-9]


def test_a_search_finds_what_looking_at_all_finds() -> None:
    memory, features, labels = shifted()
    options = {"transport": "label_free", "cost": "squared_euclidean", "epsilon_end": 0.05}
    whole, by_all = run(memory, features, labels, steps=60, **options)
    found, by_search = run(
        memory, features, labels, steps=60, search_candidates=24, search_refresh_steps=10, **options
    )
    assert isinstance(found.transport, OpenTransport)
    assert float(found.transport.captured) > 0.95
    distance = "alignment_distance/transport"
    assert by_search[distance] == pytest.approx(by_all[distance], rel=0.05)
    gap = found.potentials.value - whole.potentials.value
    assert float(gap.abs().mean()) < 0.1 * float(whole.potentials.value.abs().mean())


def test_candidates_that_hold_too_little_are_not_trusted() -> None:
    memory, features, labels = shifted()
    options = {"transport": "label_free", "cost": "squared_euclidean", "epsilon_end": 0.1}
    whole, _ = run(memory, features, labels, steps=5, **options)
    wary, _ = run(memory, features, labels, steps=5, search_candidates=1, **options)
    assert isinstance(wary.transport, OpenTransport)
    assert float(wary.transport.captured) < 0.9
    torch.testing.assert_close(wary.potentials.value, whole.potentials.value)


def test_a_run_that_searches_goes_on_with_the_same_candidates() -> None:
    memory, features, labels = shifted()
    options = AlignmentOptions(
        transport="label_free",
        cost="squared_euclidean",
        search_candidates=8,
        search_least_mass=0.0,
        search_refresh_steps=7,
    )
    ends = []
    for stop in (None, 10):
        targets = MemoryTargets(memory, steps=20, options=options)
        for step in range(20):
            if step == stop:
                saved = targets.state_dict()
                targets = MemoryTargets(memory, steps=20, options=options)
                targets.load_state_dict(saved)
            rows = torch.arange(64 * step, 64 * (step + 1))
            _, outgoing = targets(features[rows], labels[rows], step)
            targets.finish(targets.start([outgoing]), step)
        ends.append(targets.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_refreshing_from_the_ring_brings_masses_closer() -> None:
    memory, features, labels = shifted()
    _, plain = run(memory, features, labels, steps=60, potential_rate=0.02)
    _, refreshed = run(
        memory, features, labels, steps=60, potential_rate=0.02, refresh_every_steps=5
    )
    error = "alignment_marginal_error"
    assert refreshed[error] < 0.95 * plain[error]


def test_debiasing_subtracts_once_the_ring_holds_features() -> None:
    memory, features, labels = shifted()
    costs = []
    for debias in (False, True):
        targets = MemoryTargets(memory, steps=10, options=AlignmentOptions(debias=debias))
        for step in range(2):
            rows = slice(512 * step, 512 * (step + 1))
            values, outgoing = targets(features[rows], labels[rows], step)
            targets.finish(targets.start([outgoing]), step)
            costs.append(values["transported"])
    first, second, first_debiased, second_debiased = costs
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(first_debiased))
    assert float(torch.as_tensor(second_debiased).mean()) < float(torch.as_tensor(second).mean())


def test_targets_follow_a_memory_whose_teacher_has_moved() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1)
    moving.observe(features + 1.0, labels)
    assert moving.due
    moved = moving.follow(weight, bias)
    targets = MemoryTargets(memory, steps=10, options=AlignmentOptions())
    fresh = MemoryTargets(moved, steps=10, options=AlignmentOptions())
    for one_of_them in (targets, fresh):
        one_of_them.potentials.value += 0.1
        one_of_them.class_share.mul_(0.5)  # another memory knows the classes, too
    targets.follow(moved)
    one, _ = targets(features, labels, 0)
    other, _ = fresh(features, labels, 0)
    assert one["excluded"] is other["excluded"] is None
    for name in one.keys() - {"excluded"}:
        pair = (torch.as_tensor(values[name]) for values in (one, other))
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("keep", [2, 3, 6])
def test_cut_soft_labels_read_like_their_dense_table(keep: int) -> None:
    probabilities = torch.softmax(torch.randn(14, 6, generator=torch.Generator().manual_seed(0)), 1)
    soft = compress(probabilities, keep)
    memory = example_memory()
    few = align_to_student(memory, ["class 0", "class 1", "class 2", "class 3", "class 4", "new"])
    known = torch.tensor([True] * 5 + [False])
    count = len(few.prototypes)
    rows = SoftLabels(*(part.repeat(4, *[1] * (part.ndim - 1))[:count] for part in soft))
    table = SoftLabelTable(_with_soft_labels(few, rows))
    ids = torch.randint(count, (5, 4), generator=torch.Generator().manual_seed(1))
    plan = torch.softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), 1)
    expected = torch.einsum("bk,bkc->bc", plan, rows.dense(known)[ids])
    torch.testing.assert_close(table(plan, ids), expected)


def _with_soft_labels(memory: PrototypeMemory, soft: SoftLabels) -> PrototypeMemory:
    return replace(
        memory,
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search_candidates": 8}, "method.transport=label_free"),
        ({"transport": "label_free", "search_candidates": 8}, "squared_euclidean"),
        ({"refresh_every_steps": 5, "ring_size": 0}, "set method.ring_size"),
        ({"debias": True, "ring_size": 0}, "set method.ring_size"),
        ({"epsilon_start": 0.01}, "annealed down"),
        ({"mass_relaxation": 0.05}, "potentials would swing"),
    ],
)
def test_contradictory_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_options(AlignmentOptions(**options))


@pytest.mark.multirank
def test_potentials_and_statistics_are_the_same_for_every_number_of_ranks(launch: Launch) -> None:
    """Each case in turn in one program: class-masked, soft-label with moments and debiasing,
    label-free by search with a refresh."""
    printed: dict[int, Any] = {}
    for processes in (1, 2, 3):
        lines = launch(SCRIPT, processes=processes).stdout.splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        assert len(found) == processes
        assert len({row["checksum"] for row in found}) == 1, "ranks hold the same bits"
        printed[processes] = found[0]
    for processes in (2, 3):
        for case, alone in printed[1]["cases"].items():
            for name, value in alone.items():
                ours = torch.tensor(printed[processes]["cases"][case][name])
                torch.testing.assert_close(
                    ours, torch.tensor(value), atol=1e-5, rtol=1e-5, msg=f"{case} {name}"
                )
    assert printed[2]["bytes"] == printed[2]["formula"] > 0
