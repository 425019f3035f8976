from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime
from scipy.signal import correlate2d
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.losses.review_kd import ReviewKDLoss, hierarchical_context_loss
from cmkd_scale.losses.sizes import Sizes, as_map

Array = NDArray[np.float64]


def sizes(student: tuple[int, ...], teacher: tuple[int, ...]) -> Sizes:
    return Sizes(
        classes=3, student_dim=4, teacher_dim=4, student_stages=student, teacher_stages=teacher
    )


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pooled(maps: Array, height: int, width: int) -> Array:
    """Adaptive average pooling by its definition."""
    out = np.empty((*maps.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = i * maps.shape[2] // height, -(-(i + 1) * maps.shape[2] // height)
            left, right = j * maps.shape[3] // width, -(-(j + 1) * maps.shape[3] // width)
            out[:, :, i, j] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return out


def context_reference(x: Array, y: Array) -> float:
    terms, weights = [((x - y) ** 2).mean()], [1.0]
    for side in (4, 2, 1):
        if side < max(x.shape[2:]):
            small = min(side, x.shape[2]), min(side, x.shape[3])
            terms.append(((pooled(x, *small) - pooled(y, *small)) ** 2).mean())
            weights.append(weights[-1] / 2)
    return float(np.dot(terms, weights) / sum(weights))


@pytest.mark.parametrize("shape", [(8, 8), (5, 5), (4, 4), (1, 1), (9, 1), (3, 6)])
def test_hierarchical_context_against_its_definition(shape: tuple[int, int]) -> None:
    student, teacher = numbers(2, 3, *shape), numbers(2, 3, *shape, seed=1)
    value = hierarchical_context_loss(student, teacher).item()
    expected = context_reference(student.double().numpy(), teacher.double().numpy())
    assert value == pytest.approx(expected, rel=1e-5)
    assert hierarchical_context_loss(student, student).item() == 0.0


def test_weights_of_the_pooled_maps_by_hand() -> None:
    # A difference that pooling keeps, and one that pooling to any smaller side removes.
    flat = torch.ones(1, 1, 8, 8)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).reshape(1, 1, 8, 8)
    zero = torch.zeros(1, 1, 8, 8)
    assert hierarchical_context_loss(flat, zero).item() == pytest.approx(1.0)
    assert hierarchical_context_loss(board, zero).item() == pytest.approx(1 / 1.875)


def normalised(maps: Array, norm: Sequence[Array]) -> Array:
    mean, spread = maps.mean((1, 2, 3), keepdims=True), maps.var((1, 2, 3), keepdims=True)
    gain, shift = (values[:, None, None] for values in norm)
    return np.asarray((maps - mean) / np.sqrt(spread + 1e-5) * gain + shift)


def convolved(maps: Array, kernel: Array) -> Array:
    out = np.zeros((len(maps), len(kernel), *maps.shape[2:]))
    for sample, one in enumerate(maps):
        for target, filters in enumerate(kernel):
            for channel, window in zip(one, filters, strict=True):
                out[sample, target] += correlate2d(channel, window, mode="same")
    return out


def reference(loss: ReviewKDLoss, stages: Sequence[Array], live_stages: Sequence[Array]) -> float:
    """The loss by its definition, from the deepest stage on."""
    deeper, values = None, []
    for level in reversed(range(len(loss.fusions))):
        named = loss.fusions[level].named_parameters()
        weights = {name: weight.detach().double().numpy() for name, weight in named}
        stage, wanted = stages[level], live_stages[level]
        fused = convolved(stage, weights["narrow.0.weight"])
        fused = normalised(fused, (weights["narrow.1.weight"], weights["narrow.1.bias"]))
        if deeper is not None:
            deeper = pooled(deeper, *fused.shape[2:])
            both = convolved(np.concatenate([fused, deeper], 1), weights["attention.weight"])
            shares = expit(both + weights["attention.bias"][:, None, None])
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        deeper = pooled(fused, *wanted.shape[2:])
        out = convolved(deeper, weights["widen.0.weight"])
        out = normalised(out, (weights["widen.1.weight"], weights["widen.1.bias"]))
        values.append(context_reference(out, wanted))
    return float(np.mean(values))


def test_value_and_gradient_against_the_definition() -> None:
    torch.manual_seed(0)
    loss = ReviewKDLoss(sizes((2, 3), (4, 3)))
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shallow, deep = numbers(2, 2, 6, 4), numbers(2, 3, 3, 2, seed=1)
    live = (numbers(2, 4, 5, 5, seed=2), numbers(2, 3, 2, 4, seed=3))
    exact = [stage.double().numpy() for stage in live]
    fixed = deep.double().numpy()

    def at(flat: Array) -> float:
        return reference(loss, [flat.reshape(2, 2, 6, 4), fixed], exact)

    def at_deep(flat: Array) -> float:
        return reference(
            loss, [shallow.detach().double().numpy(), flat.reshape(fixed.shape)], exact
        )

    shallow.requires_grad_()
    deep.requires_grad_()
    value = loss((shallow, deep), live)
    value.backward()
    for stage, function in ((shallow, at), (deep, at_deep)):
        flat = stage.detach().double().numpy().ravel()
        assert value.item() == pytest.approx(function(flat), rel=1e-5)
        assert stage.grad is not None
        numeric = approx_fprime(flat, function, 1e-6).reshape(stage.shape)
        np.testing.assert_allclose(stage.grad.numpy(), numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 4, 8), (3, 6)),
        ((5, 7), (3, 3, 3, 3)),
        ((4,), (4, 8)),
    ],
)
def test_levels_are_paired_from_the_deepest_and_all_of_it_is_trained(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    loss = ReviewKDLoss(sizes(student, teacher))
    stages = [numbers(2, c, 8 >> i, 8 >> i).requires_grad_() for i, c in enumerate(student)]
    live = [numbers(2, 5, c, seed=1).requires_grad_() for c in teacher]
    loss(stages, live).backward()
    levels = min(len(student), len(teacher))
    reached = [stage.grad is not None for stage in stages]
    assert reached == [False] * (len(student) - levels) + [True] * levels
    assert all(stage.grad is None for stage in live)
    for parameter in loss.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_sequences_and_vectors_are_read_as_maps() -> None:
    torch.manual_seed(0)
    loss = ReviewKDLoss(sizes((4, 6), (5, 3)))
    sequence, vector = numbers(2, 7, 4), numbers(2, 6, seed=1)
    live = (numbers(2, 5, 5, seed=2), numbers(2, 3, seed=3))
    as_maps = [as_map(stage) for stage in (sequence, vector)]
    assert as_maps[0].shape == (2, 4, 7, 1)
    assert (as_maps[0][1, 2, :, 0] == sequence[1, :, 2]).all()
    assert as_maps[1].shape == (2, 6, 1, 1)
    mapped = loss(as_maps, [as_map(stage) for stage in live])
    assert loss((sequence, vector), live).item() == mapped.item()
    assert math.isfinite(mapped.item())


@settings(deadline=None, max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    factor=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_growing_by_a_whole_factor_repeats_the_nearest(
    shape: tuple[int, int], factor: int, seed: int
) -> None:
    torch.manual_seed(seed)
    loss = ReviewKDLoss(sizes((3,), (2,)))
    narrow = loss.fusions[0].narrow
    assert isinstance(narrow, nn.Sequential)
    small = torch.randn(2, 3, *shape)
    size = (factor * shape[0], factor * shape[1])
    _, fused = loss.fusions[0](small, None, size)
    expected = functional.interpolate(narrow(small), size=size, mode="nearest")
    torch.testing.assert_close(fused, expected)


def test_a_batch_may_be_split() -> None:
    torch.manual_seed(0)
    loss = ReviewKDLoss(sizes((2, 3), (4, 3)))
    stages = (numbers(4, 2, 6, 6), numbers(4, 3, 3, 3, seed=1))
    live = (numbers(4, 4, 5, 5, seed=2), numbers(4, 3, 2, 2, seed=3))
    one_by_one = [
        loss([s[row : row + 1] for s in stages], [s[row : row + 1] for s in live]).item()
        for row in range(4)
    ]
    assert np.mean(one_by_one) == pytest.approx(loss(stages, live).item(), rel=1e-5)


def test_weights_gathered_in_half_precision_are_used_in_float32() -> None:
    torch.manual_seed(0)
    loss: nn.Module = ReviewKDLoss(sizes((2, 3), (4, 3))).bfloat16()
    stages = (numbers(4, 2, 6, 6), numbers(4, 3, 3, 3, seed=1))
    live = (numbers(4, 4, 5, 5, seed=2), numbers(4, 3, 2, 2, seed=3))
    value = loss(stages, live)
    assert value.dtype == torch.float32
    assert value.item() == loss.float()(stages, live).item()
