from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.memory.bank import (
    FILE_NAME,
    align_to_student,
    apply_control,
    load_memory,
    permuted_teacher,
    random_teacher,
    save_memory,
)
from tests.memory.examples import build_from, example_memory, teacher_data


def test_a_saved_memory_loads_unchanged(tmp_path: Path) -> None:
    memory = example_memory()
    digest = save_memory(memory, tmp_path / "run" / FILE_NAME)
    for path in (tmp_path / "run", tmp_path / "run" / FILE_NAME):
        again = load_memory(path)
        assert again.digest() == digest == memory.digest()
        assert again.class_names == memory.class_names
        assert again.provenance == memory.provenance
    assert [p.name for p in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    save_memory(example_memory(), file)
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(bytes(damaged))
        try:
            unharmed = load_memory(file)
        except IntegrityError:
            continue
        # Only the provenance is outside the digest.
        assert unharmed.digest() == example_memory().digest()


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x80\x02}q\x00."])
def test_files_that_are_no_memory(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="not a prototype memory"):
        load_memory(file)


def test_other_safetensors_are_no_memory(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    save_file({"prototypes": torch.zeros(2, 2)}, str(file))
    with pytest.raises(IntegrityError):
        load_memory(file)


def test_no_memory_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cmkd memory"):
        load_memory(tmp_path)


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


def test_no_control_is_the_memory_itself() -> None:
    memory = example_memory()
    assert apply_control(memory, "none", 0) is memory
    assert apply_control(memory, "random", 0).digest() != memory.digest()


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
    torch.testing.assert_close(
        aligned.prototypes[aligned.prototype_class == 1],
        memory.prototypes[memory.prototype_class == 4],
    )
    assert aligned.class_count.tolist() == [0, 18, 30]
    soft = memory.soft_labels[memory.prototype_class == 4][:, [4, 0]]
    torch.testing.assert_close(
        aligned.soft_labels[aligned.prototype_class == 1][:, 1:], soft / soft.sum(1, keepdim=True)
    )
    assert float(aligned.soft_labels[:, 0].abs().max()) == 0.0


def test_no_common_name_is_refused() -> None:
    with pytest.raises(UsageError, match="no class name in common"):
        align_to_student(example_memory(), ["cat", "dog"])


def test_a_class_that_the_teachers_data_lacked_counts_as_unknown() -> None:
    features, labels, weight, bias = teacher_data()
    kept = labels != 2
    memory = build_from(features[kept], labels[kept], weight, bias)
    aligned = align_to_student(memory, memory.class_names)
    assert float(aligned.soft_labels[:, 2].abs().max()) == 0.0
    torch.testing.assert_close(aligned.soft_labels.sum(1), torch.ones(len(aligned.prototypes)))
    assert aligned.head_weight[2].tolist() == [0.0] * 8
    with pytest.raises(UsageError, match="no class name in common"):
        align_to_student(memory, ["class 2"])
