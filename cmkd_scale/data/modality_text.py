"""Texts to tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cmkd_scale.data.modality_base import DecodeError, Modality


def read_text(content: bytes) -> str:
    """A text that is not blank.

    Raises:
        DecodeError: it is, or is not UTF-8.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"it is not UTF-8 text ({error}).") from None
    if not text.strip():
        raise DecodeError("it is an empty text.")
    return text


@dataclass(frozen=True)
class TextModality(Modality):
    """Texts as bytes: [max_bytes] int64 of UTF-8 byte + 1, 0 behind the end."""

    max_bytes: int = 64
    """Longer texts are cut."""
    drop: float = 0.03
    """Augmenting probability of each byte to be left out."""
    substitute: float = 0.03
    """Augmenting probability of each byte to become another one of the same text."""

    extensions: ClassVar[tuple[str, ...]] = ("txt",)
    positive: ClassVar[frozenset[str]] = frozenset({"max_bytes"})

    @property
    def shape(self) -> tuple[int, ...]:
        """(max_bytes,)."""
        return (self.max_bytes,)

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        content = self.content(members)
        read_text(content)
        tokens = np.zeros(self.max_bytes, dtype=np.int64)
        values = np.frombuffer(content[: self.max_bytes], dtype=np.uint8)
        tokens[: len(values)] = values.astype(np.int64) + 1
        return torch.from_numpy(tokens)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Replace and leave out bytes; one at least stays."""
        text = inputs.numpy()
        text = text[: np.count_nonzero(text)]
        chance = rng.random((2, len(text)))
        others = text[rng.integers(len(text), size=len(text))]
        kept = np.where(chance[0] < self.substitute, others, text)[chance[1] >= self.drop]
        kept = kept if len(kept) else text[:1]
        tokens = np.zeros(len(inputs), dtype=np.int64)
        tokens[: len(kept)] = kept
        return torch.from_numpy(tokens)
