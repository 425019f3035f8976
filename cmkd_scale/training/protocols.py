"""What the step loop needs of data and of whatever takes its numbers."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

from cmkd_scale.records import Batch


class Loader(Protocol):
    """An endless source of this rank's batches that knows where it stands."""

    def batches(self) -> Generator[Batch, None, None]:
        """Endless batches from the place where the loader stands."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the last delivered batch ended; the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` says."""
        ...

    def epoch_progress(self) -> float:
        """Position in the current epoch, 0 to 1."""
        ...

    def bad_samples_ratio(self) -> float:
        """Share of the samples of an epoch that were found damaged so far."""
        ...

    def exchange(self) -> dict[str, float]:
        """What went wrong with data on any rank since the last call; a collective call."""
        ...


class Sink(Protocol):
    """Takes what there is to tell of steps, on every rank."""

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Note that ``step`` has ended, how long it took, and how long it waited for data."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` of step ``step``."""
        ...


class OrderLog(Protocol):
    """Takes the keys of each batch, on every rank."""

    def log(self, step: int, keys: tuple[str, ...]) -> None:
        """Record what step ``step`` has read here."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...
