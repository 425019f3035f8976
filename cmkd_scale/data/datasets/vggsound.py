"""VGGSound: 200,000 ten-second clips of YouTube with a sound of 309 kinds and what makes it.

Chen et al., "VGGSound: A Large-scale Audio-Visual Dataset", ICASSP 2020;
https://www.robots.ox.ac.uk/~vgg/data/vggsound/ (CC BY 4.0 for the table). Layout:
``vggsound.csv`` without a header (YouTube id, start in seconds, label, train or test), and clips
``{id}_{start:06d}.mp4`` at any depth. Many videos are gone from YouTube: clips that are not there
are counted, not required. Validation is a tenth of the published training set, by a hash of the
id.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path, PurePosixPath

from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing
from cmkd_scale.data.datasets.files import carve_validation, list_files, read_table
from cmkd_scale.data.datasets.video import FrameReader, SoundReader, VideoOptions
from cmkd_scale.errors import UsageError, did_you_mean

_TABLE = "vggsound.csv"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Row = tuple[str, int, str, str]
"""YouTube id, start in seconds, label, published split."""


class VggSoundOptions(VideoOptions):
    """``key=value`` options of ``vggsound``."""

    classes: str = ""
    """Labels to keep, separated by commas (one that has a comma itself goes in double quotes),
    or how many of them, the first by name; empty: all."""


class VggSound(FileDataset[VggSoundOptions]):
    """The data set ``vggsound``; see the module."""

    name = "vggsound"
    modalities = ("audio", "image")
    published = "published at https://www.robots.ox.ac.uk/~vgg/data/vggsound/"
    options_model = VggSoundOptions

    def _list(self, source: Path, modality: str) -> Listing:
        options = self._options
        rows = _rows(source / _TABLE, read_table(source / _TABLE, self.published))
        label_names = _chosen({row[2] for row in rows}, options.classes)
        label_of = {label: place for place, label in enumerate(label_names)}
        there = {PurePosixPath(file).name: file for file in list_files(source, ("mp4",))}
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        listed = set()
        for video, start, label, published in rows:
            clip = f"{video}_{start:06d}"
            if label not in label_of or clip in listed:
                continue
            listed.add(clip)
            split = carve_validation(video) if published == "train" else published
            splits[split].append(
                Entry(
                    name=clip,
                    file=there.get(f"{clip}.mp4", f"{clip}.mp4"),
                    label=label_of[label],
                    group=video,
                    about={"video": video, "start": start},
                )
            )
        reader = (
            SoundReader(source, options.sample_rate)
            if modality == "audio"
            else FrameReader(source, options)
        )
        recorded = {"classes": options.classes, **options.recorded(modality)}
        return Listing(label_names, splits, reader, recorded, source)


def _rows(path: Path, text: str) -> list[_Row]:
    rows = []
    for number, fields in enumerate(_parsed(path, text), 1):
        if not fields:
            continue
        valid = len(fields) == 4 and _ID.fullmatch(fields[0]) and fields[3] in ("train", "test")
        if not valid or not re.fullmatch(r"[0-9]{1,6}", fields[1]) or not fields[2]:
            raise UsageError(
                f"{path}, line {number} is not 'id,start_seconds,label,train|test': "
                f"{','.join(fields)[:100]!r}."
            )
        rows.append((fields[0], int(fields[1]), fields[2], fields[3]))
    return rows


def _parsed(path: Path, text: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as CSV: {error}.") from None


def _chosen(labels: set[str], classes: str) -> tuple[str, ...]:
    """The label names that the option ``classes`` asks for, sorted."""
    if classes.strip().isdecimal():
        count = int(classes)
        if not 1 <= count <= len(labels):
            raise UsageError(f"vggsound: classes={count}, but there are {len(labels)} labels.")
        return tuple(sorted(labels)[:count])
    wanted = [name.strip() for row in _parsed(Path("classes"), classes) for name in row]
    for name in wanted:
        if name not in labels:
            raise UsageError(f"vggsound has no label '{name}': {did_you_mean(name, labels)}")
    return tuple(sorted(set(wanted) or labels))
