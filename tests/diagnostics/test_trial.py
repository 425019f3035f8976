from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from cmkd_scale.diagnostics import trial
from cmkd_scale.diagnostics.arrays import Floats
from cmkd_scale.diagnostics.trial import Samples, Trial, try_heads

SIZE = 5
CLASSES = SIZE * SIZE


def samples(per_class: int, seed: int) -> Samples:
    """Of classes that share halves, as two-digit numbers do, through features of a student."""
    rng = np.random.default_rng(seed)
    half = np.eye(SIZE)
    means = np.array([np.r_[half[i], half[j]] for i in range(SIZE) for j in range(SIZE)])
    mixed = means @ np.random.default_rng(9).normal(size=(2 * SIZE, 12))
    labels = np.repeat(np.arange(CLASSES), per_class)
    return Samples(mixed[labels] + rng.normal(size=(len(labels), 12)), labels)


def teacher() -> Floats:
    """[C, C] soft labels: numbers that share a digit are alike."""
    tens, units = np.divmod(np.arange(CLASSES), SIZE)
    shared = (tens[:, None] == tens).astype(float) + (units[:, None] == units)
    return np.asarray(softmax(1.5 * shared, axis=1))


def arguments() -> tuple[Floats, Floats, Floats]:
    """Inputs, smoothed labels and soft labels of a fit."""
    train = samples(3, seed=0)
    hard = np.full((len(train.labels), CLASSES), 0.1 / CLASSES)
    hard[np.arange(len(train.labels)), train.labels] += 0.9
    return train.features, hard, teacher()[train.labels]


def test_heads_of_labels_alone_are_those_of_a_logistic_regression() -> None:
    inputs, hard, soft = arguments()
    decay = 1e-2
    weight, bias = trial._fit(inputs, hard, soft, share=0.0, temperature=4.0, decay=decay)
    count = len(inputs)
    reference = LogisticRegression(C=1 / (2 * decay * count), tol=1e-10, max_iter=5000)
    # A soft target is a sample of every class, each weighted by its probability.
    rows, targets = np.repeat(np.arange(count), CLASSES), np.tile(np.arange(CLASSES), count)
    reference.fit(inputs[rows], targets, sample_weight=hard.reshape(-1))
    ours = softmax(inputs @ weight + bias, axis=1)
    np.testing.assert_allclose(ours, reference.predict_proba(inputs), atol=2e-3)


def test_heads_with_soft_labels_minimise_the_distillation_loss() -> None:
    inputs, hard, soft = arguments()
    given = [torch.tensor(part) for part in (inputs, hard, soft)]
    decay, temperature, share = 1e-3, 3.0, 0.7

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = given[0] @ weight + bias
        labels = functional.cross_entropy(scores, given[1])
        taught = functional.cross_entropy(scores / temperature, given[2])
        return labels + share * temperature**2 * taught + decay * weight.square().sum()

    found = [
        torch.tensor(part) for part in trial._fit(inputs, hard, soft, share, temperature, decay)
    ]
    free = [torch.zeros_like(part).requires_grad_() for part in found]
    reference = torch.optim.LBFGS(free, max_iter=2000, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        reference.zero_grad()
        value = loss(*free)
        value.backward()
        return value

    reference.step(closure)
    with torch.no_grad():
        assert float(loss(*found)) == pytest.approx(float(loss(*free)), rel=1e-3)


def tried(train: Samples, held_out: Samples, table: Floats) -> Trial:
    found = try_heads(train, held_out, table, temperature=2.0)
    assert found is not None
    return found


def test_the_right_structure_helps_and_a_wrong_one_or_none_harms() -> None:
    train, held_out = samples(2, seed=1), samples(20, seed=2)
    names = np.random.default_rng(0).permutation(CLASSES)
    right = tried(train, held_out, teacher())
    wrong = tried(train, held_out, teacher()[names][:, names])
    none = tried(train, held_out, 0.2 * np.eye(CLASSES) + 0.8 / CLASSES)
    assert right.accuracy == wrong.accuracy == none.accuracy
    assert 1 / CLASSES < right.accuracy < 1
    assert right.gain > 3 * right.error > 0
    for other in (wrong, none):  # the labels are only made duller
        assert other.gain < -3 * other.error < 0


def test_the_error_is_that_of_the_mean_over_samples() -> None:
    train, held_out = samples(2, seed=1), samples(10, seed=2)
    found = tried(train, held_out, teacher())
    rng = np.random.default_rng(0)
    again = []
    for _ in range(12):
        drawn = rng.integers(len(held_out.labels), size=len(held_out.labels))
        other = Samples(held_out.features[drawn], held_out.labels[drawn])
        again.append(tried(train, other, teacher()).gain)
    assert found.error == pytest.approx(np.std(again, ddof=1), rel=0.6)


def test_without_samples_nothing_is_said() -> None:
    some, nothing = samples(2, seed=1), Samples(np.zeros((0, 12)), np.zeros(0, np.int64))
    assert try_heads(some, nothing, teacher(), 2.0) is None
    assert try_heads(nothing, some, teacher(), 2.0) is None


def test_classes_are_numbered_anew() -> None:
    chosen = samples(2, seed=1).of(np.array([3, 7, 20]))
    assert chosen.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(chosen.features) == 6
