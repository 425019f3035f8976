from __future__ import annotations

from dataclasses import replace

import torch

from cmkd_scale.memory.controls import apply_control, permuted_teacher, random_teacher
from cmkd_scale.memory.soft_labels import SoftLabels, compress
from tests.memory.examples import example_memory


def test_the_permuted_teacher_gives_every_class_another_name() -> None:
    memory = example_memory()
    permuted = permuted_teacher(memory, seed=1)
    assert sorted(permuted.class_names) == sorted(memory.class_names)
    pairs = zip(memory.class_names, permuted.class_names, strict=True)
    assert all(one != other for one, other in pairs)
    assert permuted.digest() != memory.digest()
    assert permuted_teacher(memory, seed=1).digest() == permuted.digest()


def test_the_random_teacher_keeps_scales_and_loses_knowledge() -> None:
    memory = example_memory(classes=9)
    random = random_teacher(memory, seed=1)
    torch.testing.assert_close(random.head_weight.norm(), memory.head_weight.norm())
    for label in range(9):
        own = memory.prototype_class == label
        torch.testing.assert_close(
            random.prototypes[own] - random.class_mean[label],
            memory.prototypes[own] - memory.class_mean[label],
            atol=1e-5,
            rtol=1e-4,
        )
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


def test_no_control_is_the_memory_itself() -> None:
    memory = example_memory()
    assert apply_control(memory, "none", 0) is memory
    assert apply_control(memory, "random", 0).digest() != memory.digest()
    assert apply_control(memory, "permuted", 0).class_names != memory.class_names
