from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.memory.checksum import checksum


@given(st.integers(0, 999), st.integers(0, 31))
def test_every_flipped_bit_is_noticed(place: int, bit: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = checksum([torch.ones(3), values])
    changed = values.clone()
    mask = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    changed.view(torch.int32)[place] ^= mask
    assert checksum([torch.ones(3), changed]) != before
    assert 0 <= before < 2**63


def test_places_matter() -> None:
    values = torch.arange(1.0, 6.0)
    assert checksum([values]) != checksum([values.flip(0)])
    assert checksum([values, values + 1]) != checksum([values + 1, values])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool, torch.float64])
def test_every_type_is_read(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    other = values.clone()
    other[1] = 0
    assert checksum([values]) != checksum([other])
    assert checksum([values[:0]]) != checksum([values])


def test_large_tensors_are_summed_in_parts() -> None:
    values = torch.zeros(600_000)
    before = checksum([values])
    values[599_999] = 1.0
    assert checksum([values]) != before
