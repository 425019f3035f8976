from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.memory import soft_labels
from cmkd_scale.memory.soft_labels import (
    class_soft_labels,
    compress,
    concatenate,
    head_says,
    mean_probabilities,
)
from tests.memory.examples import example_memory


def probabilities(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(count, classes, generator=generator), 1)


@given(
    count=st.integers(0, 5),
    classes=st.integers(1, 9),
    keep=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_the_likeliest_classes_are_exact_and_the_others_equal(
    count: int, classes: int, keep: int, seed: int
) -> None:
    whole = probabilities(count, classes, seed)
    dense = compress(whole, keep).dense(torch.ones(classes, dtype=torch.bool))
    torch.testing.assert_close(dense.sum(1), torch.ones(count))
    for row, cut in zip(whole, dense, strict=True):
        order = row.argsort(descending=True)
        listed, others = order[:keep], order[keep:]
        assert torch.equal(cut[listed], row[listed])
        if len(others):
            torch.testing.assert_close(cut[others], row[others].mean().expand(len(others)))


def test_nothing_is_cut_up_to_as_many_classes_as_are_listed() -> None:
    whole = probabilities(4, 6)
    soft = compress(whole, 6)
    assert torch.equal(soft.values, whole)
    assert soft.classes.tolist() == [list(range(6))] * 4
    assert soft.rest.tolist() == [0.0] * 4


def test_what_is_left_goes_to_known_classes_only() -> None:
    known = torch.tensor([True, True, True, True, False, False])
    whole = probabilities(3, 6) * known
    whole = whole / whole.sum(1, keepdim=True)
    dense = compress(whole, 2, known).dense(known)
    assert dense[:, ~known].abs().max() == 0
    torch.testing.assert_close(dense.sum(1), torch.ones(3))


@pytest.mark.parametrize("keep", [3, 6])
@pytest.mark.parametrize("unknown", [[0, 1, 2], [5, 6, 7], [0, 4, 7]])
def test_what_is_left_is_shared_rightly_among_probabilities_of_0(
    keep: int, unknown: list[int]
) -> None:
    # Whichever of the equal ones are listed, what rounding has left goes to the other known ones.
    known = torch.ones(8, dtype=torch.bool)
    known[unknown] = False
    rows = torch.diag(torch.full((8,), 0.99))[known]
    dense = compress(rows, keep, known).dense(known)
    torch.testing.assert_close(dense.sum(1), torch.ones(5) if keep < 5 else rows.sum(1))
    assert dense[:, ~known].abs().max() == 0.0


@pytest.mark.parametrize("keep", [3, 7])
def test_what_a_head_says_of_points_against_float64(
    monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(soft_labels, "_MOST_ENTRIES", 30)
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(11, 5, generator=generator)
    weight, bias = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    known = torch.tensor([True] * 5 + [False, True])
    says = torch.zeros(11, 7, dtype=torch.float64)
    logits = points.double() @ weight.double().T + bias.double()
    says[:, known] = torch.softmax(logits[:, known] / 2.0, 1)
    found = head_says(points, weight, bias, 2.0, keep=keep, known=known).dense(known)
    expected = compress(says.float(), keep, known).dense(known)
    torch.testing.assert_close(found, expected)
    assert found[:, 5].tolist() == [0.0] * 11
    whole = head_says(points, weight, bias, 2.0, keep=7).values
    torch.testing.assert_close(whole, torch.softmax(logits / 2.0, 1).float())


def test_rows_are_joined_in_order() -> None:
    whole = probabilities(5, 7)
    joined = concatenate([compress(whole[:2], 3), compress(whole[2:], 3)])
    for one, other in zip(joined, compress(whole, 3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("entries", [1, 30, 2**22])
def test_mean_probabilities_against_float64_for_any_number_of_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(soft_labels, "_MOST_ENTRIES", entries)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 5, generator=generator)
    weight, bias = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    assignment = torch.randint(3, (40,), generator=generator)
    found = mean_probabilities(features, assignment, 3, weight, bias, 2.0)
    exact = torch.softmax((features.double() @ weight.double().T + bias.double()) / 2.0, 1)
    for prototype in range(3):
        expected = exact[assignment == prototype].mean(0).float()
        torch.testing.assert_close(found[prototype], expected, atol=1e-6, rtol=0)


def test_soft_labels_of_classes_are_means_over_their_samples() -> None:
    memory = example_memory()
    chosen = torch.tensor([1, 2, 5])
    found = class_soft_labels(memory, chosen)
    for row, label in zip(found, chosen.tolist(), strict=True):
        expected = torch.zeros(6)
        for j in (memory.prototype_class == label).nonzero()[:, 0].tolist():
            expected += memory.prototype_mass[j] * memory.soft_label_values[j]  # nothing is cut
        torch.testing.assert_close(row, expected[chosen] / expected[chosen].sum())
    torch.testing.assert_close(found.sum(1), torch.ones(3))
