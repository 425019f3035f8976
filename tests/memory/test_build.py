from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.errors import UsageError
from cmkd_scale.memory import build
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.build import class_blocks, owners
from cmkd_scale.memory.kmeans import prototype_count
from cmkd_scale.memory.one_class import Recipe
from tests.conftest import REPOSITORY, Launch
from tests.memory.examples import (
    batches_of,
    build_from,
    build_with,
    example_memory,
    first_of_each_class,
    spool_of,
    teacher_data,
)

SCRIPT = REPOSITORY / "tests" / "scripts" / "memory_digest.py"


@pytest.mark.multirank
def test_the_digest_is_the_same_for_every_world_size_order_and_block(launch: Launch) -> None:
    digests = set()
    for processes in (1, 2, 3, 5):
        done = launch(SCRIPT, processes=processes)
        lines = [line for line in done.stdout.splitlines() if line.startswith("digest")]
        assert len(lines) == 5 * processes
        digests.update(lines)
    assert len(digests) == 1


def test_fields_against_a_direct_computation() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    values, truth = features.double().numpy(), labels.numpy()
    soft = torch.softmax((features @ weight.T + bias) / 4.0, 1).numpy()
    spread = []
    for label in range(6):
        own = (memory.prototype_class == label).numpy()
        members = values[truth == label]
        centres = memory.prototypes.numpy()[own]
        nearest = np.linalg.norm(members[:, None] - centres[None], axis=2)
        spread += nearest.mean(1).tolist()
        assignment = nearest.argmin(1)
        shares = np.bincount(assignment, minlength=len(centres)) / len(members)
        np.testing.assert_allclose(memory.prototype_mass.numpy()[own], shares, atol=1e-6)
        for k in range(len(centres)):
            mine = assignment == k
            np.testing.assert_allclose(
                memory.soft_label_values.numpy()[own][k],
                soft[truth == label][mine].mean(0),
                atol=1e-5,
            )
            np.testing.assert_allclose(
                memory.radius.numpy()[own][k], nearest[mine, k].mean(), atol=1e-4
            )
    assert memory.class_count.tolist() == memory.class_kept.tolist() == [30, 27, 24, 21, 18, 15]
    torch.testing.assert_close(memory.class_risk, torch.full((6,), 0.5))
    # The lower of two middle values, as torch has it.
    assert float(memory.cost_scale) == pytest.approx(sorted(spread)[(len(spread) - 1) // 2])


@pytest.mark.parametrize("limit", [4096, 9])
def test_moments_are_those_of_all_samples_kept_or_not(limit: int) -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias, limit=limit)
    kept = first_of_each_class(labels, limit)
    for label in range(6):
        members = features[labels == label].double().numpy()
        np.testing.assert_allclose(memory.class_mean[label], members.mean(0), atol=1e-6)
        np.testing.assert_allclose(memory.class_variance[label], members.var(0), atol=1e-6)
        assert int(memory.class_count[label]) == len(members)
        assert int(memory.class_kept[label]) == min(limit, len(members))
        chosen = features[kept & (labels == label)].double().numpy()
        check_covariance(memory, label, chosen)


def check_covariance(memory: PrototypeMemory, label: int, samples: np.ndarray) -> None:
    """F^T F is the best approximation of its rank (Eckart and Young), by the SVD of NumPy, but for
    features that vary more among the kept samples than among all."""
    factor = memory.class_factor[label].double().numpy()
    centred = samples - samples.mean(0)
    _, singular, directions = np.linalg.svd(centred / np.sqrt(len(samples)))
    best = (directions[:4].T * singular[:4] ** 2) @ directions[:4]
    scale = np.sqrt(np.minimum(1.0, memory.class_variance[label].numpy() / np.diag(best)))
    np.testing.assert_allclose(factor.T @ factor, best * scale[:, None] * scale, atol=2e-6)


def test_a_factor_of_full_rank_and_the_diagonal_are_the_covariance() -> None:
    features, labels, weight, bias = teacher_data()
    spool = spool_of(batches_of(features, labels))
    for rank in (8, 12):
        memory = build_with(spool, weight, bias, covariance_rank=rank)
        for label in range(6):
            factor = memory.class_factor[label].double().numpy()
            left = memory.class_variance[label].double().numpy() - (factor**2).sum(0)
            members = features[labels == label].double().numpy()
            np.testing.assert_allclose(
                factor.T @ factor + np.diag(left), np.cov(members.T, bias=True), atol=1e-6
            )
            assert np.abs(left).max() < 1e-6


def test_classes_of_0_1_and_2_samples() -> None:
    features, labels, weight, bias = teacher_data()
    of = [(labels == label).nonzero()[:, 0] for label in range(6)]
    few = torch.cat([of[1][:1], of[2][:2], of[3]])
    memory = build_from(features[few], labels[few], weight, bias)
    assert memory.class_count.tolist() == [0, 1, 2, len(of[3]), 0, 0]
    assert memory.prototype_class.bincount(minlength=6).tolist() == [0, 1, 1, 4, 0, 0]
    assert memory.class_risk.isnan().tolist() == [True, False, False, False, True, True]
    torch.testing.assert_close(memory.prototypes[0], features[of[1][0]])
    assert float(memory.prototype_mass[0]) == 1.0
    assert float(memory.radius[0]) == 0.0
    assert (memory.class_factor.norm(dim=2) > 0).sum(1).tolist() == [0, 0, 1, 4, 0, 0]
    assert memory.class_variance[[0, 1, 4, 5]].max() < 1e-6
    pair = features[of[2][:2]]
    torch.testing.assert_close(memory.prototypes[1], pair.mean(0))
    torch.testing.assert_close(memory.class_factor[2, 0].abs(), (pair[0] - pair[1]).abs() / 2)


def test_nothing_to_build_from() -> None:
    features, labels, weight, bias = teacher_data()
    with pytest.raises(UsageError, match="no labelled sample"):
        build_from(features[:0], labels[:0], weight, bias)


def test_masses_and_soft_labels_sum_to_one() -> None:
    memory = example_memory()
    sums = torch.zeros(6).index_add_(0, memory.prototype_class, memory.prototype_mass)
    torch.testing.assert_close(sums, torch.ones(6))
    torch.testing.assert_close(memory.soft_label_values.sum(1), torch.ones(len(memory.prototypes)))
    assert (memory.prototype_class.diff() >= 0).all()


@given(
    held=st.integers(1, 4).flatmap(
        lambda ranks: st.lists(
            st.lists(st.integers(0, 50), min_size=ranks, max_size=ranks), min_size=1, max_size=30
        )
    ),
    wanted=st.sampled_from([None, 7]),
    limit=st.integers(1, 40_000),
)
def test_blocks_hold_every_class_once_and_no_more_than_fits_on_any_rank(
    held: list[list[int]], wanted: int | None, limit: int
) -> None:
    classes, dim, rank = len(held), 4, 3
    recipe = Recipe(torch.zeros(classes, dim), torch.zeros(classes), 4.0, wanted, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BLOCK_BYTES", limit)
        blocks = list(class_blocks(torch.tensor(held).T, recipe))
    assert [first for first, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == classes

    def size(first: int, stop: int) -> int:
        rows = 0
        for on_ranks in held[first:stop]:
            samples = sum(on_ranks)
            prototypes = prototype_count(samples, wanted)
            # Mean, variance, factor, label and two counts; centre, class, mass, radius, soft label.
            rows += 4 * (2 + rank) * dim + 24 + prototypes * (4 * dim + 20 + 8 * classes)
            rows += 4 * samples  # their spread
        return rows + 4 * dim * max(map(sum, zip(*held[first:stop], strict=True)))

    for first, stop in blocks:
        assert size(first, stop) <= limit or stop == first + 1
        if stop < classes:  # the next class would not have fitted
            assert size(first, stop + 1) > limit


@pytest.mark.parametrize("follows", [False, True])
def test_the_size_of_a_block_is_that_of_the_rows_it_becomes(follows: bool) -> None:
    features, labels, weight, bias = teacher_data()
    before = build_with(
        spool_of(batches_of(features, labels)), weight, bias, prototypes_per_class=7
    )
    memory = before if follows else build_from(features, labels, weight, bias)
    recipe = Recipe(weight, bias, 4.0)
    if follows:
        recipe = replace(recipe, previous=before)
    others = ("head_weight", "head_bias", "cost_scale", "class_risk")
    rows = sum(rows.nbytes for name, rows in memory.tensors().items() if name not in others)
    total = rows + 6 * 8 + 4 * len(labels) + features.nbytes  # labels, spread, what is read
    for limit, expected in ((total, 1), (total - 1, 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "BLOCK_BYTES", limit)
            assert len(list(class_blocks(memory.class_kept.unsqueeze(0), recipe))) == expected


@given(
    kept=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    ranks=st.integers(1, 6),
)
def test_ranks_own_about_equally_much(kept: list[int], ranks: int) -> None:
    owner = owners(torch.tensor(kept), ranks)
    load = [sum(n + 1 for n, o in zip(kept, owner, strict=True) if o == r) for r in range(ranks)]
    for one, other in itertools.permutations(load, 2):
        assert one - other <= max(kept) + 1


def test_a_teacher_that_has_moved_keeps_its_prototypes_places() -> None:
    features, labels, weight, bias = teacher_data()
    before = build_from(features, labels, weight, bias)
    moved = features + 0.1
    after = build_with(spool_of(batches_of(moved, labels)), weight, bias, previous=before)
    assert torch.equal(after.prototype_class, before.prototype_class)
    # k-means had not settled perfectly, so some prototypes move by more than the teacher did.
    steps = (after.prototypes - before.prototypes - 0.1).norm(dim=1)
    assert float(steps.median()) < 1e-5
    for label in range(6):
        own = before.prototype_class == label
        members = moved[labels == label]
        nearest = torch.cdist(members, before.prototypes[own]).argmin(1)
        for k in range(int(own.sum())):
            torch.testing.assert_close(
                after.prototypes[own][k], members[nearest == k].mean(0), atol=1e-5, rtol=1e-5
            )
            share = (nearest == k).float().mean()
            torch.testing.assert_close(after.prototype_mass[own][k], share)


def test_prototypes_without_samples_stay_and_classes_without_prototypes_get_some() -> None:
    features, labels, weight, bias = teacher_data()
    before = build_from(features[labels != 1], labels[labels != 1], weight, bias)
    own = before.prototype_class == 0
    far = before.prototypes.clone()
    far[own.nonzero()[0]] = 100.0
    changed = replace(before, prototypes=far)
    after = build_with(spool_of(batches_of(features, labels)), weight, bias, previous=changed)
    counts = after.prototype_class.bincount(minlength=6)
    assert counts.tolist() == [int(own.sum()), 5, *before.prototype_class.bincount()[2:].tolist()]
    assert float(after.prototype_mass[0]) == float(after.radius[0]) == 0.0
    assert after.prototypes[0].tolist() == [100.0] * 8
    says = torch.softmax((far[0] @ weight.T + bias) / 4.0, 0)
    torch.testing.assert_close(after.soft_label_values[0], says)
