"""What a data set offers to the builder of shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pydantic import JsonValue

from cmkd_scale.records import Sample


class Split(Protocol):
    """The samples of one modality and split, at random access.

    Sample ``i`` depends on nothing but ``i`` and ``options``, so that a build that was
    killed goes on without making finished shards again.
    """

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the C classes; the label of a sample is an index into it."""

    @property
    def options(self) -> Mapping[str, JsonValue]:
        """All that decides the samples, recorded in the manifest."""

    def __len__(self) -> int:
        """Number of samples N."""

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i`` of 0 .. N - 1."""


class Dataset(Protocol):
    """One or several modalities of one task, each with its own unrelated samples."""

    @property
    def name(self) -> str:
        """As in ``DATASETS``."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What ``open`` takes."""

    @property
    def splits(self) -> tuple[str, ...]:
        """What ``open`` takes."""

    def open(self, modality: str, split: str) -> Split:
        """The samples of one split.

        Raises:
            UsageError: the raw data is missing or does not hold what is needed.
        """
