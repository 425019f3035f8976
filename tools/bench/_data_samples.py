"""What ``data.py`` stores and how it is decoded, the same for every library."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.array import read_array
from cmkd_scale.data.modality_base import Modality

SECONDS, RATE, DIM = 0.5, 8000, 128


def decode_jpg(content: bytes) -> Tensor:
    """[height, width, 3] bytes."""
    return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB"))


def decode_wav(content: bytes) -> Tensor:
    """[SECONDS * RATE] float32, padded or cut."""
    sound, _ = soundfile.read(io.BytesIO(content), dtype="float32", frames=int(SECONDS * RATE))
    padded = np.zeros(int(SECONDS * RATE), dtype=np.float32)
    padded[: len(sound)] = sound
    return torch.from_numpy(padded)


def decode_npy(content: bytes) -> Tensor:
    """[DIM] float32; the numbers are copied, since bytes cannot be written to."""
    return torch.from_numpy(read_array(content, DIM).astype(np.float32))


@dataclass(frozen=True)
class Kind:
    """What is stored: the extension names the decoder."""

    extension: str
    pixels: int = 0

    @property
    def decode(self) -> Callable[[bytes], Tensor]:
        """Bytes to tensor, the same function for every library."""
        return {"jpg": decode_jpg, "wav": decode_wav, "npy": decode_npy}[self.extension]

    def collate(self, rows: list[Any]) -> tuple[Tensor, Tensor]:
        """A batch of (content, label)."""
        inputs = torch.stack([self.decode(content) for content, _ in rows])
        return inputs, torch.tensor([int(label) for _, label in rows])


KINDS = {"jpg": Kind("jpg", 64), "wav": Kind("wav"), "npy": Kind("npy")}
LARGE = {"jpg 224 x 224": Kind("jpg", 224)}


@dataclass(frozen=True)
class Plain(Modality):
    """The decoder as a modality of ours."""

    kind: Kind = KINDS["npy"]

    def __post_init__(self) -> None:
        """No numbers to check."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an empty batch, which does not occur."""
        return ()

    def wants(self, extension: str) -> bool:
        """The content alone."""
        return extension == self.kind.extension

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        return self.kind.decode(members[self.kind.extension])

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Nothing."""
        return inputs


def contents(kind: Kind, count: int, fsdd: Path) -> list[bytes]:
    """The samples: real where there is something real, repeated if there are too few."""
    rng = np.random.default_rng(0)
    if kind.extension == "npy":
        made = []
        for vector in rng.standard_normal((count, DIM), dtype=np.float32):
            np.save(file := io.BytesIO(), vector)
            made.append(file.getvalue())
        return made
    if kind.extension == "wav":
        files = sorted((fsdd / "recordings").glob("*.wav"))
        sounds = [path.read_bytes() for path in files] or [_tone(rng) for _ in range(500)]
        return list(itertools.islice(itertools.cycle(sounds), count))
    from sklearn.datasets import load_sample_images

    photos: list[NDArray[np.uint8]] = load_sample_images().images
    made = []
    for number in range(count):
        photo = photos[number % len(photos)]
        y, x = (rng.integers(size - kind.pixels) for size in photo.shape[:2])
        crop = np.ascontiguousarray(photo[y : y + kind.pixels, x : x + kind.pixels])
        made.append(simplejpeg.encode_jpeg(crop, quality=90, colorspace="RGB"))
    return made


def _tone(rng: np.random.Generator) -> bytes:
    length = int(RATE * rng.uniform(0.2, 0.6))
    wave = np.sin(np.arange(length) * rng.uniform(0.1, 1.0)) + rng.standard_normal(length) / 8
    soundfile.write(file := io.BytesIO(), wave / 4, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
