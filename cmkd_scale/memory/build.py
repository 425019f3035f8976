"""From the teacher's pass to a memory; equal bits for every world size and order.

Classes are taken in blocks that fit into memory. The samples of a class travel to the rank
that owns it, are put into the order of the pass there, and become its rows of the memory;
after each block all ranks have these rows. Nothing is computed over samples of two classes,
so who owns which class changes nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.kmeans import prototype_count
from cmkd_scale.memory.one_class import CLASS_ROWS, SAMPLE_ROWS, Recipe, describe_class, empty_rows
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.memory.sync import exchange_moments, merge_moments

BLOCK_BYTES = 256 * 2**20
"""What the classes of one block take on a rank: the features that it reads from its parts, and
the rows of the memory, which are on every rank. At the peak the features are there about four
times: as read, sorted for sending, on the way, and received."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the pass has left, on all ranks."""

    held: Tensor
    """[W, C] int64 samples of each class whose features are kept in the parts of each rank."""
    rest: Tensor
    """[C] int64 samples of each class of which there are only sums."""

    @property
    def kept(self) -> Tensor:
        """[C] int64 samples of each class whose features are kept."""
        return self.held.sum(0)


def build_memory(
    spool: Spool,
    risk: Moments,
    recipe: Recipe,
    *,
    class_names: Sequence[str],
    provenance: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrototypeMemory:
    """Turn what the pass has left into a memory; a collective call.

    One thread is assumed (``torch.set_num_threads(1)``): sums of several differ in their last
    bits.

    Args:
        spool: this rank's parts of the pass.
        risk: held-out cross-entropy that this rank has seen, width 1.
        recipe: how a class becomes rows of the memory.
        class_names: names of the C classes.
        provenance: stored beside the memory.
        progress: told classes done, and how many there are.

    Raises:
        UsageError: no sample at all.
    """
    classes = len(recipe.head_weight)
    merge_moments(risk)
    kept, rest = spool.counts(classes)
    sizes = Sizes(distributed.gather_rows(kept.unsqueeze(0)), distributed.all_reduce_sum(rest))
    if int(sizes.kept.sum()) == 0:
        raise UsageError("The teacher's data has no labelled sample to build a memory from.")
    blocks: list[dict[str, Tensor]] = []
    for first, stop in class_blocks(sizes.held, recipe):
        blocks.append(_build_block(spool, sizes, first, stop, recipe))
        progress(stop, classes)
    # Field by field: at any time, only one of them is there twice.
    table = {name: torch.cat([block.pop(name) for block in blocks]) for name in list(blocks[0])}
    mean_risk = risk.mean()[:, 0]
    mean_risk[risk.count == 0] = float("nan")
    return PrototypeMemory(
        class_names=tuple(class_names),
        class_risk=mean_risk.float(),
        head_weight=recipe.head_weight,
        head_bias=recipe.head_bias,
        # A class of identical samples has no spread; the unit must not be zero.
        cost_scale=table.pop("spread").median().clamp(min=1e-6),
        temperature=recipe.temperature,
        provenance=provenance,
        **table,
    )


def class_blocks(held: Tensor, recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Consecutive classes that take at most ``BLOCK_BYTES`` on every rank, or a single class.

    Args:
        held: [W, C] kept samples of each class in the parts of each rank.
        recipe: how a class becomes rows.

    Yields:
        The first class of a block, and the one after its last.
    """
    row_bytes = _row_bytes(held.sum(0), recipe)
    bytes_of = (4 * recipe.head_weight.shape[1] * held + row_bytes).T
    first, size = 0, torch.zeros_like(bytes_of[0])
    for label, on_ranks in enumerate(bytes_of):
        if label > first and int((size + on_ranks).max()) > BLOCK_BYTES:
            yield first, label
            first, size = label, torch.zeros_like(size)
        size = size + on_ranks
    yield first, len(bytes_of)


def _row_bytes(kept: Tensor, recipe: Recipe) -> Tensor:
    """[C] bytes of each class's rows of the memory, which are on every rank."""
    tables = empty_rows(recipe)
    widths = {name: rows.element_size() * rows.shape[1:].numel() for name, rows in tables.items()}
    of_class = sum(width for name, width in widths.items() if name in CLASS_ROWS | {"label"})
    of_sample = sum(width for name, width in widths.items() if name in SAMPLE_ROWS)
    of_prototype = sum(widths.values()) - of_class - of_sample
    counts = [prototype_count(samples, recipe.prototypes_per_class) for samples in kept.tolist()]
    prototypes = torch.tensor(counts)
    if recipe.previous is not None:
        before = recipe.previous.prototype_class.bincount(minlength=len(kept))
        prototypes = torch.where(before > 0, before, prototypes)
    return of_class + of_sample * kept + of_prototype * prototypes


def owners(kept: Tensor, ranks: int) -> Tensor:
    """[c] rank that clusters each class: large classes first, to who has the least so far."""
    owner = torch.zeros(len(kept), dtype=torch.int64)
    load = [(0, rank) for rank in range(ranks)]
    for label in torch.argsort(kept, descending=True, stable=True).tolist():
        size, rank = heapq.heappop(load)
        owner[label] = rank
        heapq.heappush(load, (size + int(kept[label]) + 1, rank))
    return owner


def _build_block(
    spool: Spool, sizes: Sizes, first: int, stop: int, recipe: Recipe
) -> dict[str, Tensor]:
    """Rows of the memory for the classes ``first`` to ``stop`` - 1, on every rank."""
    owner = owners(sizes.kept[first:stop], distributed.world_size())
    positions, labels, features = spool.read_kept(first, stop)
    receiver = owner[labels - first]
    labels, positions, features = (
        distributed.exchange_rows(rows, receiver) for rows in (labels, positions, features)
    )
    rest = Moments(stop - first, features.shape[1])
    if bool(sizes.rest[first:stop].any()):
        rest = exchange_moments(spool.read_rest(first, stop), owner)
    # By class, and within one in the order of the pass.
    order = torch.argsort(positions)
    order = order[torch.argsort(labels[order], stable=True)]
    starts = torch.searchsorted(labels[order], torch.arange(first, stop + 1))
    mine = []
    for label in (first + (owner == distributed.rank()).nonzero()[:, 0]).tolist():
        place = label - first
        rows = features[order[starts[place] : starts[place + 1]]]
        sums = tuple(tensor[place : place + 1] for tensor in rest.tensors())
        mine.append(describe_class(label, rows, sums, recipe))
    return _gather(mine, recipe)


def _gather(mine: list[dict[str, Tensor]], recipe: Recipe) -> dict[str, Tensor]:
    """The rows of all ranks, in the order of classes."""
    empty = empty_rows(recipe)
    table = {
        name: distributed.gather_rows(torch.cat([part[name] for part in mine] or [empty[name]]))
        for name in empty
    }
    by_class = torch.argsort(table.pop("label"))
    by_prototype = torch.argsort(table["prototype_class"], stable=True)
    return {
        name: rows
        if name in SAMPLE_ROWS
        else rows[by_class if name in CLASS_ROWS else by_prototype]
        for name, rows in table.items()
    }
