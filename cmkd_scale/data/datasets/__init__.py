"""Adapters from raw data to samples, one a file, and the open table ``DATASETS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cmkd_scale.data.datasets.numbers import Numbers
from cmkd_scale.data.datasets.protocols import Dataset, Split

__all__ = ["DATASETS", "Dataset", "DatasetFactory", "Split"]

DatasetFactory = Callable[[Path | None, Mapping[str, str]], Dataset]
"""From the directory of the raw data, if any, and ``key=value`` options to a data set.

Raises ``UsageError`` for an option that is unknown or has a wrong value.
"""

DATASETS: dict[str, DatasetFactory] = {"numbers": Numbers}
