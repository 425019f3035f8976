"""CrisisMMD v2.0: tweets of seven disasters of 2017, their texts and pictures labelled apart.

Alam, Ofli and Imran, "CrisisMMD: Multimodal Twitter Datasets from Natural Disasters", ICWSM 2018,
with the splits of Ofli et al., ISCRAM 2020; https://crisisnlp.qcri.org/crisismmd (CC BY-NC-SA
4.0). Layout: ``crisismmd_datasplit_all/task_{task}_text_img_{train,dev,test}.tsv`` inside or
beside ``CrisisMMD_v2.0``, which holds ``data_image/``. The published dev split is ``validation``.

A picture has the label ``label_image``, a text ``label_text``; a text with several pictures is
one sample. Damage was judged by pictures only. Label names are those that occur, sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from cmkd_scale.data.datasets.entries import Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import MODALITY_OF, extension_of, inside, read_table
from cmkd_scale.errors import UsageError

_SPLITS = "crisismmd_datasplit_all"
_ROOT = "CrisisMMD_v2.0"
_FILES = {"train": "train", "validation": "dev", "test": "test"}
_COLUMNS = ("event_name", "tweet_id", "image_id", "tweet_text", "image", "label")

_Rows = list[dict[str, str]]


class CrisisMmdOptions(BaseModel):
    """``key=value`` options of ``crisis_mmd``."""

    task: Literal["humanitarian", "informative", "damage"] = "humanitarian"


class CrisisMmd(FileDataset[CrisisMmdOptions]):
    """The data set ``crisis_mmd``; see the module."""

    name = "crisis_mmd"
    modalities: tuple[str, ...] = ("image", "text")
    published = "published at https://crisisnlp.qcri.org/crisismmd"
    options_model = CrisisMmdOptions

    def __init__(self, source: Path | None, options: Mapping[str, str]) -> None:
        """See ``FileDataset``; the task ``damage`` has no texts."""
        super().__init__(source, options)
        if self._options.task == "damage":
            self.modalities = ("image",)

    def _list(self, source: Path, modality: str) -> Listing:
        root, tables = self._find(source)
        rows = {split: self._rows(root, path) for split, path in tables.items()}
        label_names = sorted(
            {
                row[_label_column(row, kind)]
                for of_split in rows.values()
                for row in of_split
                for kind in self.modalities
            }
        )
        label_of = {label: place for place, label in enumerate(label_names)}
        splits = {}
        for split, of_split in rows.items():
            entries: dict[str, Entry] = {}
            for row in of_split:
                entry = _entry(row, modality, label_of, tables[split].name)
                entries.setdefault(entry.name, entry)
            splits[split] = list(entries.values())
        recorded = {"task": self._options.task}
        return Listing(tuple(label_names), splits, stored_reader(root), recorded, root)

    def _find(self, source: Path) -> tuple[Path, dict[str, Path]]:
        """The directory that holds ``data_image``, and the tables of the splits."""
        root = source / _ROOT if (source / _ROOT).is_dir() else source
        places = [
            place / _SPLITS / again
            for place in (root, source, root.absolute().parent)
            for again in ("", _SPLITS)  # the archive, unpacked into a directory of its name
        ]
        task = self._options.task
        for place in places:
            tables = {
                split: place / f"task_{task}_text_img_{name}.tsv" for split, name in _FILES.items()
            }
            if tables["train"].is_file():
                return root, tables
        raise self._wrong_source(
            f"There is no {_SPLITS}/task_{task}_text_img_train.tsv inside or beside {root}"
        )

    def _rows(self, root: Path, path: Path) -> _Rows:
        """The table's lines; a quote has no meaning in it, and a tweet may hold one."""
        header, *lines = read_table(path, self.published).split("\n")
        columns = header.strip().split("\t")
        absent = [name for name in _COLUMNS if name not in columns]
        if absent:
            raise UsageError(
                f"{path} has no column {', '.join(absent)}. Take the splits of CrisisMMD v2.0, "
                f"{self.published}."
            )
        rows = []
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            fields = line.rstrip("\r").split("\t")
            row = dict(zip(columns, fields, strict=False))
            if len(fields) != len(columns) or not all(
                row[_label_column(row, kind)] for kind in self.modalities
            ):
                raise UsageError(
                    f"{path}, line {number} does not have a value for each of the "
                    f"{len(columns)} columns: {line[:100]!r}."
                )
            image = row["image"]
            if not inside(root, image) or MODALITY_OF.get(extension_of(image)) != "image":
                raise UsageError(
                    f"{path}, line {number}: '{image}' is not the relative path of a picture."
                )
            rows.append(row)
        return rows


def _label_column(row: Mapping[str, str], modality: str) -> str:
    """Tables of ``damage`` have only ``label``."""
    name = f"label_{modality}"
    return name if name in row else "label"


def _entry(row: Mapping[str, str], modality: str, label_of: Mapping[str, int], table: str) -> Entry:
    text = row["tweet_text"] if modality == "text" else None
    return Entry(
        name=row["tweet_id"] if modality == "text" else row["image_id"],
        file=table if modality == "text" else row["image"],
        label=label_of[row[_label_column(row, modality)]],
        group=row["tweet_id"],
        about={"event": row["event_name"], "tweet_id": row["tweet_id"]},
        text=text,
    )
