"""CREMA-D: 91 actors say twelve sentences in six emotions.

Cao et al., "CREMA-D: Crowd-Sourced Emotional Multimodal Actors Dataset", IEEE Transactions on
Affective Computing 5(4), 2014; https://github.com/CheyneyComputerScience/CREMA-D (ODbL). Layout:
``AudioWAV/{actor}_{sentence}_{emotion}_{intensity}.wav`` and the same names below ``VideoFlash/``
with ``.flv``. The label is the emotion that was acted, not the one that raters heard.

No splits are published. Here they have no actor in common: the actors are dealt out to ten
groups, of which ``fold`` 0 .. 9 is for testing and the next for validation.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from cmkd_scale.data.datasets.actors import split_of_group
from cmkd_scale.data.datasets.entries import SPLITS, Entry, FileDataset, Listing, stored_reader
from cmkd_scale.data.datasets.files import list_files
from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.data.datasets.video import FrameOptions, FrameReader

EMOTIONS = {
    "ANG": "anger",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
_CODES = tuple(EMOTIONS)
_NAME = re.compile(r"((1[0-9]{3})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2}))\.(?:wav|flv)")
_FIRST_ACTOR, _ACTORS = 1001, 91
_FOLDS = 10
_SILENT = "1076_MTI_SAD_XX"  # "has no audio", says the publishers' README


class CremaDOptions(FrameOptions):
    """``key=value`` options of ``crema_d``."""

    fold: int = Field(0, ge=0, lt=_FOLDS)
    """Which tenth of the actors is for testing."""


class CremaD(FileDataset[CremaDOptions]):
    """The data set ``crema_d``; see the module."""

    name = "crema_d"
    modalities = ("audio", "image")
    published = "published at https://github.com/CheyneyComputerScience/CREMA-D"
    options_model = CremaDOptions

    def _list(self, source: Path, modality: str) -> Listing:
        options = self._options
        directory, extension = {"audio": ("AudioWAV", "wav"), "image": ("VideoFlash", "flv")}[
            modality
        ]
        if not (source / directory).is_dir():
            raise self._wrong_source(f"There is no directory {source / directory}")
        dealt = keyed_order(_ACTORS, self.name, "actors")
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for file in list_files(source / directory, (extension,)):
            match = _NAME.fullmatch(file)
            if match is None or (modality == "audio" and match[1] == _SILENT):
                continue
            actor = int(match[2])
            if match[4] not in EMOTIONS or not 0 <= actor - _FIRST_ACTOR < _ACTORS:
                continue
            group = int(dealt[actor - _FIRST_ACTOR]) % _FOLDS
            splits[split_of_group(group, options.fold, _FOLDS)].append(
                Entry(
                    name=match[1],
                    file=f"{directory}/{file}",
                    label=_CODES.index(match[4]),
                    group=f"actor {actor}",
                    about={"actor": actor, "sentence": match[3], "intensity": match[5]},
                )
            )
        return Listing(
            label_names=tuple(EMOTIONS.values()),
            splits=splits,
            reader=stored_reader(source) if modality == "audio" else FrameReader(source, options),
            recorded={"fold": options.fold, **options.recorded(modality)},
            root=source,
        )
