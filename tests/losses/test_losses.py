from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses import LOSSES, Sizes
from cmkd_scale.losses.classification import smoothed_cross_entropy
from cmkd_scale.losses.feature_alignment import gaussian_distance, transport_cost
from cmkd_scale.losses.head_transfer import head_pull
from cmkd_scale.losses.label_alignment import (
    exclude_classes,
    soft_label_divergence,
    teacher_head_cross_entropy,
)

ALL = None
SIZES = Sizes(
    classes=4, student_dim=6, teacher_dim=6, student_stages=(4, 8), teacher_stages=(4, 8, 8)
)


def logits_and_labels(batch: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator)
    return logits, torch.randint(classes, (batch,), generator=generator)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_table_names_the_arguments_that_its_functions_take(name: str) -> None:
    loss = LOSSES[name]
    function = loss.function if loss.build is None else loss.build(SIZES).forward
    parameters = inspect.signature(function).parameters.values()
    taken = {parameter.name for parameter in parameters}
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    assert required <= set(loss.needs) <= taken


def test_smoothing_against_its_definition() -> None:
    logits, labels = logits_and_labels()
    scores = logits.double().numpy()
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = np.full(log_p.shape, 0.1 / 4)
    target[np.arange(6), labels.numpy()] += 0.9
    expected = -(target * log_p).sum(1).mean()
    assert float(smoothed_cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_divergence_against_its_definition() -> None:
    logits, _ = logits_and_labels()
    soft = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), 1)
    known = torch.tensor([True, True, False, True, True, True])
    value = soft_label_divergence(logits, soft, known, ALL, temperature=4.0)
    scores, q = logits.double().numpy() / 4.0, soft.double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    rows = (q * np.log(q / p)).sum(1) * known.numpy()
    assert float(value) == pytest.approx(16.0 * rows.sum() / 6, rel=1e-4)


def test_divergence_is_over_shared_classes_only() -> None:
    logits, _ = logits_and_labels()
    shared = torch.tensor([True, True, False, True])
    soft = torch.softmax(logits[:, shared] / 4.0, 1)
    spread = torch.zeros(6, 4)
    spread[:, shared] = soft
    logits = logits.clone().requires_grad_()
    known = torch.ones(6, dtype=torch.bool)
    value = soft_label_divergence(logits, spread, known, ~shared, temperature=4.0)
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2] == 0).all()


def test_the_label_gradient_depends_on_the_teachers_head() -> None:
    # In the released reference two random heads give bitwise equal gradients.
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    _, labels = logits_and_labels()
    gradients = []
    for seed in (3, 4):
        head = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        z = features.clone().requires_grad_()
        known = torch.ones(6, dtype=torch.bool)
        teacher_head_cross_entropy(exclude_classes(z @ head.T, ALL), labels, known).backward()
        assert z.grad is not None
        gradients.append(z.grad)
    assert not torch.allclose(gradients[0], gradients[1])


def test_samples_unknown_to_the_teacher_add_nothing() -> None:
    logits, labels = logits_and_labels()
    share = torch.zeros(6)
    assert float(teacher_head_cross_entropy(logits, labels, share)) == 0.0
    assert float(transport_cost(torch.ones(6), share)) == 0.0
    assert float(gaussian_distance(torch.ones(6), share)) == 0.0


def test_shares_weight_samples() -> None:
    logits, labels = logits_and_labels()
    share = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    rows = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    value = teacher_head_cross_entropy(logits, labels, share)
    assert float(value) == pytest.approx(float(rows[0] + 0.5 * rows[1]) / 6)
    assert float(transport_cost(torch.full((6,), 2.0), share)) == pytest.approx(0.5)


def test_head_pull_is_a_mean_over_classes_by_their_share() -> None:
    student, teacher = torch.ones(4, 3), torch.zeros(4, 3)
    teacher[3] = 1.0
    share = torch.tensor([0.5, 0.0, 0.0, 0.5])
    assert float(head_pull(student, teacher, share)) == pytest.approx(1.5)
