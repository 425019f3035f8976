from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmkd_scale.errors import UsageError
from cmkd_scale.memory import one_class
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.controls import apply_control, random_teacher
from cmkd_scale.memory.moving import MovingMemory
from cmkd_scale.memory.soft_labels import SoftLabels, compress
from tests.memory.examples import (
    batches_of,
    build_from,
    build_with,
    example_memory,
    spool_of,
    teacher_data,
)


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


def test_a_class_whose_kept_samples_are_all_damaged_counts_as_unknown() -> None:
    features, labels, weight, bias = teacher_data()
    batches = [
        replace(batch, kept=batch.kept & (batch.labels != 2))
        for batch in batches_of(features, labels)
    ]
    memory = build_with(spool_of(batches), weight, bias)
    assert int(memory.class_count[2]) == 24
    aligned = align_to_student(memory, memory.class_names)
    assert aligned.class_count[2] == aligned.class_kept[2] == 0
    assert aligned.head_weight[2].tolist() == [0.0] * 8
    assert float(aligned.soft_label_values[:, 2].abs().max()) == 0.0
    torch.testing.assert_close(dense(aligned).sum(1), torch.ones(len(aligned.prototypes)))
    with pytest.raises(UsageError, match="no class name in common"):
        align_to_student(memory, ["class 2"])


def test_where_a_sure_teacher_says_nothing_of_the_students_classes_its_own_is_certain() -> None:
    memory = example_memory()
    values = torch.zeros_like(memory.soft_label_values)
    values[:, 5], values[:, 0], values[:, 1] = 1.0, 1e-9, 3e-9
    sure = replace(memory, soft_label_values=values)
    found = dense(align_to_student(sure, ["class 1", "class 0"]))
    one, zero = (memory.prototype_class == label for label in (1, 0))
    expected = torch.eye(2)[[0] * int(one.sum()) + [1] * int(zero.sum())]
    assert torch.equal(found, expected)
    values[:, 0] = 1e-5
    found = dense(
        align_to_student(replace(memory, soft_label_values=values), ["class 1", "class 0"])
    )
    torch.testing.assert_close(found[0], torch.tensor([3e-9, 1e-5]) / (1e-5 + 3e-9))


def check_sums(memory: PrototypeMemory, known: torch.Tensor) -> None:
    soft = SoftLabels(memory.soft_label_values, memory.soft_label_classes, memory.soft_label_rest)
    table = soft.dense(known)
    torch.testing.assert_close(table.sum(1), torch.ones(len(table)), atol=2e-6, rtol=0)
    assert (table >= 0).all()
    assert (table[:, ~known] == 0).all()


def check_everywhere(memory: PrototypeMemory, names: list[str], seed: int) -> None:
    """Soft labels sum to 1 in a memory, its controls, each aligned, and then moved."""
    check_sums(memory, torch.ones(len(memory.class_names), dtype=torch.bool))
    check_sums(random_teacher(memory, seed), memory.class_kept > 0)
    for control in ("none", "permuted", "random"):
        aligned = align_to_student(apply_control(memory, control, seed, names), names)
        known = aligned.class_kept > 0
        assert known.tolist() == [
            name in memory.class_names
            and int(memory.class_kept[memory.class_names.index(name)]) > 0
            for name in names
        ]
        check_sums(aligned, known)
        moving = MovingMemory(aligned, every=1)
        moving.observe(aligned.prototypes + 0.1, aligned.prototype_class)
        check_sums(moving.follow(aligned.head_weight, aligned.head_bias), known)


@settings(max_examples=25)
@given(
    sharpness=st.sampled_from([0.1, 1.0, 60.0]),
    lacking=st.sets(st.integers(0, 5), max_size=3),
    chosen=st.permutations([f"class {label}" for label in range(6)]),
    listed=st.sampled_from([2, 3, 6]),
    seed=st.integers(0, 99),
)
def test_soft_labels_sum_to_one_whatever_happens_to_a_memory(
    sharpness: float, lacking: set[int], chosen: list[str], listed: int, seed: int
) -> None:
    features, labels, weight, bias = teacher_data(seed=seed)
    there = ~torch.isin(labels, torch.tensor(sorted(lacking), dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_class, "MOST_LISTED", listed)
        memory = build_from(features[there], labels[there], sharpness * weight, bias)
    # Three classes may be lacking: of five, two are there.
    check_everywhere(memory, [*chosen[:5], "new"], seed)


def test_more_classes_than_are_listed_go_through_everything() -> None:
    labels = torch.arange(300).repeat(4)
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(300, 8, generator=generator)
    features = centres[labels] + torch.randn(1200, 8, generator=generator)
    names = [f"class {label}" for label in range(300) if label % 7] + ["new", "newer"]
    for there in (labels < 300, labels < 280, labels < 150):
        memory = build_from(features[there], labels[there], centres, torch.zeros(300))
        assert memory.soft_label_values.shape == (int(there.sum()) // 2, 256)
        check_everywhere(memory, names, seed=1)
    # What is listed is the head's word, in float64.
    says = torch.softmax(features[labels == 8].double() @ centres.double().T / 4.0, 1).mean(0)
    own = memory.prototype_class == 8
    soft = SoftLabels(memory.soft_label_values, memory.soft_label_classes, memory.soft_label_rest)
    table = soft.dense(torch.ones(300, dtype=torch.bool))[own]
    found = (memory.prototype_mass[own].unsqueeze(1) * table).sum(0)
    likeliest = says.topk(100).indices
    torch.testing.assert_close(found[likeliest], says[likeliest].float(), atol=1e-6, rtol=1e-4)
