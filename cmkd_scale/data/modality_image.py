"""Pictures to tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmkd_scale.data.modality_base import DecodeError, Modality, noise_like
from cmkd_scale.errors import UsageError

_MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class ImageModality(Modality):
    """Pictures: [channels, height, width] float32 in -1 .. 1."""

    height: int = 28
    """Pixels; other pictures are resized, without regard to their proportions."""
    width: int = 56
    channels: int = 1
    """1 grey, 3 RGB."""
    shift_x: float = 0.03
    """Largest augmenting shift, as a part of the width."""
    shift_y: float = 0.05
    """Largest augmenting shift, as a part of the height."""
    zoom: float = 0.08
    """Largest logarithm of the augmenting scale, drawn for each axis."""
    rotation_degrees: float = 6.0
    """Largest augmenting rotation."""
    noise: float = 0.0
    """Standard deviation of augmenting noise, picture values being -1 .. 1."""

    extensions: ClassVar[tuple[str, ...]] = ("png", "jpg", "jpeg", "webp")
    positive: ClassVar[frozenset[str]] = frozenset({"height", "width", "channels"})

    def __post_init__(self) -> None:
        """Refuse impossible options with ``UsageError``."""
        super().__post_init__()
        if self.channels not in (1, 3):
            raise UsageError(f"ImageModality: channels is {self.channels}, not 1 or 3.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        content = self.content(members)
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                picture = image.convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
            raise DecodeError(f"it is not a readable picture ({error}).") from None
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, dtype=np.float32).reshape(self.height, self.width, -1)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Shift, scale, rotate and add noise; what comes in at the border repeats it."""
        angle, log_x, log_y, move_x, move_y = rng.uniform(-1, 1, 5)
        turn = angle * np.deg2rad(self.rotation_degrees)
        aspect = self.height / self.width  # grid coordinates run from -1 to 1 on both axes
        zoom_x, zoom_y = np.exp(log_x * self.zoom), np.exp(log_y * self.zoom)
        matrix = [
            [zoom_x * np.cos(turn), np.sin(turn) * aspect, 2 * move_x * self.shift_x],
            [-np.sin(turn) / aspect, zoom_y * np.cos(turn), 2 * move_y * self.shift_y],
        ]
        grid = F.affine_grid(
            torch.tensor([matrix], dtype=torch.float32), [1, *inputs.shape], align_corners=False
        )
        moved = F.grid_sample(inputs[None], grid, padding_mode="border", align_corners=False)[0]
        return moved + noise_like(self.noise, inputs, rng) if self.noise else moved
