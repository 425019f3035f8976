"""Which rank is slow: the one that all others wait for at each step."""

from __future__ import annotations

import logging
import statistics

import torch

from cmkd_scale import distributed

_log = logging.getLogger(__name__)

_SLOW = 1.5  # times the median of the others
_IN_A_ROW = 3  # shares after which it is said


class RankTimes:
    """Time that each rank spends on its own part of a step, not waiting for others."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seconds = 0.0
        self._steps = 0
        self._slow: dict[int, int] = {}  # rank -> shares in a row in which it was slow

    def add(self, own_seconds: float) -> None:
        """Of a step: waiting for its own data, and computing up to where ranks meet."""
        self._seconds += own_seconds
        self._steps += 1

    def share(self) -> dict[str, float]:
        """Tell all ranks, and start anew; a collective call.

        Returns:
            ``slowest_rank`` and ``slowest_rank_ratio``: its mean over the median of the other
            ranks. Nothing with one rank.
        """
        mine = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        if distributed.world_size() == 1:
            return {}
        row = torch.tensor([[mine]], dtype=torch.float64)
        return self.judge(distributed.gather_rows(row).flatten().tolist())

    def judge(self, means: list[float]) -> dict[str, float]:
        """What ``share`` returns, from the mean seconds of each rank; warns of one that is slow."""
        # Of two ranks, a median of both would hide half of the difference.
        ratios = [
            mean / max(statistics.median(means[:rank] + means[rank + 1 :]), 1e-9)
            for rank, mean in enumerate(means)
        ]
        slow = {rank for rank, ratio in enumerate(ratios) if ratio > _SLOW}
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        for rank, times in self._slow.items():
            if times == _IN_A_ROW and distributed.is_main():
                _log.warning(
                    "Rank %d takes %.1f times as long as the others over its part of a step, and "
                    "all wait for it: look at its machine (clock, disk, other programs).",
                    rank,
                    ratios[rank],
                )
        slowest = max(range(len(means)), key=means.__getitem__)
        return {"slowest_rank": float(slowest), "slowest_rank_ratio": ratios[slowest]}
