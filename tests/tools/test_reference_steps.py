from __future__ import annotations

import copy

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.models.model import Model, build_model
from tools.bench import _reference_steps as reference
from tools.bench._reference_steps import PairedBatch, ReferenceOptions

CLASSES, DIM, BATCH = 5, 16, 12
OPTIONS = ReferenceOptions()


def small_model(shape: tuple[int, int, int], seed: int) -> Model:
    torch.manual_seed(seed)
    return build_model(
        encoder="resnet", shape=shape, width=8, depth=1, feature_dim=DIM, classes=CLASSES
    )


def student_and_teacher() -> tuple[Model, Model]:
    return small_model((1, 12, 16), 0), small_model((1, 14, 10), 1).eval()


def with_another_head(teacher: Model) -> Model:
    other = copy.deepcopy(teacher)
    torch.manual_seed(5)
    nn.init.normal_(other.head.weight, std=2.0)
    return other


@pytest.fixture
def batch() -> PairedBatch:
    generator = torch.Generator().manual_seed(2)
    return PairedBatch(
        torch.randn(BATCH, 1, 12, 16, generator=generator),
        torch.randn(BATCH, 1, 14, 10, generator=generator),
        torch.randint(CLASSES, (BATCH,), generator=generator),
    )


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(model: Model) -> Tensor:
    return flat(list(model.parameters()))


def gradient(loss: Tensor, model: Model) -> Tensor:
    return flat(list(torch.autograd.grad(loss, list(model.parameters()))))


def stepped(step: str, student: Model, teacher: Model, batch: PairedBatch) -> Tensor:
    """Weights of a copy of the student after one step of gradient descent."""
    trained = copy.deepcopy(student)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    getattr(reference, step)(trained, teacher, optimizer, batch, OPTIONS)
    return weights(trained)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_feature_alignment_is_the_transport_cost_of_pot(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, DIM, generator=generator) for _ in range(2))
    value = reference.feature_alignment(first, second, OPTIONS)
    a, b = (features.double().numpy() for features in (first, second))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    cost, mass = 1 - a @ b.T, np.full(size, 1 / size)
    plan = ot.sinkhorn(mass, mass, cost, 0.1, method="sinkhorn_log", numItermax=100, warn=False)
    assert value.item() == pytest.approx((plan * cost).sum(), rel=1e-4, abs=1e-6)


def test_feature_alignment_has_the_gradient_of_its_value() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda features: reference.feature_alignment(features, second, OPTIONS),
        (first.requires_grad_(),),
    )


def test_label_alignment_is_the_weighted_difference_of_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, BATCH, CLASSES, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,))
    kappa = torch.softmax(teacher_logits, 1)[torch.arange(BATCH), labels]
    own = functional.cross_entropy(logits, labels, reduction="none")
    teachers = functional.cross_entropy(teacher_logits, labels, reduction="none")
    value = reference.label_alignment(logits, teacher_logits, labels)
    torch.testing.assert_close(value, (own - kappa * teachers).mean())


def test_the_loss_of_sumall_is_the_weighted_sum_of_its_parts(batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    output = student(batch.student_inputs)
    parts = [
        functional.cross_entropy(output.logits, batch.labels),
        reference.feature_alignment(
            output.features, teacher(batch.teacher_inputs).features, OPTIONS
        ),
        reference.label_alignment(output.logits, teacher.head(output.features), batch.labels),
    ]
    for weight in (0.0, 1.0, 3.0):
        options = ReferenceOptions(feature_weight=weight, label_weight=2 * weight)
        value = reference.sumall_loss(student, teacher, batch, options)
        expected = parts[0] + weight * parts[1] + 2 * weight * parts[2]
        torch.testing.assert_close(value, expected)


def test_the_gradient_of_sumall_depends_on_the_teachers_encoder_and_head(
    batch: PairedBatch,
) -> None:
    student, teacher = student_and_teacher()
    head_only = ReferenceOptions(feature_weight=0.0)
    first, second = (
        gradient(reference.sumall_loss(student, each, batch, head_only), student)
        for each in (teacher, with_another_head(teacher))
    )
    assert (first - second).norm() > 0.1 * first.norm()
    encoder_only = ReferenceOptions(label_weight=0.0)
    other = small_model((1, 14, 10), 7).eval()
    first, second = (
        gradient(reference.sumall_loss(student, each, batch, encoder_only), student)
        for each in (teacher, other)
    )
    assert (first - second).norm() > 0.01 * first.norm()


def test_sumall_steps_along_its_gradient(batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    expected = gradient(reference.sumall_loss(student, teacher, batch, OPTIONS), student)
    expected = expected * min(1.0, OPTIONS.clip / float(expected.norm()))
    update = weights(student) - stepped("sumall_step", student, teacher, batch)
    torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)


def test_the_label_step_of_bilevel_knows_nothing_of_the_teachers_head(
    batch: PairedBatch,
) -> None:
    student, teacher = student_and_teacher()
    first = stepped("bilevel_step", student, teacher, batch)
    assert torch.equal(first, stepped("bilevel_step", student, with_another_head(teacher), batch))
    other = small_model((1, 14, 10), 7).eval()  # while the feature step does know the encoder
    assert not torch.equal(first, stepped("bilevel_step", student, other, batch))


def test_bilevel_is_nearly_the_plain_step(batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    loss = functional.cross_entropy(student(batch.student_inputs).logits, batch.labels)
    plain = gradient(loss, student)
    update = weights(student) - stepped("bilevel_step", student, teacher, batch)
    assert functional.cosine_similarity(update, plain, dim=0) > 0.99
    assert float(update.norm()) <= OPTIONS.clip * 1.0001


def test_the_inner_steps_move_a_weight_by_the_inner_rate_or_not_at_all(batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    options = ReferenceOptions(inner_weight_decay=0.0)
    moved = weights(reference.adapt(student, teacher, batch, options)) - weights(student)
    # The first step of a new AdamW is the sign of the gradient, whatever its size.
    assert moved.abs().max() <= 1.01 * options.inner_learning_rate
    assert moved[moved != 0].abs().median() > 0.99 * options.inner_learning_rate


@pytest.mark.parametrize("step", ["sumall_step", "bilevel_step"])
def test_the_teacher_never_changes(step: str, batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    stepped(step, student, teacher, batch)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bilevel_keeps_the_buffers_of_the_adapted_copy(batch: PairedBatch) -> None:
    student, teacher = student_and_teacher()
    student.projection.insert(0, nn.BatchNorm1d(student.encoder.out_dim))  # type: ignore[arg-type]
    trained = copy.deepcopy(student)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    reference.bilevel_step(trained, teacher, optimizer, batch, OPTIONS)
    passes = OPTIONS.inner_feature_steps + OPTIONS.inner_label_steps + 1
    assert dict(trained.named_buffers())["projection.0.num_batches_tracked"] == passes
