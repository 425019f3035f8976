from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses.norm import NormLoss
from cmkd_scale.losses.sizes import Sizes

SIZES = Sizes(classes=3, student_dim=5, teacher_dim=4, student_stages=(8,), teacher_stages=(8,))


def example(copies: int = 4, batch: int = 6) -> tuple[NormLoss, Tensor, Tensor]:
    torch.manual_seed(0)
    return NormLoss(SIZES, copies), torch.randn(batch, 5), torch.randn(batch, 4)


@pytest.mark.parametrize("copies", [1, 4, 8])
def test_value_and_gradients_against_loops(copies: int) -> None:
    loss, student, teacher = example(copies)
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    z, t = student.detach().double().numpy(), teacher.detach().double().numpy()
    weight = loss.expand.weight.detach().double().numpy()
    bias = loss.expand.bias.detach().double().numpy()
    total, by_student, by_weight = 0.0, np.zeros_like(z), np.zeros_like(weight)
    for row in range(6):
        for part in range(copies):
            own = slice(4 * part, 4 * part + 4)
            apart = weight[own] @ z[row] + bias[own] - t[row]
            total += (apart**2).sum() / (6 * 4)
            by_student[row] += 2 * weight[own].T @ apart / (6 * 4)
            by_weight[own] += 2 * np.outer(apart, z[row]) / (6 * 4)
    assert value.item() == pytest.approx(total, rel=1e-5)
    assert student.grad is not None
    assert loss.expand.weight.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), by_student, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.expand.weight.grad.numpy(), by_weight, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None


def test_views_that_all_hit_the_teacher_cost_nothing() -> None:
    loss, student, _ = example()
    teacher = student[:, :4].clone()
    with torch.no_grad():
        loss.expand.weight.copy_(torch.eye(4, 5).repeat(4, 1))
        loss.expand.bias.zero_()
    assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-10)
    assert loss(student, teacher + 1.0).item() == pytest.approx(4.0, rel=1e-5)


def test_a_batch_may_be_split() -> None:
    loss, student, teacher = example()
    halves = [loss(student[part], teacher[part]).item() for part in (slice(3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(loss(student, teacher).item(), rel=1e-5)
    assert torch.isfinite(loss(student[:1], teacher[:1]))


def test_weights_gathered_in_half_precision_are_used_in_float32() -> None:
    loss, student, teacher = example()
    half = copy.deepcopy(loss).bfloat16()
    value = half(student, teacher)
    assert value.dtype == torch.float32
    # Exactly what the rounded weights give: products are not rounded, too.
    assert value.item() == half.float()(student, teacher).item()
