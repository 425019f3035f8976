"""AVE: 4,143 ten-second clips of YouTube in which an event of 28 kinds is seen and heard.

Tian et al., "Audio-Visual Event Localization in Unconstrained Videos", ECCV 2018;
https://github.com/YapengTian/AVE-ECCV18. Layout: ``Annotations.txt`` with a header line,
``trainSet.txt``, ``valSet.txt``, ``testSet.txt``, each of lines
``Category&VideoID&Quality&StartTime&EndTime``, and ``AVE/{VideoID}.mp4``. Splits are the
published ones; a video with events in two of them is left out of the earlier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cmkd_scale.data.datasets.entries import Entry, FileDataset, Listing
from cmkd_scale.data.datasets.files import inside, read_table
from cmkd_scale.data.datasets.video import FrameReader, SoundReader, VideoOptions
from cmkd_scale.errors import UsageError

_HEADER = "Category&VideoID&Quality&StartTime&EndTime"
_FILES = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt"}

_Row = tuple[str, str, float, float]
"""Category, video, start, end in seconds."""


class AveOptions(VideoOptions):
    """``key=value`` options of ``ave``."""

    cut: Literal["event", "clip"] = "event"
    """Take sound and pictures from start to end of the event, or from all of the clip."""


class Ave(FileDataset[AveOptions]):
    """The data set ``ave``; see the module."""

    name = "ave"
    modalities = ("audio", "image")
    published = "published at https://github.com/YapengTian/AVE-ECCV18"
    options_model = AveOptions

    def _list(self, source: Path, modality: str) -> Listing:
        options = self._options
        if not (source / _FILES["train"]).exists() and (source / "AVE_Dataset").is_dir():
            source = source / "AVE_Dataset"  # the directory inside the archive
        label_names = sorted({row[0] for row in self._rows(source / "Annotations.txt")})
        label_of = {label: place for place, label in enumerate(label_names)}
        splits = {}
        for split, name in _FILES.items():
            entries = {}
            for category, video, start, end in self._rows(source / name):
                if category not in label_of:
                    raise UsageError(
                        f"{source / name} has the category '{category}', which Annotations.txt "
                        "does not have. Take both from the same download."
                    )
                if options.cut == "event" and end <= start:
                    continue  # a few rows say 0 to 0
                entry = Entry(
                    name=f"{video}_{start:g}_{end:g}_{category}",
                    file=f"AVE/{video}.mp4",
                    label=label_of[category],
                    group=video,
                    about={"video": video, "start": start, "end": end},
                    span=(start, end) if options.cut == "event" else None,
                )
                entries[entry.name] = entry
            splits[split] = list(entries.values())
        reader = (
            SoundReader(source, options.sample_rate)
            if modality == "audio"
            else FrameReader(source, options)
        )
        recorded = {"cut": options.cut, **options.recorded(modality)}
        return Listing(tuple(label_names), splits, reader, recorded, source)

    def _rows(self, path: Path) -> list[_Row]:
        rows = []
        for number, line in enumerate(read_table(path, self.published).split("\n"), 1):
            fields = line.strip().split("&")
            if line.strip() in ("", _HEADER):
                continue
            try:
                category, video, _, start, end = fields
                row = (category, video, float(start), float(end))
            except ValueError:
                row = ("", "", 0.0, 0.0)
            # The name of the video becomes that of a file.
            if not row[0] or "/" in row[1] or not inside(path.parent, f"AVE/{row[1]}.mp4"):
                raise UsageError(f"{path}, line {number} is not '{_HEADER}': {line[:100]!r}.")
            if not 0 <= row[2] <= 3600 or not 0 <= row[3] <= 3600:
                raise UsageError(f"{path}, line {number} has an impossible time: {line[:100]!r}.")
            rows.append(row)
        return rows
