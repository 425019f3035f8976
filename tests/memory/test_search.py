from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.prototypes import PrototypeIndex


def example(seed: int = 0, prototypes: int = 600, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes in groups of 10, potentials, and samples near the groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(prototypes // 10, dim, generator=generator)
    noise = torch.randn(prototypes, dim, generator=generator)
    values = 0.2 * torch.randn(prototypes, generator=generator)
    samples = groups[:50] + 0.5 * torch.randn(min(50, len(groups)), dim, generator=generator)
    return groups.repeat_interleave(10, 0) + 0.3 * noise, values, samples


def dense(samples: Tensor, prototypes: Tensor, values: Tensor, scale: float) -> Tensor:
    """[B, J] scores in float64."""
    distances = torch.cdist(samples.double(), prototypes.double())
    return values.double() - distances.square() / scale**2


def recall(ids: Tensor, reference: Tensor) -> float:
    return float((ids.unsqueeze(2) == reference.unsqueeze(1)).any(2).double().mean())


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("lists", [0, 20], ids=["flat", "all lists"])
def test_search_finds_what_dense_scores_say(lists: int, offset: float) -> None:
    prototypes, values, samples = example()
    prototypes, samples = prototypes + offset, samples + offset
    index = PrototypeIndex(prototypes, scale=1.7, nlist=lists, nprobe=20)
    for potentials in (values, 10.0 * values.flip(0), torch.zeros_like(values)):
        index.refresh(potentials)
        scores, ids = index.search(samples, 30)
        expected, best = dense(samples, prototypes, potentials, 1.7).topk(30)
        assert recall(ids, best) == 1.0
        torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), k=st.integers(1, 40))
def test_exact_search_of_any_size(seed: int, count: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(count, 3, generator=generator)
    values = torch.randn(count, generator=generator)
    samples = torch.randn(4, 3, generator=generator)
    index = PrototypeIndex(prototypes)
    index.refresh(values)
    scores, ids = index.search(samples, k)
    found = min(k, count)
    reference = dense(samples, prototypes, values, 1.0)
    torch.testing.assert_close(
        scores[:, :found].double(), reference.topk(found)[0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        reference.gather(1, ids[:, :found]), reference.topk(found)[0], atol=1e-5, rtol=1e-5
    )
    assert bool((ids[:, found:] == -1).all())
    assert bool(torch.isneginf(scores[:, found:]).all())


def test_nearest_is_plain_distance_whatever_the_potentials_and_the_scale() -> None:
    prototypes, values, samples = example()
    reference = NearestNeighbors(n_neighbors=5, algorithm="brute")
    reference.fit(prototypes.double().numpy())
    expected, best = reference.kneighbors(samples.double().numpy())
    for lists in (0, 20):
        index = PrototypeIndex(prototypes, scale=3.0, nlist=lists, nprobe=20)
        index.refresh(100.0 * values)
        distances, ids = index.nearest(samples, 5)
        torch.testing.assert_close(ids, torch.from_numpy(best))
        torch.testing.assert_close(
            distances.double(), torch.from_numpy(expected), atol=1e-4, rtol=0
        )


def test_few_lists_find_most_and_more_lists_find_more() -> None:
    prototypes, values, samples = example(prototypes=4000)
    best = dense(samples, prototypes, values, 1.0).topk(10)[1]
    found = []
    for probes in (1, 8, 32):
        index = PrototypeIndex(prototypes, nlist=100, nprobe=probes)
        index.refresh(values)
        found.append(recall(index.search(samples, 10)[1], best))
    assert found[0] < found[1] < found[2]
    assert found[1] > 0.75
    assert found[2] > 0.97


def test_a_list_is_read_for_its_best_potential() -> None:
    prototypes, values, samples = example()
    index = PrototypeIndex(prototypes, nlist=20, nprobe=1)
    values[123] = 1e3
    index.refresh(values)
    assert index.search(samples, 1)[1].flatten().tolist() == [123] * len(samples)


def test_places_that_stay_empty_are_minus_one() -> None:
    prototypes, _, samples = example()
    scores, ids = PrototypeIndex(prototypes, nlist=60, nprobe=1).search(samples, 100)
    empty = ids < 0
    assert bool(empty.any())
    assert not bool(empty[:, 0].any())
    assert bool((ids[empty] == -1).all())
    assert bool(torch.isneginf(scores[empty]).all())
    assert bool(torch.isfinite(scores[~empty]).all())
    nothing = PrototypeIndex(torch.zeros(0, 16))
    distances, ids = nothing.nearest(samples, 2)
    assert ids.tolist() == [[-1, -1]] * len(samples)
    assert bool(torch.isposinf(distances).all())


def test_many_prototypes_get_lists_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    prototypes, _, samples = example()
    monkeypatch.setattr("cmkd_scale.memory.prototypes._EXACT_UP_TO", 500)
    # 48 lists, of which one holds fewer than all.
    assert bool((PrototypeIndex(prototypes, nprobe=1).search(samples, 600)[1] < 0).any())
    monkeypatch.setattr("cmkd_scale.memory.prototypes._EXACT_UP_TO", 600)
    assert not bool((PrototypeIndex(prototypes, nprobe=1).search(samples, 600)[1] < 0).any())


def test_samples_in_half_precision_with_gradient_are_read_as_they_are() -> None:
    prototypes, values, samples = example()
    index = PrototypeIndex(prototypes.requires_grad_())
    index.refresh(values)
    half = samples.bfloat16().requires_grad_()
    scores, ids = index.search(half, 3)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    best = dense(half.detach(), prototypes.detach(), values, 1.0).topk(3)[1]
    assert recall(ids, best) == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lists", [0, 20])
def test_results_are_where_the_samples_are(lists: int) -> None:
    prototypes, values, samples = example()
    index = PrototypeIndex(prototypes.cuda(), nlist=lists, nprobe=20)
    index.refresh(values.cuda())
    scores, ids = index.search(samples.cuda(), 30)
    assert scores.is_cuda
    assert ids.is_cuda
    assert recall(ids.cpu(), dense(samples, prototypes, values, 1.0).topk(30)[1]) == 1.0


def test_a_missing_faiss_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *rest: Any, **named: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(UsageError, match=r"cmkd_scale\[cpu\]"):
        PrototypeIndex(torch.zeros(2, 3))
