"""What every modality is: options, bytes to tensor, augmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cmkd_scale.data.damage import DamagedError
from cmkd_scale.errors import UsageError


class DecodeError(DamagedError):
    """The bytes of a sample are not what their file extension promises."""

    def __init__(self, message: str) -> None:
        """Say what is wrong with them."""
        super().__init__("undecodable", message)


@dataclass(frozen=True)
class Modality(ABC):
    """Common to all modalities; option names and defaults are those of the subclasses."""

    extensions: ClassVar[tuple[str, ...]]
    """Members that hold the content; the first one that is there is read."""
    positive: ClassVar[frozenset[str]] = frozenset()
    """Options that must be above 0; all others must not be below it."""

    def __post_init__(self) -> None:
        """Refuse impossible options with ``UsageError``."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)):
                continue
            if value < 0 or (field.name in self.positive and value == 0):
                bound = "above 0" if field.name in self.positive else "0 or more"
                raise UsageError(f"{type(self).__name__}: {field.name} is {value}, not {bound}.")

    def identity(self) -> dict[str, Any]:
        """All that shapes the tensors, as JSON: two modalities of one identity decode alike."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": type(self).__name__, **options}

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of a decoded sample."""

    @abstractmethod
    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """The tensor of a sample.

        Args:
            members: file extension to content, as stored.

        Raises:
            DecodeError: there is no readable content.
            UsageError: a package that reads it is not installed.
        """

    @abstractmethod
    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """A random variant of a decoded sample, of the same shape and type, not in place."""

    def wants(self, extension: str) -> bool:
        """Whether ``decode`` may read the member with this extension."""
        return extension in self.extensions

    def content(self, members: Mapping[str, bytes]) -> bytes:
        """The member to decode, or ``DecodeError``."""
        for extension in self.extensions:
            if extension in members:
                return members[extension]
        held = ", ".join(sorted(members)) or "no member"
        raise DecodeError(f"it holds {held}, but none of {', '.join(self.extensions)}.")


def noise_like(strength: float, like: Tensor, rng: np.random.Generator) -> Tensor:
    """Normal noise of the shape of ``like``."""
    normal = rng.standard_normal(tuple(like.shape), dtype=np.float32)
    return torch.from_numpy(normal * np.float32(strength))
