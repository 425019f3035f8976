"""A training set of ``numbers`` in which some classes have ten times as many clips as others.

``data.n_per_class`` gives all classes as many, so the set is built as shards of its own: the
first clips of each class of the quickstart's data, 1 to 10 of them. Which classes have many is
a permutation of the seed's. Validation and test are those of the quickstart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from cmkd_scale.data.build import build
from cmkd_scale.data.datasets.numbers import Numbers
from cmkd_scale.data.datasets.protocols import Split
from cmkd_scale.records import Sample

MOST = 10
"""Clips of the most frequent class; the rarest has one."""


def shifted_counts(classes: int, seed: int) -> list[int]:
    """Clips of each class: 10 to the power of r, r from 0 to 1 in equal steps, rounded.

    For 100 classes 391 in all, where three of each would be 300.
    """
    counts = np.rint(float(MOST) ** np.linspace(0.0, 1.0, classes)).astype(int)
    shuffled: list[int] = np.random.default_rng(seed).permutation(counts).tolist()
    return shuffled


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples of a split."""

    whole: Split
    places: list[int]
    options: Mapping[str, JsonValue]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.label_names

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.places)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i`` of the part."""
        return self.whole[self.places[i]]


def cut_down(whole: Split, wanted: Sequence[int], recorded: Mapping[str, JsonValue]) -> Part:
    """The first ``wanted[label]`` samples of each class, in the order of the whole."""
    places, taken = [], Counter[int]()
    for place in range(len(whole)):
        label = whole[place].label
        if taken[label] < wanted[label]:
            taken[label] += 1
            places.append(place)
    return Part(whole, places, {**whole.options, **recorded})


@dataclass(frozen=True, slots=True)
class ShiftedNumbers:
    """``numbers``, its training split cut down to ``shifted_counts``."""

    source: Path | None
    options: Mapping[str, int]
    """Of ``Numbers``; enough training samples for the most frequent class."""
    seed: int

    name = "numbers-shifted"
    modalities = ("audio",)
    splits = Numbers.splits

    def open(self, modality: str, split: str) -> Split:
        """See ``Numbers``."""
        options = {key: str(value) for key, value in self.options.items()}
        whole = Numbers(self.source, options).open(modality, split)
        if split != "train":
            return whole
        wanted = shifted_counts(len(whole.label_names), self.seed)
        return cut_down(whole, wanted, {"label_shift_seed": self.seed})


def build_shifted(root: Path, source: Path | None, counts: Mapping[str, int], seed: int) -> Path:
    """Shards of the set for one seed and fold, built on first use; returns their directory."""
    options = {**counts, "train_per_class": MOST}
    if source is not None:
        options["fold"] = seed
    dataset = ShiftedNumbers(source, options, seed)
    for split in dataset.splits:
        build(dataset, root, modality="audio", split=split, samples_per_shard=1000)
    return root / "audio"
