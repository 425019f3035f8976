"""Adapters from raw data to samples, one a file, and the open table ``DATASETS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cmkd_scale.data.datasets.ave import Ave
from cmkd_scale.data.datasets.crema_d import CremaD
from cmkd_scale.data.datasets.crisis_mmd import CrisisMmd
from cmkd_scale.data.datasets.csv_table import CsvTable
from cmkd_scale.data.datasets.folder import AudioFolder, ImageFolder
from cmkd_scale.data.datasets.fsdd import Fsdd
from cmkd_scale.data.datasets.numbers import Numbers
from cmkd_scale.data.datasets.protocols import Dataset, Split
from cmkd_scale.data.datasets.ravdess import Ravdess
from cmkd_scale.data.datasets.vggsound import VggSound

__all__ = ["DATASETS", "Dataset", "DatasetFactory", "Split"]

DatasetFactory = Callable[[Path | None, Mapping[str, str]], Dataset]
"""From the directory of the raw data, if any, and ``key=value`` options to a data set.

Raises ``UsageError`` for an option that is unknown or has a wrong value.
"""

DATASETS: dict[str, DatasetFactory] = {
    "numbers": Numbers,
    "fsdd": Fsdd,
    "ravdess": Ravdess,
    "crema_d": CremaD,
    "ave": Ave,
    "vggsound": VggSound,
    "crisis_mmd": CrisisMmd,
    "image_folder": ImageFolder,
    "audio_folder": AudioFolder,
    "csv": CsvTable,
}
