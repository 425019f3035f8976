"""What is written here is read by the library of the format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cmkd_scale.training.tensor_file import write_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@given(
    entries=st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=3),
            st.integers(0, 2**32 - 1),
        ),
        max_size=6,
    )
)
def test_any_tensors_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    entries: dict[str, tuple[torch.dtype, list[int], int]],
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "some.safetensors"
    tensors = {}
    for name, (dtype, shape, seed) in entries.items():
        generator = torch.Generator().manual_seed(seed)
        tensors[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    digest = write_tensors(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(100, 7, dtype=torch.float64),
        "bits": torch.rand(13) > 0.5,
        "half": torch.randn(5).bfloat16(),
    }
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_more_than_a_chunk_is_written(tmp_path: Path) -> None:
    tensors = {"large": torch.arange(5_000_000, dtype=torch.float32)}
    digest = write_tensors(tmp_path / "large", tensors)
    assert digest == hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
    assert torch.equal(load_file(tmp_path / "large")["large"], tensors["large"])
