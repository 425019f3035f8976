"""A data set of three modalities, made in memory: what a class looks, sounds and reads like."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import JsonValue

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.build import build
from cmkd_scale.records import Sample

RATE = 16_000
CLASSES = 3


def picture(label: int, number: int) -> bytes:
    """A PNG of 40 x 30 pixels: a bright stripe at a place that is the class's."""
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
    pixels[10 * label : 10 * label + 10, :, label % 3] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def sound(label: int, number: int) -> bytes:
    """A WAV of a fifth of a second, more or less: a tone whose height is the class's."""
    rng = np.random.default_rng([label, number])
    time = np.arange(RATE // 5 + 100 * (number % 5)) / RATE
    tone = np.sin(2 * np.pi * 300 * (label + 1) * time) + 0.1 * rng.standard_normal(len(time))
    return wav_bytes((0.3 * tone).astype(np.float32), RATE)


def text(label: int, number: int) -> bytes:
    """A few words, one of them the class's."""
    words = ["red", "green", "blue"][label], ["one", "two", "three", "four"][number % 4]
    return f"{words[0]} {words[1]} {words[0]}".encode()


MEMBERS: dict[str, tuple[str, Callable[[int, int], bytes]]] = {
    "image": ("png", picture),
    "audio": ("wav", sound),
    "text": ("txt", text),
}
"""Modality -> file extension, and what makes a sample of a label and a number."""


class _Split:
    def __init__(self, modality: str, split: str, count: int) -> None:
        self.split = split
        self.label_names = tuple(f"class {label}" for label in range(CLASSES))
        self.options: Mapping[str, JsonValue] = {"count": count}
        self._modality = modality
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        label = index % CLASSES
        extension, make = MEMBERS[self._modality]
        offset = {"train": 0, "validation": 1000, "test": 2000}[self.split]
        members = {extension: make(label, offset + index), "cls": str(label).encode()}
        return Sample(key=f"{self.split}-{index:04d}", label=label, members=members)


class Senses:
    """The data set ``senses``."""

    name = "senses"
    modalities = ("image", "audio", "text")
    splits = ("train", "validation", "test")

    def __init__(self, count: int) -> None:
        self.count = count

    def open(self, modality: str, split: str) -> _Split:
        return _Split(modality, split, self.count)


def build_senses(out: Path, modality: str, *, count: int = 12) -> Path:
    """Shards of a modality below ``out``, ``count`` samples a split; returns ``out``."""
    for split in Senses.splits:
        build(Senses(count), out, modality=modality, split=split, samples_per_shard=count)
    return out
