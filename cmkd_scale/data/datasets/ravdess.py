"""RAVDESS: 24 actors speak and sing two sentences in eight emotions.

Livingstone and Russo, "The Ryerson Audio-Visual Database of Emotional Speech and Song", PLoS
ONE 13(5), 2018; https://zenodo.org/records/1188976 (CC BY-NC-SA 4.0). Files are named by seven
numbers: modality (01 sound and picture, 02 picture, 03 sound), vocal channel (01 speech, 02
song), emotion, intensity, statement, repetition, actor. The archives may be unpacked in any
directories.

No splits are published. Here they have no actor in common: actors 1-4, 5-8, ... (two women and
two men each) are six groups, of which ``fold`` 0 .. 5 is for testing and the next for
validation.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from cmkd_scale.data.datasets.actors import split_of_group
from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import list_files
from cmkd_scale.data.datasets.video import FrameOptions, FrameReader

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_NAME = re.compile(
    r"(0[123])-(0[12])-(0[1-8])-(0[12])-(0[12])-(0[12])-(0[1-9]|1[0-9]|2[0-4])\.(wav|mp4)"
)
_FOLDS = 6
_ACTORS_OF_A_FOLD = 4


class RavdessOptions(FrameOptions):
    """``key=value`` options of ``ravdess``."""

    channel: Literal["speech", "song", "both"] = "speech"
    fold: int = Field(0, ge=0, lt=_FOLDS)
    """Which four actors are for testing."""


class Ravdess(FileDataset[RavdessOptions]):
    """The data set ``ravdess``; see the module."""

    name = "ravdess"
    modalities = ("audio", "image")
    published = "published at https://zenodo.org/records/1188976"
    options_model = RavdessOptions

    def _list(self, source: Path, modality: str) -> Listing:
        options = self._options
        channels = {"speech": ("01",), "song": ("02",), "both": ("01", "02")}[options.channel]
        extension, kinds = {"audio": ("wav", ("03",)), "image": ("mp4", ("01", "02"))}[modality]
        # Pictures of a take come twice, with sound and without; and so do all files in copies
        # of the data set that are in circulation.
        takes: dict[str, Entry] = {}
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for file in sorted(list_files(source, (extension,)), key=_base_name):
            match = _NAME.fullmatch(_base_name(file))
            if match is None or match[1] not in kinds or match[2] not in channels:
                continue
            take = match[0][3:]
            if take in takes:
                continue
            takes[take] = Entry(
                name=match[0].removesuffix(f".{extension}"),
                file=file,
                label=int(match[3]) - 1,
                group=f"actor {match[7]}",
                about={
                    "actor": int(match[7]),
                    "channel": "speech" if match[2] == "01" else "song",
                    "intensity": "normal" if match[4] == "01" else "strong",
                },
            )
            group = (int(match[7]) - 1) // _ACTORS_OF_A_FOLD
            splits[split_of_group(group, options.fold, _FOLDS)].append(takes[take])
        return Listing(
            label_names=EMOTIONS,
            splits=splits,
            reader=stored_reader(source) if modality == "audio" else FrameReader(source, options),
            recorded={
                "channel": options.channel,
                "fold": options.fold,
                **options.recorded(modality),
            },
            root=source,
        )


def _base_name(file: str) -> str:
    return PurePosixPath(file).name
