from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.controls import (
    apply_control,
    orthogonal_teacher,
    permuted_teacher,
    random_teacher,
)
from cmkd_scale.memory.soft_labels import SoftLabels, compress
from tests.memory.examples import build_from, example_memory, teacher_data


def test_the_permuted_teacher_gives_every_class_another_name() -> None:
    memory = example_memory()
    permuted = permuted_teacher(memory, seed=1)
    assert sorted(permuted.class_names) == sorted(memory.class_names)
    pairs = zip(memory.class_names, permuted.class_names, strict=True)
    assert all(one != other for one, other in pairs)
    assert permuted.digest() != memory.digest()
    assert permuted_teacher(memory, seed=1).digest() == permuted.digest()


def of_two_classes() -> PrototypeMemory:
    """Classes 1 and 4 of six: far from the origin, where the other four have their zeros."""
    features, labels, weight, bias = teacher_data()
    some = (labels == 1) | (labels == 4)
    return build_from(features[some] + 20.0, labels[some], weight, bias)


def test_classes_without_prototypes_take_no_part_in_the_permutation() -> None:
    memory = of_two_classes()
    for seed in range(6):
        permuted = permuted_teacher(memory, seed)
        exchanged = [f"class {label}" for label in (0, 4, 2, 3, 1, 5)]
        assert permuted.class_names == tuple(exchanged)
        aligned = align_to_student(permuted, ["class 1", "class 4"])
        torch.testing.assert_close(aligned.class_mean, memory.class_mean[[4, 1]])


def test_only_classes_of_the_student_are_permuted_among_each_other() -> None:
    memory = example_memory()
    names = ["class 5", "class 0", "another", "class 2"]
    for seed in range(6):
        permuted = apply_control(memory, "permuted", seed, names)
        for place, (name, other) in enumerate(
            zip(memory.class_names, permuted.class_names, strict=True)
        ):
            assert (name != other) == (place in (0, 2, 5))
        aligned = align_to_student(permuted, names)
        assert (aligned.class_kept > 0).tolist() == [True, True, False, True]


@pytest.mark.parametrize("names", [["class 1", "dog"], ["class 0", "class 2"]])
def test_fewer_than_two_classes_cannot_be_permuted(names: list[str]) -> None:
    with pytest.raises(UsageError, match=r"method\.control=random"):
        apply_control(of_two_classes(), "permuted", 0, names)


def test_the_random_teacher_keeps_nothing_that_tells_classes_apart() -> None:
    memory = example_memory(classes=9)
    risk = torch.arange(9.0)
    risk[3] = torch.nan
    memory = replace(memory, class_risk=risk, head_bias=torch.arange(9.0))
    random = random_teacher(memory, seed=1)
    for rows in (random.class_variance, random.head_bias, random.class_factor):
        assert torch.equal(rows, rows[:1].expand(rows.shape))
    torch.testing.assert_close(random.class_variance[0], memory.class_variance.mean(0))
    torch.testing.assert_close(random.class_risk[[0, 8]], torch.tensor([33 / 8, 33 / 8]))
    assert random.class_risk.isnan().nonzero().tolist() == [[3]]
    counts = memory.prototype_class.bincount()
    torch.testing.assert_close(random.prototype_mass, 1.0 / counts[memory.prototype_class])
    radius = (memory.radius * memory.prototype_mass).sum() / 9
    torch.testing.assert_close(random.radius, radius.expand(len(counts[memory.prototype_class])))
    for kept in ("prototype_class", "class_count", "class_kept", "cost_scale"):
        assert torch.equal(getattr(random, kept), getattr(memory, kept))


def test_the_random_teachers_scales_are_those_of_the_classes_with_samples() -> None:
    memory = of_two_classes()
    known, own = torch.tensor([1, 4]), memory.prototype_class
    means, sizes, lost = [], [], [0, 2, 3, 5]
    for seed in range(300):
        random = random_teacher(memory, seed)
        means.append(random.class_mean[known])
        sizes.append((random.prototypes - random.class_mean[own]).square().sum())
        assert float(random.class_mean[lost].abs().max()) == 0.0
        assert float(random.class_variance[lost].abs().max()) == 0.0
        assert float(random.head_weight[lost].abs().max()) == 0.0
        torch.testing.assert_close(random.head_weight.norm(), memory.head_weight[known].norm())
    drawn, real = torch.stack(means), memory.class_mean[known].double().numpy()
    spread = real.std(0)
    np.testing.assert_allclose(drawn.mean((0, 1)), real.mean(0), atol=5 * spread.max() / 600**0.5)
    np.testing.assert_allclose(drawn.flatten(0, 1).std(0), spread, rtol=0.2)
    size = (memory.prototypes - memory.class_mean[own]).square().sum()
    assert float(torch.stack(sizes).mean()) == pytest.approx(float(size), rel=0.1)
    weighted = torch.zeros(6, 8).index_add_(
        0, own, random.prototype_mass.unsqueeze(1) * random.prototypes
    )
    torch.testing.assert_close(weighted, random.class_mean, atol=1e-5, rtol=1e-5)


def test_the_random_teacher_loses_knowledge() -> None:
    memory = example_memory(classes=9)
    random = random_teacher(memory, seed=1)
    torch.testing.assert_close(random.head_weight.norm(), memory.head_weight.norm())
    guesses = (random.prototypes @ random.head_weight.T + random.head_bias).argmax(1)
    own_guesses = (memory.prototypes @ memory.head_weight.T + memory.head_bias).argmax(1)
    right = (guesses == memory.prototype_class).float().mean()
    assert (own_guesses == memory.prototype_class).float().mean() > right + 0.3


def test_the_random_teachers_soft_labels_are_its_heads_and_as_long_as_the_memorys() -> None:
    memory = example_memory()
    everything = torch.ones(6, dtype=torch.bool)
    for keep in (6, 2):
        soft = compress(memory.soft_label_values, keep)
        cut = replace(
            memory,
            soft_label_values=soft.values,
            soft_label_classes=soft.classes,
            soft_label_rest=soft.rest,
        )
        random = random_teacher(cut, seed=3)
        found = SoftLabels(
            random.soft_label_values, random.soft_label_classes, random.soft_label_rest
        )
        says = torch.softmax(
            (random.prototypes @ random.head_weight.T + random.head_bias) / random.temperature, 1
        )
        assert found.values.shape == soft.values.shape
        torch.testing.assert_close(found.dense(everything), compress(says, keep).dense(everything))


def test_to_the_orthogonal_teacher_all_classes_are_equally_unlike() -> None:
    memory = example_memory()
    made = orthogonal_teacher(memory, seed=3)
    means = made.class_mean.double() - memory.class_mean.double().mean(0)
    products = means @ means.T
    radius = (memory.class_mean - memory.class_mean.mean(0)).norm(dim=1).mean().double()
    expected = torch.eye(len(means), dtype=torch.float64) * radius**2
    torch.testing.assert_close(products, expected, atol=1e-4, rtol=1e-4)
    # It is sure of its classes: its head says each prototype's own.
    logits = made.prototypes @ made.head_weight.T + made.head_bias
    assert torch.equal(logits.argmax(1), made.prototype_class)
    norms = torch.stack([made.head_weight.norm(), memory.head_weight.norm()])
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)
    torch.testing.assert_close(made.class_count, memory.class_count)
    assert orthogonal_teacher(memory, seed=3).digest() == made.digest()
    assert apply_control(memory, "orthogonal", 3).digest() == made.digest()


def test_more_classes_than_dimensions_are_as_unlike_as_may_be() -> None:
    features, labels, weight, bias = teacher_data()
    narrow = build_from(features[:, :3], labels, weight[:, :3], bias)
    made = orthogonal_teacher(narrow, seed=0)
    lengths = (made.class_mean - narrow.class_mean.mean(0)).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(len(lengths)))
    assert torch.isfinite(made.prototypes).all()


def test_no_control_is_the_memory_itself() -> None:
    memory = example_memory()
    assert apply_control(memory, "none", 0) is memory
    assert apply_control(memory, "random", 0).digest() != memory.digest()
    assert apply_control(memory, "permuted", 0).class_names != memory.class_names
