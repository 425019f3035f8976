"""Any files that a table lists: a CSV with a header and a line for each sample.

Columns (named by options): ``path`` of a file relative to the source, ``label`` (empty:
unlabelled), ``split`` and ``text``, which holds a text itself. A line may have both a path and a
text, and then is a sample of two modalities. Lines without a split go where a hash of their path
or text says; without any line of the validation split, a tenth of the training lines does.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, Field

from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import (
    MODALITY_OF,
    carve_validation,
    extension_of,
    inside,
    read_table,
    split_by_hash,
)
from cmkd_scale.data.datasets.folder import SPLIT_NAMES
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.records import UNLABELLED

_SPLIT_NAMES = {**SPLIT_NAMES, "dev": "validation"}

_Row = tuple[int, dict[str, str]]
"""Line of the table, and column -> value; the columns are called as by default."""


class CsvOptions(BaseModel):
    """``key=value`` options of ``csv``."""

    file: str = ""
    """Name of the table; empty: the only .csv in the source."""
    path: str = Field("path", min_length=1)
    """Name of the column, and so on below."""
    label: str = Field("label", min_length=1)
    split: str = Field("split", min_length=1)
    text: str = Field("text", min_length=1)
    modality: Literal["image", "audio", "text", "features", ""] = ""
    """Of all lines; empty: by the extension of each path."""


class CsvTable(FileDataset[CsvOptions]):
    """The data set ``csv``; see the module."""

    name = "csv"
    modalities: tuple[str, ...] = ("image", "audio", "text", "features")
    published = "which holds a table with the columns path, label, split and text"
    options_model = CsvOptions

    def __init__(self, source: Path | None, options: Mapping[str, str]) -> None:
        """See ``FileDataset``; the option ``modality`` leaves only that one."""
        super().__init__(source, options)
        if self._options.modality:
            self.modalities = (self._options.modality,)

    def _list(self, source: Path, modality: str) -> Listing:
        table = self._table(source)
        rows = self._rows(table)
        label_names = sorted({row["label"] for _, row in rows if row["label"]})
        label_of = {label: place for place, label in enumerate(label_names)}
        carve = all(_SPLIT_NAMES.get(row["split"]) != "validation" for _, row in rows)
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        lines: dict[str, int] = {}
        for number, row in rows:
            entry = self._entry(table, number, row, modality, label_of)
            if entry is None:
                continue
            first = lines.setdefault(entry.name, number)
            if first != number:
                raise UsageError(
                    f"{table}, line {number}: '{entry.name}' is in line {first} already. A file "
                    "is one sample of one split: remove one of the lines."
                )
            splits[_split(table, number, row, entry, carve)].append(entry)
        options = self._options.model_dump()
        recorded = {**options, "file": table.name, "modality": modality}
        return Listing(tuple(label_names), splits, stored_reader(source), recorded, source)

    def _table(self, source: Path) -> Path:
        name = self._options.file
        if name:
            if "/" in name or not inside(source, name):
                raise UsageError(f"csv: file={name} is not the name of a file in {source}.")
            return source / name
        tables = sorted(source.glob("*.csv"))
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "none"
            raise UsageError(f"{source} should hold one .csv ({found} there): name it by file=...")
        return tables[0]

    def _rows(self, table: Path) -> list[_Row]:
        text = read_table(table, "named by file=...")
        try:
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            header = next(reader, [])
            columns = self._columns(table, header)
            rows = []
            for fields in reader:
                if len(fields) != len(header) and fields:
                    raise UsageError(
                        f"{table}, line {reader.line_num} has {len(fields)} values, but the "
                        f"header has {len(header)}."
                    )
                if fields:
                    row = {
                        key: fields[place].strip() if place is not None else ""
                        for key, place in columns.items()
                    }
                    rows.append((reader.line_num, row))
        except csv.Error as error:
            raise UsageError(f"{table}, line {reader.line_num}: {error}.") from None
        return rows

    def _columns(self, table: Path, header: list[str]) -> dict[str, int | None]:
        """Our name of a column -> its place; only columns that an option names must be there."""
        columns: dict[str, int | None] = {}
        for key in ("path", "label", "split", "text"):
            name = getattr(self._options, key)
            columns[key] = header.index(name) if name in header else None
            if columns[key] is None and key in self._options.model_fields_set:
                raise UsageError(f"{table} has no column '{name}': {did_you_mean(name, header)}")
        if columns["path"] is None and columns["text"] is None:
            raise UsageError(
                f"{table} has neither a column 'path' nor 'text', but {', '.join(header)}: name "
                "one by path=... or text=..."
            )
        return columns

    def _entry(
        self,
        table: Path,
        number: int,
        row: Mapping[str, str],
        modality: str,
        label_of: Mapping[str, int],
    ) -> Entry | None:
        """The sample of one modality that a line holds, if it does."""
        label = label_of.get(row["label"], UNLABELLED)
        if modality == "text" and row["text"]:
            name = f"{table.stem}-{number}"
            return Entry(name, table.name, label, row["text"], {"line": number}, row["text"])
        path = row["path"]
        if not path:
            if row["text"]:
                return None
            raise UsageError(f"{table}, line {number} has neither a path nor a text.")
        if not inside(table.parent, path):
            raise UsageError(
                f"{table}, line {number}: '{path}' is not a relative path to a file inside "
                f"{table.parent}; links that lead out of it are refused, too."
            )
        kind = MODALITY_OF.get(extension_of(path))
        if kind is None or (self._options.modality and kind != modality):
            takes = [name for name, of in MODALITY_OF.items() if of in self.modalities]
            raise UsageError(
                f"{table}, line {number}: '{path}' cannot be stored as it is; files may be "
                f"{', '.join(takes)}. Convert it."
            )
        if not (table.parent / path).is_file():
            raise UsageError(f"{table}, line {number}: there is no file {table.parent / path}.")
        if kind != modality:
            return None
        file = PurePosixPath(path).as_posix()
        # Two links to one file must not end up in two splits.
        target = (table.parent / file).resolve().relative_to(table.parent.resolve()).as_posix()
        return Entry(file, file, label, target)


def _split(table: Path, number: int, row: Mapping[str, str], entry: Entry, carve: bool) -> str:
    if not row["split"]:
        return split_by_hash(entry.group)
    if row["split"] not in _SPLIT_NAMES:
        raise UsageError(
            f"{table}, line {number}: there is no split '{row['split']}', "
            f"{did_you_mean(row['split'], _SPLIT_NAMES)}"
        )
    split = _SPLIT_NAMES[row["split"]]
    return carve_validation(entry.group) if carve and split == "train" else split
