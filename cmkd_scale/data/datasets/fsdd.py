"""Free Spoken Digit Dataset: single digits spoken by a few people, 8 kHz WAV.

Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0). Layout:
``recordings/{digit}_{speaker}_{index}.wav``. Its README makes indexes 0-4 of each speaker and
digit the test set and 5-49 the training set; of these, 5-9 are for validation here.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import list_files

_NAME = re.compile(r"(([0-9])_([A-Za-z]+)_([0-9]+))\.wav")
_TEST_END = 5
_VALIDATION_END = 10


class FsddOptions(BaseModel):
    """There are none."""


class Fsdd(FileDataset[FsddOptions]):
    """The data set ``fsdd``; see the module."""

    name = "fsdd"
    modalities = ("audio",)
    published = "published at https://github.com/Jakobovski/free-spoken-digit-dataset"
    options_model = FsddOptions

    def _list(self, source: Path, modality: str) -> Listing:
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        prefix = "recordings/" if (source / "recordings").is_dir() else ""
        for file in list_files(source / prefix, ("wav",)):
            match = _NAME.fullmatch(file)
            if match is None:
                continue
            index = int(match[4])
            split = "train" if index >= _VALIDATION_END else "validation"
            splits["test" if index < _TEST_END else split].append(
                Entry(
                    name=match[1],
                    file=prefix + file,
                    label=int(match[2]),
                    group=match[1],
                    about={"speaker": match[3]},
                )
            )
        return Listing(tuple("0123456789"), splits, stored_reader(source), {}, source)
