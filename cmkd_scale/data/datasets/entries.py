"""What data sets made of files have in common: a list of entries a split, read one by one."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, JsonValue

from cmkd_scale.data.datasets.files import make_keys, read_stored
from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.data.datasets.options import parse_options
from cmkd_scale.data.datasets.protocols import Split
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.records import UNLABELLED, Sample

SPLITS = ("train", "validation", "test")

OptionsModel = TypeVar("OptionsModel", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample that has not been read yet."""

    name: str
    """Unique in the data set's modality; the key is made from it."""
    file: str
    """Where it comes from, relative to the root of the listing, with ``/``."""
    label: int
    """Index into the label names, or ``UNLABELLED``."""
    group: str
    """What no two splits may share: the file, the video, the tweet or the actor."""
    about: Mapping[str, JsonValue] = field(default_factory=dict)
    """Goes into the member ``json``, along with ``file`` and the label's name."""
    text: str | None = None
    """The content itself, where that is not in a file of its own."""
    span: tuple[float, float] | None = None
    """Seconds of the video from which the sample is taken; None: all of it."""


Reader = Callable[[Entry], Mapping[str, bytes]]
"""The members that hold an entry's content. It pickles, for builders with several processes."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries of one modality."""

    label_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Entry]]
    reader: Reader
    recorded: Mapping[str, JsonValue]
    """Options that decide the bytes."""
    root: Path
    """The directory that ``Entry.file`` is relative to."""


class FileDataset(ABC, Generic[OptionsModel]):
    """A ``Dataset`` of files; subclasses say which there are."""

    name: str
    modalities: tuple[str, ...]
    splits: tuple[str, ...] = SPLITS
    published: str
    """Where the data can be had, for error messages."""
    options_model: type[OptionsModel]

    def __init__(self, source: Path | None, options: Mapping[str, str]) -> None:
        """Check the options.

        Args:
            source: directory of the data as published.
            options: see the ``options_model`` of the data set.

        Raises:
            UsageError: an option is unknown or has a wrong value.
        """
        self._source = source
        self._options = parse_options(self.options_model, self.name, options)

    @abstractmethod
    def _list(self, source: Path, modality: str) -> Listing:
        """Look through ``source``; files are listed, not read, and may be missing."""

    def open(self, modality: str, split: str) -> Split:
        """The samples of one split; the files are listed here, and read one by one later.

        Raises:
            UsageError: no such modality or split, or the source does not hold what is needed.
        """
        for kind, value, valid in (
            ("modality", modality, self.modalities),
            ("split", split, self.splits),
        ):
            if value not in valid:
                raise UsageError(
                    f"{self.name} has no {kind} '{value}': {did_you_mean(value, valid)}"
                )
        if self._source is None:
            raise UsageError(
                f"{self.name} needs --source, a directory with its files, {self.published}."
            )
        if not self._source.is_dir():
            raise self._wrong_source(f"There is no directory {self._source}")
        listing = self._list(self._source, modality)
        entries = _disjoint(listing.splits)
        listed = sorted(entries[split], key=lambda entry: entry.name)
        sizes = [_size(listing.root, entry) for entry in listed]
        present = [(entry, size) for entry, size in zip(listed, sizes, strict=True) if size]
        if not present:
            absent = f" ({len(listed)} missing, such as {listed[0].file})" if listed else ""
            raise self._wrong_source(
                f"{self._source} holds no {modality} for the split {split}{absent}"
            )
        names = [entry.name for of_split in entries.values() for entry in of_split]
        key_of = dict(zip(names, make_keys(names), strict=True))
        order = keyed_order(len(present), self.name, split)
        shuffled = [present[i][0] for i in order]
        return FileSplit(
            label_names=listing.label_names,
            options={
                **listing.recorded,
                "fingerprint": _fingerprint(present),
                "missing": len(listed) - len(present),
                "shared": len(listing.splits[split]) - len(listed),
            },
            entries=tuple(shuffled),
            keys=tuple(key_of[entry.name] for entry in shuffled),
            reader=listing.reader,
        )

    def _wrong_source(self, what: str) -> UsageError:
        return UsageError(f"{what}. --source names the directory of {self.name}, {self.published}.")


@dataclass(frozen=True, slots=True)
class FileSplit:
    """The entries of a split in their stored order, which mixes the classes."""

    label_names: tuple[str, ...]
    options: Mapping[str, JsonValue]
    """Beside what was chosen: ``fingerprint`` of names, labels and sizes of what is stored;
    how many files were ``missing``; how many entries were left out because what they show is
    ``shared`` with a later split."""
    entries: tuple[Entry, ...]
    keys: tuple[str, ...]
    reader: Reader

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.entries)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: the content; ``cls`` if it is labelled; and ``json`` with its origin.

        Raises:
            IntegrityError: the file cannot be read.
            UsageError: a package that reads it is not installed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        entry = self.entries[i]
        about: dict[str, JsonValue] = {"source": entry.file, **entry.about}
        members = dict(self.reader(entry))
        if entry.label != UNLABELLED:
            about["label"] = self.label_names[entry.label]
            members["cls"] = str(entry.label).encode()
        members["json"] = json.dumps(about, sort_keys=True).encode()
        return Sample(key=self.keys[i], label=entry.label, members=members)


def stored_reader(source: Path) -> Reader:
    """Reads media files below ``source`` unchanged, and text that the entry itself holds."""
    return partial(_read_stored, source)


def _read_stored(source: Path, entry: Entry) -> Mapping[str, bytes]:
    if entry.text is not None:
        return {"txt": entry.text.encode()}
    extension, content = read_stored(source / entry.file)
    return {extension: content}


def _disjoint(splits: Mapping[str, Sequence[Entry]]) -> dict[str, list[Entry]]:
    """Leave out of a split what a later one (validation, then test) shows, too."""
    taken: set[str] = set()
    kept: dict[str, list[Entry]] = {}
    for split in reversed(SPLITS):
        kept[split] = [entry for entry in splits[split] if entry.group not in taken]
        taken |= {entry.group for entry in splits[split]}
    return kept


def _size(source: Path, entry: Entry) -> str:
    """Bytes of the entry's file, or digest of its text; empty if there is no such file."""
    if entry.text is not None:
        return hashlib.sha256(entry.text.encode()).hexdigest()
    path = source / entry.file
    return str(path.stat().st_size) if path.is_file() else ""


def _fingerprint(present: Sequence[tuple[Entry, str]]) -> str:
    """Digest of all that is known without reading the files; ``present`` is in order."""
    digest = hashlib.sha256()
    for entry, size in present:
        known = [entry.name, entry.file, size, entry.label, entry.span, dict(entry.about)]
        digest.update(json.dumps(known, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
