from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime
from scipy.special import rel_entr, softmax
from scipy.stats import entropy, pearsonr
from torch import Tensor

from cmkd_scale.losses.label_alignment import soft_label_divergence
from cmkd_scale.losses.logit_distillation import (
    column_correlation_distance,
    live_soft_label_divergence,
    non_target_class_divergence,
    row_correlation_distance,
    target_class_divergence,
)

Array = NDArray[np.float64]
Reference = Callable[[Array, Array, list[int], list[int], float], float]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]

UNKNOWN = -1e4


def example(batch: int = 5, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, live_logits = 3.0 * torch.randn(2, batch, classes, generator=generator)
    # The last class is not in the batch.
    return logits, live_logits, torch.randint(classes - 1, (batch,), generator=generator)


def probabilities(scores: Array, shared: list[int], temperature: float) -> Array:
    return np.asarray(softmax(scores[:, shared] / temperature, axis=1))


def soft_label_reference(
    x: Array, y: Array, labels: list[int], shared: list[int], temperature: float
) -> float:
    p, q = (probabilities(scores, shared, temperature) for scores in (x, y))
    return float(temperature**2 * np.mean([entropy(a, b) for a, b in zip(q, p, strict=True)]))


def target_reference(
    x: Array, y: Array, labels: list[int], shared: list[int], temperature: float
) -> float:
    p, q = (probabilities(scores, shared, temperature) for scores in (x, y))
    rows = []
    for row, label in enumerate(labels):
        column = shared.index(label)
        mine, theirs = p[row, column], q[row, column]
        rows.append(rel_entr(theirs, mine) + rel_entr(1 - theirs, 1 - mine))
    return float(temperature**2 * np.mean(rows))


def non_target_reference(
    x: Array, y: Array, labels: list[int], shared: list[int], temperature: float
) -> float:
    p, q = (probabilities(scores, shared, temperature) for scores in (x, y))
    rows = []
    for row, label in enumerate(labels):
        others = [column for column, name in enumerate(shared) if name != label]
        # entropy() makes its arguments sum to 1.
        rows.append(entropy(q[row, others], p[row, others]))
    return float(temperature**2 * np.mean(rows))


def row_reference(
    x: Array, y: Array, labels: list[int], shared: list[int], temperature: float
) -> float:
    p, q = (probabilities(scores, shared, temperature) for scores in (x, y))
    rows = [1.0 - pearsonr(a, b)[0] for a, b in zip(p, q, strict=True)]
    return float(temperature**2 * np.mean(rows))


def column_reference(
    x: Array, y: Array, labels: list[int], shared: list[int], temperature: float
) -> float:
    p, q = (probabilities(scores, shared, temperature) for scores in (x, y))
    columns = [1.0 - pearsonr(a, b)[0] for a, b in zip(p.T, q.T, strict=True)]
    return float(temperature**2 * np.mean(columns))


def without_labels(
    loss: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
    logits: Tensor,
    live_logits: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    temperature: float,
) -> Tensor:
    return loss(logits, live_logits, excluded, temperature)


LOSSES: dict[str, tuple[Loss, Reference]] = {
    "soft label": (partial(without_labels, live_soft_label_divergence), soft_label_reference),
    "target": (target_class_divergence, target_reference),
    "non-target": (non_target_class_divergence, non_target_reference),
    "rows": (partial(without_labels, row_correlation_distance), row_reference),
    "columns": (partial(without_labels, column_correlation_distance), column_reference),
}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("unknown", [[], [5], [0, 5]])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_against_the_definition(
    name: str, unknown: list[int], temperature: float
) -> None:
    loss, reference = LOSSES[name]
    logits, live_logits, labels = example()
    shared = [c for c in range(6) if c not in unknown]
    labels = torch.tensor(shared)[labels % len(shared)]
    live_logits[:, unknown] = UNKNOWN
    excluded = torch.tensor([c in unknown for c in range(6)]) if unknown else None
    x, y = logits.double().numpy(), live_logits.double().numpy()

    def at(flat: Array) -> float:
        return reference(flat.reshape(x.shape), y, labels.tolist(), shared, temperature)

    logits.requires_grad_()
    value = loss(logits, live_logits, labels, excluded, temperature)
    value.backward()
    assert value.item() == pytest.approx(at(x.ravel()), rel=1e-4)
    assert logits.grad is not None
    numeric = approx_fprime(x.ravel(), at, 1e-6).reshape(x.shape)
    np.testing.assert_allclose(logits.grad.numpy(), numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_networks_are_at_distance_0_and_the_teacher_is_a_constant(name: str) -> None:
    loss, _ = LOSSES[name]
    logits, live_logits, labels = example()
    assert loss(logits, logits.clone(), labels, None, 2.0).item() == pytest.approx(0.0, abs=1e-5)
    logits.requires_grad_()
    live_logits.requires_grad_()
    loss(logits, live_logits, labels, None, 2.0).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0.01
    assert live_logits.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_classes_that_one_side_does_not_know_have_no_influence(name: str) -> None:
    loss, _ = LOSSES[name]
    logits, live_logits, labels = example()
    excluded = torch.tensor([False] * 5 + [True])
    other = logits.clone()
    other[:, 5] += 7.0
    logits.requires_grad_()
    value = loss(logits, live_logits, labels, excluded, 2.0)
    value.backward()
    assert loss(other, live_logits, labels, excluded, 2.0).item() == value.item()
    assert logits.grad is not None
    assert (logits.grad[:, 5] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_sure_networks_and_unknown_labels_give_finite_numbers(name: str) -> None:
    loss, _ = LOSSES[name]
    logits = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0]], requires_grad=True)
    live_logits = torch.tensor([[-300.0, 300.0, UNKNOWN], [0.0, 300.0, UNKNOWN]])
    excluded = torch.tensor([False, False, True])
    for labels in ([0, 1], [2, 2]):
        value = loss(logits, live_logits, torch.tensor(labels), excluded, 1.0)
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, _ = LOSSES[name]
    logits, live_logits, labels = example()
    half = logits.bfloat16(), live_logits.bfloat16()
    value = loss(*half, labels, None, 4.0)
    assert value.dtype == torch.float32
    exact = loss(half[0].float(), half[1].float(), labels, None, 4.0)
    assert value.item() == exact.item()


def test_soft_labels_of_a_live_teacher_are_soft_labels() -> None:
    logits, live_logits, _ = example()
    soft = torch.softmax(live_logits / 4.0, 1)
    stored = soft_label_divergence(logits, soft, torch.ones(5), None, temperature=4.0)
    live = live_soft_label_divergence(logits, live_logits, None, temperature=4.0)
    assert live.item() == pytest.approx(stored.item(), rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 9),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_target_and_non_target_add_up_to_the_whole(
    seed: int, classes: int, temperature: float
) -> None:
    # For one sample, KD = TCKD + (1 - p_T(label)) NCKD: equation 6.
    logits, live_logits, labels = example(1, classes, seed)
    p = torch.softmax(live_logits / temperature, 1)[0, labels[0]].item()
    whole = live_soft_label_divergence(logits, live_logits, None, temperature).item()
    target = target_class_divergence(logits, live_logits, labels, None, temperature).item()
    others = non_target_class_divergence(logits, live_logits, labels, None, temperature).item()
    assert target + (1 - p) * others == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_a_batch_of_one_has_no_columns_to_compare() -> None:
    logits, live_logits, _ = example(batch=1)
    logits.requires_grad_()
    value = column_correlation_distance(logits, live_logits, None, 1.0)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_rows_and_columns_without_variation_are_left_out() -> None:
    logits, live_logits, _ = example(batch=3)
    rows = row_correlation_distance(logits[1:], live_logits[1:], None, 1.0).item()
    logits[0] = 1.0
    logits.requires_grad_()
    value = row_correlation_distance(logits, live_logits, None, 1.0)
    value.backward()
    assert value.item() == pytest.approx(rows, rel=1e-5)
    assert logits.grad is not None
    assert (logits.grad[0] == 0).all()
    equal = logits[:1].detach().repeat(4, 1).requires_grad_()
    value = column_correlation_distance(equal, live_logits[:1].repeat(4, 1), None, 1.0)
    value.backward()
    assert value.item() == 0.0
    assert equal.grad is not None
    assert torch.isfinite(equal.grad).all()
