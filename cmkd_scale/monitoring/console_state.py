"""What the console knows of a run: numbers only, so that taking in a step costs next to nothing."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

TREND = 40  # logged values of a loss that are remembered
_RECENT = 50  # steps
_SLOW = 1.5  # times the median of the others, as the training's own warning has it
_MUCH_WAITING = 0.05  # of the time
_COUNTED = ("steps_skipped", "samples_skipped/", "read_retries", "checkpoint_failures")


@dataclass
class RunState:
    """Filled by the loop; what it derives is asked for when somebody looks."""

    total_steps: int
    began: float
    """All times are seconds of one clock."""
    title: str = ""
    run: str = ""
    """Which run this is, in words: its directory."""
    resume_step: int = 0
    step: int = 0
    moved_at: float = 0.0
    """When the last step ended; at first, when the run began."""
    values: dict[str, float] = field(default_factory=dict)
    """The newest of each name that was logged, see ``metrics.py``."""
    sums: dict[str, float] = field(default_factory=dict)
    """Of what is counted between logged steps: so much since the process began."""
    trends: dict[str, deque[float]] = field(default_factory=dict)
    """The last values of the loss and its components, oldest first."""
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Seconds of the last steps, and how many of them went into waiting for data."""
    checkpoint_at: float | None = None
    """When one was last completed."""

    def __post_init__(self) -> None:
        self.step = self.resume_step
        self.moved_at = self.began

    def end_step(self, step: int, seconds: float, waited_seconds: float, now: float) -> None:
        """Take in a step that has ended."""
        self.step, self.moved_at = step, now
        self.recent.append((seconds, waited_seconds))

    def log(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Take in the numbers of a logged step."""
        self.step, self.moved_at = step, now
        self.values.update(values)
        for name, value in values.items():
            if name == "loss" or name.startswith("loss/"):
                self.trends.setdefault(name, deque(maxlen=TREND)).append(value)
            elif name.startswith(_COUNTED) and math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
        if "checkpoint_seconds" in values:
            self.checkpoint_at = now

    def usual_seconds(self) -> float | None:
        """Of a step; the median of the last ones."""
        return statistics.median(seconds for seconds, _ in self.recent) if self.recent else None

    def waiting_share(self) -> float:
        """Of the time of the last steps, for data: 0 to 1."""
        whole = sum(seconds for seconds, _ in self.recent)
        return sum(waited for _, waited in self.recent) / whole if whole > 0 else 0.0

    def eta_seconds(self) -> float:
        """Until the last step, at the pace of the last ones; NaN if that is not known."""
        if not self.recent:
            return self.values.get("eta_seconds", math.nan)
        pace = sum(seconds for seconds, _ in self.recent) / len(self.recent)
        return pace * (self.total_steps - self.step)

    def waits_much(self) -> bool:
        """Whether waiting for data is worth a word."""
        return self.waiting_share() > _MUCH_WAITING

    def has_slow_rank(self) -> bool:
        """Whether one rank keeps all others waiting."""
        return self.values.get("slowest_rank_ratio", 0.0) > _SLOW
