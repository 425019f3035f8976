"""A data set made in memory, so that tests of the data room need no package of data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from cmkd_scale.data.build import build
from cmkd_scale.data.shards import Manifest
from cmkd_scale.records import Sample


class ToySplit:
    """``count`` texts of ``classes`` classes; each holds a letter of its class, many times."""

    def __init__(self, split: str, count: int, classes: int) -> None:
        self.split = split
        self.count = count
        self.label_names = tuple(f"class {label}" for label in range(classes))
        self.options: Mapping[str, JsonValue] = {"count": count, "classes": classes}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        label = index % len(self.label_names)
        text = f"{self.split} {index}: " + 16 * chr(ord("a") + label)
        members = {"txt": text.encode(), "cls": str(label).encode()}
        return Sample(key=f"toy-{self.split}-{index:06d}", label=label, members=members)


class Toy:
    """The data set ``toy`` with one modality."""

    name = "toy"
    modalities = ("text",)
    splits = ("train", "validation", "test")

    def __init__(self, count: int = 60, classes: int = 4) -> None:
        self.count = count
        self.classes = classes

    def open(self, modality: str, split: str) -> ToySplit:
        assert modality == "text"
        return ToySplit(split, self.count if split == "train" else self.count // 2, self.classes)


def build_toy(
    out: Path, split: str = "train", *, count: int = 60, classes: int = 4, per_shard: int = 16
) -> Manifest:
    """Shards of ``toy`` below ``out/text/split``."""
    return build(
        Toy(count, classes), out, modality="text", split=split, samples_per_shard=per_shard
    )


PAIRS = 4
"""Letters on each side of a class of ``pairs``."""


class PairsSplit:
    """Texts of 16 classes that share their halves, as two-digit numbers do."""

    label_names = tuple(f"{i}{j}" for i in range(PAIRS) for j in range(PAIRS))
    options: Mapping[str, JsonValue] = {}

    def __init__(self, split: str, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        label = index % PAIRS**2
        first, second = divmod(label, PAIRS)
        text = f"{index % 7}" + 6 * chr(ord("a") + first) + 6 * chr(ord("k") + second)
        members = {"txt": text.encode(), "cls": str(label).encode()}
        return Sample(key=f"pairs-{self.split}-{index:05d}", label=label, members=members)


class Pairs:
    """The data set ``pairs`` with one modality."""

    name = "pairs"
    modalities = ("text",)
    splits = ("train", "validation", "test")

    def open(self, modality: str, split: str) -> PairsSplit:
        return PairsSplit(split, 160 if split == "train" else 32)
