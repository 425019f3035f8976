"""Features of other programs: their numbers, averaged over parts, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cmkd_scale.data.modalities import MODALITIES, DecodeError, FeaturesModality
from cmkd_scale.errors import UsageError


def npy(array: object) -> dict[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.asanyarray(array))
    return {"npy": buffer.getvalue(), "cls": b"1"}


def moments(count: int, dim: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)


def test_the_table_holds_features() -> None:
    assert MODALITIES["features"] is FeaturesModality
    assert FeaturesModality(dim=7, frames=2).shape == (2, 7)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "<i2", "|u1", "|b1"])
def test_a_vector_comes_out_as_it_went_in(dtype: str) -> None:
    vector = np.array([0, 1, 3, 1], dtype=dtype)
    decoded = FeaturesModality(dim=4).decode(npy(vector))
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [vector.astype(float).tolist()]


def test_order_in_memory_does_not_matter() -> None:
    stored = moments(5)
    modality = FeaturesModality(dim=3, frames=5)
    for array in (stored, np.asfortranarray(stored)):
        np.testing.assert_array_equal(modality.decode(npy(array)).numpy(), stored)


@given(count=st.integers(1, 40), frames=st.integers(1, 12))
def test_moments_are_averaged_over_equal_parts(count: int, frames: int) -> None:
    stored = moments(count)
    decoded = FeaturesModality(dim=3, frames=frames).decode(npy(stored))
    # Where parts do not fit, neighbours share the moments at their border.
    parts = [
        stored[part * count // frames : -(-(part + 1) * count // frames)] for part in range(frames)
    ]
    expected = np.stack([part.astype(np.float64).mean(axis=0) for part in parts])
    np.testing.assert_allclose(decoded.numpy(), expected, atol=1e-6)
    assert decoded.is_contiguous()


def test_decoded_features_may_be_changed() -> None:
    decoded = FeaturesModality(dim=3).decode(npy(moments(1)[0]))
    decoded += 1  # memory of the file itself would be read-only


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"shape \[4\]; vectors of data\.transform\.dim=3"),
        (np.zeros((3, 4)), r"shape \[3, 4\]"),
        (np.zeros((2, 2, 3)), r"shape \[2, 2, 3\]"),
        (np.float32(3), r"shape \[\]"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        (np.array([0, np.nan, 0]), "not finite"),
        (np.array([0, np.inf, 0]), "not finite"),
        (np.array([0, 1e300, 0]), "not finite"),
        (np.array(["a", "b", "c"]), "something else than plain numbers"),
        (np.array([{}, 1, 2], dtype=object), "something else than plain numbers"),
    ],
)
def test_what_are_no_features_is_refused(array: object, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        FeaturesModality(dim=3).decode(npy(array))


def test_averages_that_overflow_are_refused() -> None:
    with pytest.raises(DecodeError, match="not finite"):
        FeaturesModality(dim=1).decode(npy(np.full((2, 1), 3e38)))


def test_large_arrays_are_refused_by_their_header() -> None:
    content = npy(np.zeros(3, np.float32))["npy"]
    claimed = content.replace(b"(3,), }" + b" " * 12, b"(99999999999, 3), }")
    assert claimed != content
    with pytest.raises(DecodeError, match="more than the"):
        FeaturesModality(dim=3).decode({"npy": claimed})


@pytest.mark.parametrize("options", [{"drop": 1}, {"drop": 1.5}, {"dim": 0}, {"frames": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        FeaturesModality(**options)


def test_features_without_augmentation_are_unchanged() -> None:
    modality = FeaturesModality(dim=3, drop=0)
    decoded = modality.decode(npy(moments(1)[0]))
    assert torch.equal(modality.augment(decoded, np.random.default_rng(0)), decoded)


def test_dropped_numbers_are_0_and_the_others_keep_the_mean() -> None:
    modality = FeaturesModality(dim=100_000, drop=0.25)
    dropped = modality.augment(torch.ones(1, 100_000), np.random.default_rng(0))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)


def test_noise_is_in_units_of_the_vectors_own_deviation() -> None:
    modality = FeaturesModality(dim=100_000, drop=0, noise=0.5)
    inputs = torch.linspace(-30, 50, 100_000)[None]
    noise = modality.augment(inputs, np.random.default_rng(0)) - inputs
    assert float(noise.std()) == pytest.approx(0.5 * float(inputs.std()), rel=0.02)


def test_numbers_in_json_are_features_too() -> None:
    modality = FeaturesModality(dim=3, json=1)
    assert modality.decode({"json": b"[1, 2.5, -3]"}).tolist() == [[1.0, 2.5, -3.0]]
    assert modality.decode({"json": b"[[1, 1, 1], [3, 3, 3]]"}).tolist() == [[2.0, 2.0, 2.0]]
    for wrong in (
        b"{}",
        b'["1", "2", "3"]',
        b"[1, 2]",
        b"[1, [2], 3]",
        b"[" * 5000,
        b"[NaN, 1, 1]",
    ):
        with pytest.raises(DecodeError):
            modality.decode({"json": wrong})
