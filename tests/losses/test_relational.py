from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from cmkd_scale.losses.relational import relative_angle, relative_distance

Array = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]


def example(seed: int = 0, batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, 3, generator=generator)
    return student, 2.0 * torch.randn(batch, 4, generator=generator)


def huber(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def distance_reference(x: Array, y: Array) -> float:
    # pdist lists each pair of different samples once: its mean is equation 6's.
    a, b = (squareform(pdist(side)) / pdist(side).mean() for side in (x, y))
    return float(np.mean([huber(d) for d in (a - b).ravel()]))


def cosine(x: Array, i: int, j: int, k: int) -> float:
    if i in (j, k):
        return 0.0
    to_j, to_k = x[j] - x[i], x[k] - x[i]
    return float(to_j @ to_k / np.linalg.norm(to_j) / np.linalg.norm(to_k))


def angle_reference(x: Array, y: Array) -> float:
    triplets = itertools.product(range(len(x)), repeat=3)
    return float(np.mean([huber(cosine(x, *t) - cosine(y, *t)) for t in triplets]))


LOSSES: dict[str, tuple[Loss, Callable[[Array, Array], float]]] = {
    "distance": (relative_distance, distance_reference),
    "angle": (relative_angle, angle_reference),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_against_the_definition(name: str, seed: int) -> None:
    loss, reference = LOSSES[name]
    student, teacher = example(seed)
    x, y = student.double().numpy(), teacher.double().numpy()

    def at(flat: Array) -> float:
        return reference(flat.reshape(x.shape), y)

    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(at(x.ravel()), rel=1e-4)
    assert student.grad is not None
    numeric = approx_fprime(x.ravel(), at, 1e-7).reshape(x.shape)
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-3, atol=1e-5)
    assert teacher.grad is None


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100.0), batch=st.integers(2, 8))
def test_a_moved_turned_and_scaled_teacher_is_matched(seed: int, scale: float, batch: int) -> None:
    student, _ = example(seed, batch)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))
    teacher = scale * (student @ torch.from_numpy(turn[:3]).float() + 1.0)
    for loss, _ in LOSSES.values():
        assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_samples_have_a_finite_gradient(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = example()
    student[1] = student[0]
    teacher[3] = teacher[2]
    for features in (student, torch.ones(5, 3)):
        features.requires_grad_()
        value = loss(features, teacher)
        (gradient,) = torch.autograd.grad(value, features)
        assert value.item() > 0.0
        assert gradient.abs().max() < 10.0


@pytest.mark.parametrize("name", LOSSES)
def test_an_equal_pair_leaves_the_others_gradient_what_it_was(name: str) -> None:
    # Directions between rounding errors would drown all others.
    loss, _ = LOSSES[name]
    student, teacher = example()
    teacher[1] = teacher[0] + 0.1
    gradients = []
    for apart in (0.0, 1e-7):
        features = student.clone()
        features[1] = features[0] + apart
        features.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(features, teacher), features)
        gradients.append(gradient[2:])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_features_far_from_the_origin_keep_their_relations(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = example()
    moved = loss(student + 1000.0, teacher).item()
    assert moved == pytest.approx(loss(student, teacher).item(), rel=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_one_sample_has_no_relations(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = example(batch=1)
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, _ = LOSSES[name]
    student, teacher = (side.bfloat16() for side in example())
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == loss(student.float(), teacher.float()).item()
