"""What the teacher's pass leaves behind, on disk, so that a pass that was killed goes on.

Each rank writes parts: features of the samples that are kept, sorted by class so that a class
is a slice, and exact sums of those that are not (or their features, where these take less). A
part names the batches it holds; batches are numbered alike whatever the number of ranks, so any
ranks may go on with the parts of others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.spool_part import Part, PassedBatch, part_number, part_tensors
from cmkd_scale.memory.statistics import Moments, refuse_diverged
from cmkd_scale.memory.sync import agree_on_batches, deal_parts

FORMAT_VERSION = 2
PART_BATCHES = 64
_PART_BYTES = 64 * 2**20


class Spool:
    """This rank's parts of one pass, in a directory or (without one) in memory."""

    def __init__(self, dim: int, directory: Path | None = None, identity: str = "") -> None:
        """Begin with no part; ``take_up`` finds those of an earlier try.

        Args:
            dim: width D of the features.
            directory: where parts are written; made when the first one is.
            identity: of teacher, data and settings; parts of another one are removed.
        """
        self._dim = dim
        self._directory = directory
        self._identity = f"{FORMAT_VERSION} {identity}"
        self._parts: list[Part] = []
        self._pending: list[PassedBatch] = []

    def take_up(self, still_missing: Callable[[Tensor], bool] = lambda positions: True) -> Tensor:
        """Find the valid parts of an earlier try; a collective call, before any rank writes.

        Where several ranks see a part, one of them reads it. A part goes if it is damaged, or
        if a sample that it lacks is there by now, and its batches are to be passed again.

        Args:
            still_missing: whether all samples at these positions are still damaged.

        Returns:
            Numbers of the batches that need not be passed again, ascending.

        Raises:
            CmkdError: on all ranks: what ``still_missing`` raised on one.
        """
        self._sweep()
        found = {}
        for path in self._directory.glob("part-*.safetensors") if self._directory else ():
            part = Part(path)
            if part.belongs_to(self._identity):
                found[part_number(part.get("batches"))] = part
        mine, dealt = {}, deal_parts(sorted(found))

        def read() -> None:
            for name in dealt:
                if found[name].is_whole() and still_missing(found[name].get("missing")):
                    mine[name] = found[name]
                else:
                    found[name].drop("is damaged or lacks a sample that is there now")

        distributed.run_together(read)
        batches = {name: part.get("batches") for name, part in mine.items()}
        accepted, finished = agree_on_batches(batches)
        self._parts = [part for name, part in mine.items() if name in accepted]
        for name in mine.keys() - accepted:
            mine[name].drop("repeats batches of others")
        return finished

    def _sweep(self) -> None:
        """Remove what writers that were killed have left half written.

        No rank writes yet: none does before all have been dealt parts to read, and a run
        directory belongs to one run at a time.
        """
        for path in self._directory.glob(".part-*.tmp") if self._directory else ():
            path.unlink(missing_ok=True)

    def add(self, batch: PassedBatch) -> None:
        """Take a batch; a part is written when enough have come together.

        Raises:
            IntegrityError: a feature is not finite or too large.
            UsageError: the part cannot be written.
        """
        refuse_diverged(batch.features)
        self._pending.append(batch)
        size = sum(pending.features.nbytes for pending in self._pending)
        if len(self._pending) >= PART_BATCHES or size >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last part.

        Raises:
            UsageError: it cannot be written.
        """
        if not self._pending:
            return
        tensors = part_tensors(self._pending, self._dim)
        self._pending.clear()
        part = Part(None, tensors)
        if self._directory is not None:
            path = self._directory / f"part-{part_number(tensors['batches']):015x}.safetensors"
            try:
                part = Part.write(path, tensors, self._identity)
            except OSError as error:
                raise UsageError(
                    f"{path} cannot be written: {error}. Free space and run the same command "
                    "again; it goes on with what is there."
                ) from None
        self._parts.append(part)

    def counts(self, classes: int) -> tuple[Tensor, Tensor]:
        """Samples of each class in this rank's parts: those kept [C], and the others [C]."""
        kept, rest = torch.zeros(2, classes, dtype=torch.int64)
        for part in self._parts:
            kept[part.get("classes")] += part.get("starts").diff()
            rest[part.get("rest_classes")] += part.get("rest_count")
            rest += part.get("few_classes").bincount(minlength=classes)
        return kept, rest

    def missing(self) -> int:
        """How many damaged samples this rank's parts lack."""
        return sum(len(part.get("missing")) for part in self._parts)

    def read_kept(self, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's kept samples of the classes ``first`` to ``stop`` - 1.

        Returns:
            Positions [n], labels [n] and features [n, D], in no particular order.
        """
        empty = torch.zeros(0, dtype=torch.int64)
        positions, labels, features = [empty], [empty], [torch.zeros(0, self._dim)]
        for part in self._parts:
            begin, end = _between(part.get("classes"), first, stop)
            if begin < end:
                starts = part.get("starts")[begin : end + 1]
                rows = slice(int(starts[0]), int(starts[-1]))
                labels.append(part.get("classes")[begin:end].repeat_interleave(starts.diff()))
                positions.append(part.rows("positions", rows))
                features.append(part.rows("features", rows))
        return torch.cat(positions), torch.cat(labels), torch.cat(features)

    def read_rest(self, first: int, stop: int) -> Moments:
        """Sums of this rank's other samples of the classes ``first`` to ``stop`` - 1."""
        sums = Moments(stop - first, self._dim)
        for part in self._parts:
            begin, end = _between(part.get("rest_classes"), first, stop)
            if begin < end:
                rows = slice(begin, end)
                stored = (part.rows(f"rest_{name}", rows) for name in ("count", "total", "squares"))
                sums.add_rows(part.get("rest_classes")[rows] - first, *stored)
            begin, end = _between(part.get("few_classes"), first, stop)
            if begin < end:
                rows = slice(begin, end)
                sums.update(part.rows("few_features", rows), part.get("few_classes")[rows] - first)
        return sums

    def remove(self) -> None:
        """Delete the directory: its content is in the memory, and the run has its results."""
        self._parts.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _between(classes: Tensor, first: int, stop: int) -> tuple[int, int]:
    """Where the ascending ``classes`` hold ``first`` to ``stop`` - 1."""
    begin, end = torch.searchsorted(classes, torch.tensor([first, stop])).tolist()
    return begin, end
