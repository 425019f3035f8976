from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.memory.bank import (
    FILE_NAME,
    load_memory,
    memory_bytes,
    save_memory,
    thin_classes,
)
from cmkd_scale.operations.inspect import memory_info
from tests.memory.examples import (
    batches_of,
    build_from,
    build_with,
    example_memory,
    spool_of,
    teacher_data,
)


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


def test_the_bytes_of_a_memory_are_those_of_its_file(tmp_path: Path) -> None:
    memory = example_memory()
    (tmp_path / "copy").write_bytes(memory_bytes(memory))
    assert load_memory(tmp_path / "copy").digest() == memory.digest()


def test_a_memory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        save_memory(example_memory(), tmp_path / "run" / FILE_NAME)


def test_a_memory_of_an_older_format_is_to_be_built_again(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    save_file({"prototypes": torch.zeros(2, 2)}, str(file), metadata={"format_version": "1"})
    with pytest.raises(IntegrityError, match=r"format 1.*`cmkd memory`"):
        load_memory(file)


def test_classes_of_few_samples_are_named() -> None:
    features, labels, weight, bias = teacher_data()
    few = torch.cat(
        [(labels == label).nonzero()[:count, 0] for label, count in enumerate(range(6))]
    )
    memory = build_from(features[few], labels[few], weight, bias)
    asked = replace(memory, provenance={"prototypes_per_class": 2})
    assert thin_classes(asked) == {
        "without_samples": {"count": 1, "first": ["class 0"]},
        "with_one_sample": {"count": 1, "first": ["class 1"]},
        "with_fewer_prototypes": {"count": 3, "first": ["class 1", "class 2", "class 3"]},
    }
    assert thin_classes(memory)["with_fewer_prototypes"]["count"] == 0


def test_a_class_of_equal_samples_has_fewer_prototypes_than_were_asked_for() -> None:
    features, labels, weight, bias = teacher_data()
    features[labels == 3] = 1.0
    spool = spool_of(batches_of(features, labels))
    for wanted in (None, 5):
        memory = build_with(spool, weight, bias, prototypes_per_class=wanted)
        memory = replace(memory, provenance={"prototypes_per_class": wanted})
        assert memory.prototype_class.bincount()[3] == 1
        fewer = thin_classes(memory)["with_fewer_prototypes"]
        assert fewer == {"count": 1, "first": ["class 3"]}


def test_memory_info_knows_no_risk_where_nothing_was_held_out(tmp_path: Path) -> None:
    memory = example_memory()
    for held_out, mean in ((6, 0.5), (2, 0.5), (0, None)):
        risk = memory.class_risk.clone()
        risk[held_out:] = torch.nan
        save_memory(replace(memory, class_risk=risk), tmp_path / FILE_NAME)
        info = memory_info(tmp_path)
        assert info["classes_with_held_out_risk"] == held_out
        assert info["mean_held_out_risk"] == mean
