"""Pictures to tensors."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cmkd_scale.data.modality_base import DecodeError, Modality, noise_like
from cmkd_scale.errors import UsageError

try:
    import simplejpeg as _simplejpeg
except ImportError:
    _simplejpeg = None

_MAX_PIXELS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class PictureModality(Modality):
    """What pictures have in common, however one of them becomes a tensor [channels, H, W]."""

    frames: int = 1
    """Pictures of a sample: above 1, that many of its members ``000.jpg``, ``001.jpg``, ...,
    evenly spaced; each one is augmented alike."""
    shift_x: float = 0.03
    """Largest augmenting shift, as a part of the width."""
    shift_y: float = 0.05
    """Largest augmenting shift, as a part of the height."""
    zoom: float = 0.08
    """Largest logarithm of the augmenting scale, drawn for each axis."""
    rotation_degrees: float = 6.0
    """Largest augmenting rotation."""
    noise: float = 0.0
    """Standard deviation of augmenting noise, in the units of the tensor."""

    extensions: ClassVar[tuple[str, ...]] = ("png", "jpg", "jpeg", "webp")
    positive: ClassVar[frozenset[str]] = frozenset({"frames"})

    @property
    @abstractmethod
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one picture."""

    @abstractmethod
    def to_tensor(self, picture: Image.Image) -> Tensor:
        """One picture, of 8 bits a channel, as [channels, height, width] float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width), with ``frames`` in front if there are several."""
        return self.picture_shape if self.frames == 1 else (self.frames, *self.picture_shape)

    def wants(self, extension: str) -> bool:
        """Pictures, with or without a number in front."""
        return extension.rpartition(".")[2] in self.extensions

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        numbered = sorted(
            (name for name in members if "." in name and self.wants(name)), key=_number
        )
        if self.frames == 1 and not numbered:
            return self.to_tensor(_open(self.content(members)))
        if not numbered:
            raise DecodeError(f"it holds no frames, and data.transform.frames={self.frames}.")
        # Middles of equal parts; a shorter row of frames repeats some.
        chosen = (np.arange(self.frames) + 0.5) * len(numbered) / self.frames
        pictures = [self.to_tensor(_open(members[numbered[int(place)]])) for place in chosen]
        return pictures[0] if self.frames == 1 else torch.stack(pictures)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Shift, scale, rotate and add noise; what comes in at the border repeats it."""
        angle, log_x, log_y, move_x, move_y = rng.uniform(-1, 1, 5)
        turn = angle * np.deg2rad(self.rotation_degrees)
        height, width = inputs.shape[-2:]
        aspect = height / width  # grid coordinates run from -1 to 1 on both axes
        zoom_x, zoom_y = np.exp(log_x * self.zoom), np.exp(log_y * self.zoom)
        matrix = [
            [zoom_x * np.cos(turn), np.sin(turn) * aspect, 2 * move_x * self.shift_x],
            [-np.sin(turn) / aspect, zoom_y * np.cos(turn), 2 * move_y * self.shift_y],
        ]
        size = [1, inputs[..., 0, 0].numel(), height, width]  # all frames move alike
        grid = F.affine_grid(torch.tensor([matrix], dtype=torch.float32), size, align_corners=False)
        moved = F.grid_sample(
            inputs.reshape(size), grid, padding_mode="border", align_corners=False
        ).reshape(inputs.shape)
        return moved + noise_like(self.noise, inputs, rng) if self.noise else moved


@dataclass(frozen=True)
class ImageModality(PictureModality):
    """Pictures: [channels, height, width] float32 in -1 .. 1; several of them, with a first
    axis of ``frames``."""

    height: int = 28
    """Pixels; other pictures are resized, without regard to their proportions."""
    width: int = 56
    channels: int = 1
    """1 grey, 3 RGB."""

    positive: ClassVar[frozenset[str]] = frozenset({"height", "width", "channels", "frames"})

    def __post_init__(self) -> None:
        """Refuse impossible options with ``UsageError``."""
        super().__post_init__()
        if self.channels not in (1, 3):
            raise UsageError(f"ImageModality: channels is {self.channels}, not 1 or 3.")

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)

    def to_tensor(self, picture: Image.Image) -> Tensor:
        """See ``PictureModality``."""
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BILINEAR)
        array = np.asarray(picture, dtype=np.float32).reshape(self.height, self.width, -1)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)) / 127.5 - 1)


def _open(content: bytes) -> Image.Image:
    pixels = _read_jpeg(content) if content[:2] == b"\xff\xd8" else None
    picture = _read_any(content) if pixels is None else Image.fromarray(pixels)
    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        wide = np.asarray(picture, dtype=np.int64).clip(0, 65535)
        picture = Image.fromarray((wide // 257).astype(np.uint8))
    return picture


def _read_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """RGB pixels [height, width, 3] by simplejpeg, several times as fast as Pillow on small
    pictures and equal to its pixels; None where the file is left to Pillow."""
    if _simplejpeg is None:
        return None
    try:
        height, width, colours, _ = _simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        if colours in ("CMYK", "YCCK"):  # converted in another way than by Pillow
            return None
        pixels: NDArray[np.uint8] = _simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:
        return None
    return pixels


def _read_any(content: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            _check_size(*image.size)
            image.load()
            image.info.pop("transparency", None)  # not used, and Pillow would warn of some kinds
            return image
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("it is not a PNG, JPEG or WebP picture.") from None
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
        raise DecodeError(f"it is not a readable picture ({error}).") from None


def _check_size(width: int, height: int) -> None:
    """Before anything is decoded: a few bytes may claim gigabytes of pixels."""
    if width * height > _MAX_PIXELS:
        raise DecodeError(f"it is not a readable picture ({width} x {height} pixels are too many).")


def _number(extension: str) -> int:
    """Of a frame: 7 for ``007.jpg``."""
    return int(extension.partition(".")[0])
