from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import SoftLabels, compress
from tests.memory.examples import build_from, example_memory, teacher_data


def dense(memory: PrototypeMemory) -> torch.Tensor:
    soft = SoftLabels(memory.soft_label_values, memory.soft_label_classes, memory.soft_label_rest)
    return soft.dense(memory.class_count > 0)


def test_a_student_with_the_same_classes_sees_the_same_memory() -> None:
    memory = example_memory()
    assert align_to_student(memory, memory.class_names).digest() == memory.digest()


def test_alignment_is_by_name_not_by_index() -> None:
    memory = example_memory()
    names = ["new", "class 4", "class 0"]
    aligned = align_to_student(memory, names)
    assert aligned.class_names == tuple(names)
    assert sorted(set(aligned.prototype_class.tolist())) == [1, 2]
    torch.testing.assert_close(aligned.head_weight[1], memory.head_weight[4])
    torch.testing.assert_close(aligned.class_mean[2], memory.class_mean[0])
    torch.testing.assert_close(aligned.class_factor[1], memory.class_factor[4])
    torch.testing.assert_close(
        aligned.prototypes[aligned.prototype_class == 1],
        memory.prototypes[memory.prototype_class == 4],
    )
    assert aligned.class_count.tolist() == [0, 18, 30]
    assert aligned.class_kept.tolist() == [0, 18, 30]
    assert aligned.class_risk.isnan().tolist() == [True, False, False]
    assert aligned.class_factor[0].abs().max() == 0
    soft = dense(memory)[memory.prototype_class == 4][:, [4, 0]]
    found = dense(aligned)
    torch.testing.assert_close(
        found[aligned.prototype_class == 1][:, 1:], soft / soft.sum(1, keepdim=True)
    )
    assert float(found[:, 0].abs().max()) == 0.0


def test_cut_soft_labels_keep_what_is_listed() -> None:
    memory = example_memory()
    soft = compress(memory.soft_label_values, 2)
    cut = replace(
        memory,
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
    )
    # The same classes in another order: nothing is lost, only moved.
    names = memory.class_names[::-1]
    found = dense(align_to_student(cut, names))
    expected = dense(cut).flip(1)[torch.argsort(5 - cut.prototype_class, stable=True)]
    torch.testing.assert_close(found, expected)
    # A class less: what is left sums to 1, in proportion.
    fewer = dense(align_to_student(cut, memory.class_names[1:]))
    kept = dense(cut)[cut.prototype_class > 0][:, 1:]
    torch.testing.assert_close(fewer.sum(1), torch.ones(len(fewer)))
    torch.testing.assert_close(
        fewer.max(1).values, (kept / kept.sum(1, keepdim=True)).max(1).values
    )


def test_no_common_name_is_refused() -> None:
    with pytest.raises(UsageError, match="no class name in common"):
        align_to_student(example_memory(), ["cat", "dog"])


def test_a_class_that_the_teachers_data_lacked_counts_as_unknown() -> None:
    features, labels, weight, bias = teacher_data()
    kept = labels != 2
    memory = build_from(features[kept], labels[kept], weight, bias)
    aligned = align_to_student(memory, memory.class_names)
    assert float(dense(aligned)[:, 2].abs().max()) == 0.0
    torch.testing.assert_close(dense(aligned).sum(1), torch.ones(len(aligned.prototypes)))
    assert aligned.head_weight[2].tolist() == [0.0] * 8
    with pytest.raises(UsageError, match="no class name in common"):
        align_to_student(memory, ["class 2"])
