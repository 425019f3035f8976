"""A directory a class: ``{train,validation,test}/{class}/file``, the ImageFolder convention.

Without split directories (that is, without ``train``), ``{class}/file`` is split by a hash of
the relative path. Without a validation split, a tenth of the training files is taken for it, by
the same hash; the test split never serves for validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, JsonValue

from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import (
    MODALITY_OF,
    TEST_SHARE,
    VALIDATION_SHARE,
    carve_validation,
    list_files,
    split_by_hash,
)
from cmkd_scale.errors import UsageError

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
"""What splits are called in directories and tables -> our name."""


class FolderOptions(BaseModel):
    """There are none."""


class _Folder(FileDataset[FolderOptions]):
    published = "laid out as train/CLASS/FILE, validation/..., test/..., or as CLASS/FILE"
    options_model = FolderOptions

    def _list(self, source: Path, modality: str) -> Listing:
        directories = _split_directories(source)
        extensions = [name for name, kind in MODALITY_OF.items() if kind == modality]
        found: dict[str, list[str]] = {}  # split, or "" -> relative names CLASS/...
        for split, directory in directories.items():
            names = list_files(source / directory, extensions)
            found[split] = [name for name in names if "/" in name]
        label_names = sorted({_class(name) for names in found.values() for name in names})
        label_of = {label: place for place, label in enumerate(label_names)}
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for split, names in found.items():
            prefix = f"{directories[split]}/" if split else ""
            for name in names:
                file = prefix + name
                splits[_place(split, file, directories)].append(
                    Entry(name=file, file=file, label=label_of[_class(name)], group=file)
                )
        recorded: dict[str, JsonValue] = {"splits": _origin(directories)}
        return Listing(tuple(label_names), splits, stored_reader(source), recorded, source)


class ImageFolder(_Folder):
    """The data set ``image_folder``: jpg, jpeg, png and webp, stored unchanged."""

    name = "image_folder"
    modalities = ("image",)


class AudioFolder(_Folder):
    """The data set ``audio_folder``: wav and flac, stored unchanged."""

    name = "audio_folder"
    modalities = ("audio",)


def _class(name: str) -> str:
    return name.split("/", 1)[0]


def _split_directories(source: Path) -> dict[str, str]:
    """Split -> its directory; a key of "" stands for all, to be split here."""
    if not (source / "train").is_dir():
        return {"": ""}
    directories: dict[str, str] = {}
    for name, split in SPLIT_NAMES.items():
        if (source / name).is_dir():
            if split in directories:
                raise UsageError(
                    f"{source} has two directories of the split {split}, {directories[split]} and "
                    f"{name}. Keep one of them."
                )
            directories[split] = name
    return directories


def _place(split: str, file: str, directories: Mapping[str, str]) -> str:
    if not split:
        return split_by_hash(file)
    if split == "train" and "validation" not in directories:
        return carve_validation(file)
    return split


def _origin(directories: Mapping[str, str]) -> str:
    """Who made the splits, for the record."""
    if "" in directories:
        train = 1 - VALIDATION_SHARE - TEST_SHARE
        return f"hash {train:.0%} {VALIDATION_SHARE:.0%} {TEST_SHARE:.0%}"
    if "validation" not in directories:
        return f"directories, validation a hash's {VALIDATION_SHARE:.0%} of train"
    return "directories"
