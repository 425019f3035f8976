from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.unlabelled import (
    centroid_cross_entropy,
    centroid_pseudo_labels,
    information_maximisation,
    moment_matching,
    pseudo_label_cross_entropy,
    pseudo_soft_label_divergence,
)

Array = npt.NDArray[np.float64]


def rows(count: int, width: int = 4, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def agrees(loss: Callable[[Tensor], Tensor], expected: Callable[[Array], float], x: Tensor) -> None:
    """Value and gradient of a loss with those of a function in float64."""
    values = x.double().numpy()
    x = x.clone().requires_grad_()
    value = loss(x)
    (slope,) = torch.autograd.grad(value, x)
    differences = approx_fprime(values.ravel(), lambda v: expected(v.reshape(values.shape)), 1e-7)
    assert value.item() == pytest.approx(expected(values), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(slope.numpy().ravel(), differences, rtol=1e-3, atol=1e-5)


def information(logits: Array) -> float:
    """With scipy's entropies."""
    p = softmax(logits, axis=1)
    return float(entropy(p, axis=1).mean() - entropy(p.mean(0)))


def test_information_maximisation_against_scipys_entropies() -> None:
    agrees(information_maximisation, information, rows(7))


def test_information_is_greatest_for_sure_predictions_of_all_classes_alike() -> None:
    sure = 50.0 * torch.eye(4).repeat(3, 1)
    assert float(information_maximisation(sure)) == pytest.approx(-math.log(4.0), rel=1e-5)
    # Sure of one class for all, or of none for any: nothing is told.
    assert float(information_maximisation(sure[:1].repeat(5, 1))) == pytest.approx(0.0, abs=1e-6)
    assert float(information_maximisation(torch.zeros(5, 4))) == pytest.approx(0.0, abs=1e-6)
    assert float(information_maximisation(rows(1))) == pytest.approx(0.0, abs=1e-6)


def test_information_has_a_finite_gradient_where_a_class_is_excluded() -> None:
    logits = rows(5)
    logits[:, 2] = -1e4
    logits.requires_grad_()
    value = information_maximisation(logits)
    (slope,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(slope).all()
    assert torch.equal(slope[:, 2], torch.zeros(5))
    kept = logits.detach()[:, [0, 1, 3]]
    assert value.item() == pytest.approx(information(kept.double().numpy()), rel=1e-4)


@settings(max_examples=40)
@given(count=st.integers(1, 9), classes=st.integers(2, 6), seed=st.integers(0, 1000))
def test_information_is_within_its_bounds(count: int, classes: int, seed: int) -> None:
    value = float(information_maximisation(5.0 * rows(count, classes, seed)))
    assert -math.log(min(count, classes)) - 1e-5 <= value <= 1e-5


def test_moment_matching_against_numpy() -> None:
    x, teacher = rows(6), rows(20, seed=1).double().numpy()
    mean, variance = teacher.mean(0), teacher.var(0)

    def expected(z: Array) -> float:
        gaps = [z.mean(0) - mean, (z**2).mean(0) - z.mean(0) ** 2 - variance]
        return sum(math.sqrt((gap**2).sum()) for gap in gaps) / 2.0

    agrees(
        lambda z: moment_matching(z, torch.from_numpy(mean), torch.from_numpy(variance)),
        expected,
        x,
    )


@pytest.mark.parametrize("count", [1, 3])
def test_moments_that_match_have_no_gradient(count: int) -> None:
    x = torch.full((count, 4), 2.0, requires_grad=True)
    value = moment_matching(x, torch.full((4,), 2.0), torch.zeros(4))
    (slope,) = torch.autograd.grad(value, x)
    assert value.item() == 0.0
    assert torch.equal(slope, torch.zeros(count, 4))
    # Of one sample, or equal ones, the variance is 0; the gap of means is 3 in each feature.
    assert moment_matching(x, torch.full((4,), 5.0), torch.ones(4)).item() == pytest.approx(4.0)


def test_pseudo_labels_are_the_weak_views_where_it_is_sure() -> None:
    logits, weak = rows(8), rows(8, seed=1)
    p = softmax(weak.double().numpy(), axis=1)
    sure = p.max(1) >= 0.7
    assert 0 < sure.sum() < 8

    def expected(z: Array) -> float:
        log_p = np.log(softmax(z, axis=1))
        return float(-sum(log_p[i, p[i].argmax()] for i in range(8) if sure[i]) / 8)

    agrees(lambda z: pseudo_label_cross_entropy(z, weak, threshold=0.7), expected, logits)


def test_soft_pseudo_labels_are_the_teachers_of_the_class_it_is_taken_for() -> None:
    logits, weak = rows(8), rows(8, seed=1)
    table = softmax(rows(4, seed=2).double().numpy(), axis=1)
    share = np.array([1.0, 0.5, 0.0, 1.0])
    p = softmax(weak.double().numpy(), axis=1)
    taken = p.argmax(1)
    assert set(taken) >= {0, 1, 2}

    def expected(z: Array) -> float:
        log_p = np.log(softmax(z / 3.0, axis=1))
        terms = [
            p[i, c] * share[c] * (table[c] * (np.log(table[c]) - log_p[i])).sum()
            for i, c in enumerate(taken)
        ]
        return 9.0 * float(np.mean(terms))

    agrees(
        lambda z: pseudo_soft_label_divergence(
            z, weak, torch.tensor(table).float(), torch.tensor(share).float(), None, 3.0
        ),
        expected,
        logits,
    )


def test_no_sample_is_taken_for_a_class_that_the_teacher_lacks() -> None:
    weak = torch.tensor([[9.0, 1.0, 0.0]])
    excluded = torch.tensor([True, False, False])
    table = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    logits = torch.zeros(1, 3, requires_grad=True)
    share = torch.tensor([0.0, 1.0, 1.0])
    value = pseudo_soft_label_divergence(logits, weak, table, share, excluded, 1.0)
    sure = math.exp(1.0) / (math.exp(1.0) + 1.0)
    assert float(value.detach()) == pytest.approx(sure * math.log(2.0), rel=1e-4)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_weak_view_is_constant_and_may_be_unsure_throughout() -> None:
    logits, weak = rows(5).requires_grad_(), rows(5, seed=1).requires_grad_()
    pseudo_label_cross_entropy(logits, weak, threshold=0.0).backward()
    assert weak.grad is None
    value = pseudo_label_cross_entropy(logits, weak, threshold=1.01)
    assert value.item() == 0.0
    assert torch.equal(torch.autograd.grad(value, logits)[0], torch.zeros(5, 4))
    # A probability equal to the threshold passes.
    halves = torch.tensor([[0.0, 0.0]])
    value = pseudo_label_cross_entropy(halves, halves, threshold=0.5)
    assert float(value) == pytest.approx(math.log(2.0))


def labels_by_hand(features: Array, probabilities: Array, rounds: int) -> list[int]:
    """Class by class, with scikit-learn's cosines; classes without mass are not there."""
    weights, labels = probabilities, np.zeros(len(features), dtype=int)
    for _ in range(rounds + 1):
        present = [c for c in range(weights.shape[1]) if weights[:, c].sum() > 0]
        centroids = [np.average(features, axis=0, weights=weights[:, c]) for c in present]
        labels = np.array(present)[cosine_similarity(features, np.stack(centroids)).argmax(1)]
        weights = np.eye(weights.shape[1])[labels]
    return list(labels.tolist())


@settings(max_examples=60)
@given(
    # Every centroid of a single sample has its direction, and any class may win.
    count=st.integers(2, 25),
    rounds=st.integers(0, 3),
    seed=st.integers(0, 1000),
    missing=st.integers(0, 4),
)
def test_centroid_labels_against_scikit_learn(
    count: int, rounds: int, seed: int, missing: int
) -> None:
    x, p = rows(count, 6, seed), torch.softmax(rows(count, 5, seed + 1), 1)
    p[:, missing] = 0.0
    labels = centroid_pseudo_labels(x, p, rounds)
    assert labels.tolist() == labels_by_hand(x.double().numpy(), p.double().numpy(), rounds)
    assert missing not in labels.tolist()
    assert labels.dtype == torch.int64


def test_centroids_correct_predictions_that_their_neighbours_contradict() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(40) % 2
    x = torch.randn(40, 3, generator=generator) * 0.3
    x[:, 0] += 4.0 * truth - 2.0
    p = torch.nn.functional.one_hot(truth, 2) * 0.6 + 0.2
    # Every fourth sample is predicted wrong.
    p[::4] = p[::4].flip(1)
    assert not torch.equal(p.argmax(1), truth)
    assert torch.equal(centroid_pseudo_labels(x, p), truth)


def test_a_class_of_little_mass_is_not_lost_and_none_at_all_is_refused() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([[1.0, 0.0], [1.0, 1e-25]])
    assert centroid_pseudo_labels(x, p, rounds=0).tolist() == [0, 1]
    with pytest.raises(UsageError, match="all of them are 0: pass a softmax"):
        centroid_pseudo_labels(x, torch.zeros(2, 2))
    # A model that has diverged is not the caller's mistake.
    assert len(centroid_pseudo_labels(x * math.nan, p * math.nan)) == 2


def test_centroid_cross_entropy_is_that_of_its_labels() -> None:
    logits, x = rows(9), rows(9, 6, seed=1)
    p = softmax(logits.double().numpy(), axis=1)
    labels = labels_by_hand(x.double().numpy(), p, rounds=1)
    assert labels != p.argmax(1).tolist()

    def expected(z: Array) -> float:
        log_p = np.log(softmax(z, axis=1))
        return float(-np.mean([log_p[i, label] for i, label in enumerate(labels)]))

    agrees(lambda z: centroid_cross_entropy(z, x), expected, logits)
