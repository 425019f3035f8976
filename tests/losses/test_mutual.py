from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.mutual import (
    cohort_cross_entropy,
    cohort_teacher_class,
    mutual_divergence,
)

Array = npt.NDArray[np.float64]


def students(count: int, batch: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2.0 * torch.randn(batch, 4, generator=generator) for _ in range(count)]


def by_hand(learners: Array, teachers: Array) -> float:
    """Pair by pair, with scipy's relative entropy; [K, B, C] logits of both roles."""
    p, q = softmax(teachers, axis=2), softmax(learners, axis=2)
    total = 0.0
    for k in range(len(q)):
        others = [j for j in range(len(p)) if j != k]
        total += float(np.mean([entropy(p[j], q[k], axis=1).mean() for j in others]))
    return total / len(q)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_value_and_gradient_against_scipys_divergence(count: int) -> None:
    logits = [student.requires_grad_() for student in students(count)]
    values = np.stack([student.detach().double().numpy() for student in logits])
    value = mutual_divergence(logits)
    assert value.item() == pytest.approx(by_hand(values, values), rel=1e-5)
    slopes = np.stack([slope.numpy() for slope in torch.autograd.grad(value, logits)])

    def learners_alone(flat: Array) -> float:
        # Teachers stay where they are: each pair's is a constant.
        return by_hand(flat.reshape(values.shape), values)

    differences = np.asarray(approx_fprime(values.ravel(), learners_alone, 1e-7))
    np.testing.assert_allclose(slopes.ravel(), differences, rtol=1e-3, atol=1e-5)


def test_one_student_learns_nothing_from_itself_and_none_is_refused() -> None:
    assert float(mutual_divergence(students(1))) == 0.0
    with pytest.raises(UsageError, match="pass the logits of one or more"):
        mutual_divergence([])


def test_students_that_agree_have_no_divergence_and_no_gradient() -> None:
    first = students(1)[0].requires_grad_()
    # Agreement is of probabilities: a shift of a sample's logits changes nothing.
    second = (first.detach() + 3.0).requires_grad_()
    value = mutual_divergence([first, second])
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    for slope in torch.autograd.grad(value, [first, second]):
        torch.testing.assert_close(slope, torch.zeros(5, 4), rtol=0, atol=1e-6)


def test_excluded_classes_leave_the_value_finite() -> None:
    logits = students(3)
    expected = mutual_divergence([student[:, [0, 1, 3]] for student in logits])
    for student in logits:
        student[:, 2] = -1e4
        student.requires_grad_()
    value = mutual_divergence(logits)
    assert value.item() == pytest.approx(float(expected), rel=1e-5)
    for slope in torch.autograd.grad(value, logits):
        assert torch.isfinite(slope).all()


@settings(max_examples=40)
@given(count=st.integers(2, 5), batch=st.integers(1, 6), seed=st.integers(0, 1000))
def test_it_is_positive_symmetric_and_the_mean_over_samples(
    count: int, batch: int, seed: int
) -> None:
    logits = students(count, batch, seed)
    value = float(mutual_divergence(logits))
    assert value > 0.0
    assert float(mutual_divergence(logits[::-1])) == pytest.approx(value, rel=1e-5)
    samples = [mutual_divergence([student[[i]] for student in logits]) for i in range(batch)]
    assert float(torch.stack(samples).mean()) == pytest.approx(value, rel=1e-5)


def test_a_cohorts_cross_entropies_are_sums_over_its_students() -> None:
    logits, labels = students(3), torch.tensor([0, 3, 2, 2, 1])
    live = students(1, seed=1)[0]
    smoothed = teacher = 0.0
    for student in logits:
        log_p = np.log(softmax(student.double().numpy(), axis=1))
        target = 0.9 * np.eye(4)[labels.numpy()] + 0.1 / 4
        smoothed -= (target * log_p).sum() / 5
        teacher -= log_p[np.arange(5), live.numpy().argmax(1)].mean()
    assert float(cohort_cross_entropy(logits, labels)) == pytest.approx(smoothed, rel=1e-5)
    assert float(cohort_teacher_class(logits, live)) == pytest.approx(teacher, rel=1e-5)
