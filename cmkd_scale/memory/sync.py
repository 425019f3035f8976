"""Merging what the ranks found: the only collectives of the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.memory.statistics import Moments


def merge_moments(moments: Moments) -> None:
    """Replace each rank's moments by those of all samples; exact, so order-free."""
    for sums in moments.tensors():
        distributed.all_reduce_sum(sums)


def gather_sorted(index: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Gather rows of all ranks, sorted by ``index`` [n] int64: the same on every rank."""
    everywhere = distributed.gather_rows(index)
    order = torch.argsort(everywhere, stable=True)
    return everywhere[order], *(distributed.gather_rows(part)[order] for part in rows)


def exchange_moments(moments: Moments, owner: Tensor) -> Moments:
    """Sums of all ranks for the classes that this rank owns; zero for the others.

    Args:
        moments: of this rank's samples of c classes.
        owner: [c] rank that owns each class.
    """
    labels = moments.count.nonzero()[:, 0]
    merged = Moments(*moments.total.shape)
    rows = (labels, *(sums[labels] for sums in moments.tensors()))
    merged.add_rows(*(distributed.exchange_rows(part, owner[labels]) for part in rows))
    return merged


def deal_parts(names: list[int]) -> list[int]:
    """Of the parts that this rank sees, those that it is to read.

    Each part is read by one of the ranks that see it: on a shared file system all do, on
    separate ones those of one machine. The name decides which, so they share the work.
    """
    mine = torch.tensor([[name, distributed.rank()] for name in names], dtype=torch.int64)
    seen: dict[int, list[int]] = {}
    for name, rank in distributed.gather_rows(mine.reshape(-1, 2)).tolist():
        seen.setdefault(name, []).append(rank)
    return [name for name in names if seen[name][name % len(seen[name])] == distributed.rank()]


def agree_on_batches(parts: dict[int, Tensor]) -> tuple[set[int], Tensor]:
    """Choose among the parts of all ranks so that no batch occurs twice.

    Two parts may share batches when machines with file systems of their own came and went.

    Args:
        parts: numbers of the batches in each part that this rank reads, by the part's name.

    Returns:
        Names of the parts chosen, and the batches in them, ascending.
    """
    rows = [
        torch.stack([torch.full_like(numbers, name), numbers], 1) for name, numbers in parts.items()
    ]
    everywhere = distributed.gather_rows(
        torch.cat([torch.zeros(0, 2, dtype=torch.int64), *rows])
    ).tolist()
    batches: dict[int, set[int]] = {}
    for name, number in everywhere:
        batches.setdefault(name, set()).add(number)
    chosen, finished = set(), set[int]()
    for name in sorted(batches):
        if finished.isdisjoint(batches[name]):
            chosen.add(name)
            finished |= batches[name]
    return chosen, torch.tensor(sorted(finished), dtype=torch.int64)
