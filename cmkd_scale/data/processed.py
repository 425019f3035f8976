"""What pretrained backbones read: pictures, sounds and texts as their own processors make them.

Sound is mono at the processor's sample rate, pictures are RGB, texts are UTF-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmkd_scale.data.audio import read_sound, resample
from cmkd_scale.data.modality_base import DecodeError, Modality, noise_like
from cmkd_scale.data.modality_image import PictureModality
from cmkd_scale.data.modality_text import read_text
from cmkd_scale.data.processors import Processor, extract, picture_shape, pixels, sound_shape
from cmkd_scale.data.spectrogram import SoundModality, interpolate
from cmkd_scale.errors import UsageError

PAD_TOKEN = -1
"""Stands behind the end of a text, so that it is no token of any vocabulary."""


def kind_of(processor: Processor) -> type[Modality]:
    """Which modality a processor makes inputs of.

    Raises:
        UsageError: it cannot be loaded or does not serve here.
    """
    if processor.modality == "image":
        return ProcessedImage
    if processor.modality == "text":
        return ProcessedText
    return WaveformModality if sound_shape(processor, 1.0)[1] == 1 else SpectrogramModality


def processed(processor: Processor, transform: Mapping[str, float | int]) -> Modality:
    """That modality with some of its options set.

    Raises:
        UsageError: see ``kind_of``.
    """
    kind: Any = kind_of(processor)
    return cast(Modality, kind(**transform, processor=processor))


@dataclass(frozen=True, kw_only=True)
class _Processed(Modality):
    processor: Processor
    """Files that come with the backbone."""

    def identity(self) -> dict[str, Any]:
        """See ``Modality``: the processor's files stand for it, wherever they lie."""
        return {**super().identity(), "processor": self.processor.digest()}


@dataclass(frozen=True, kw_only=True)
class ProcessedImage(_Processed, PictureModality):
    """Pictures as the image processor makes them: [channels, H, W] float32."""

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, H, W)."""
        return picture_shape(self.processor)

    def to_tensor(self, picture: Image.Image) -> Tensor:
        """See ``PictureModality``."""
        return torch.from_numpy(pixels(self.processor, picture.convert("RGB")))


@dataclass(frozen=True, kw_only=True)
class _Sound(_Processed):
    seconds: float = 0.0
    """Longer clips are cropped on both sides; 0: what the processor takes, or 5."""
    max_seconds: float = 60.0
    """Longer sounds are refused."""

    extensions: ClassVar[tuple[str, ...]] = ("wav", "flac")
    positive: ClassVar[frozenset[str]] = frozenset({"max_seconds"})

    def _extracted(self, members: Mapping[str, bytes]) -> NDArray[np.float32]:
        wanted = int(self.processor.load().sampling_rate)
        try:
            samples, rate = read_sound(self.content(members), self.max_seconds)
            samples = resample(samples, rate, wanted)
        except ValueError as error:
            raise DecodeError(f"{error}.") from None
        most = round(self.length_seconds * wanted)
        if most and len(samples) > most:
            begin = (len(samples) - most) // 2
            samples = samples[begin : begin + most]
        try:
            with np.errstate(all="ignore"):  # the result is looked at instead
                found = extract(self.processor, samples)
        except ValueError as error:  # as of a sound that is shorter than one window
            raise DecodeError(f"its feature extractor refuses it ({error}).") from None
        if not np.isfinite(found).all():
            raise DecodeError("it is too loud for its feature extractor.")
        return found

    @property
    def length_seconds(self) -> float:
        """Of what is read of a clip; 0: all."""
        return self.seconds

    def identity(self) -> dict[str, Any]:
        """See ``Modality``."""
        return {**super().identity(), "seconds": self.length_seconds}


@dataclass(frozen=True, kw_only=True)
class WaveformModality(_Sound):
    """Sound as samples: [seconds * sampling rate] float32, exactly 0 behind the clip's end."""

    shift_time: float = 0.1
    """Largest augmenting shift, as a part of the length."""
    stretch_time: float = 0.1
    """Largest logarithm of the augmenting change of speed."""
    noise: float = 0.1
    """Largest standard deviation of augmenting noise; the clip's is about 1."""
    mask_seconds: float = 0.1
    """Longest part that augmentation silences."""

    @property
    def length_seconds(self) -> float:
        """Of what is read of a clip."""
        return self.seconds or 5.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(samples,)."""
        return (round(self.length_seconds * self.processor.load().sampling_rate),)

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        samples = self._extracted(members)
        padded = np.zeros(self.shape, np.float32)
        padded[: len(samples)] = samples[: len(padded)]
        return torch.from_numpy(padded)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Change the speed, shift, add noise, silence a part."""
        u = rng.uniform(-1, 1, 3)
        size = len(inputs)
        heard_at = inputs.nonzero()
        if not len(heard_at):
            return inputs.clone()
        clip: NDArray[np.float32] = inputs[: int(heard_at[-1]) + 1].numpy()
        faster = round(len(clip) * np.exp(u[0] * self.stretch_time))
        places = (np.arange(max(1, faster)) + 0.5) * len(clip) / max(1, faster) - 0.5
        clip = interpolate(clip, places)
        begin = max(0, round(u[1] * self.shift_time * size))
        clip = np.concatenate([np.zeros(begin, np.float32), clip])[:size].astype(np.float32)
        heard = torch.from_numpy(clip)
        heard = heard + noise_like(abs(u[2]) * self.noise, heard, rng)
        widest = min(len(heard), round(self.mask_seconds * self.processor.load().sampling_rate))
        width = int(rng.integers(widest + 1))
        start = int(rng.integers(len(heard) - width + 1))
        heard[start : start + width] = 0.0
        augmented = torch.zeros_like(inputs)
        augmented[: len(heard)] = heard
        return augmented


@dataclass(frozen=True, kw_only=True)
class SpectrogramModality(_Sound, SoundModality):
    """Sound as the feature extractor's spectrogram: [T, M] or [M, T] float32, whichever it has;
    where it has no length of its own, exactly 0 behind the clip's end."""

    mask_frames: int = 40
    """Longest time mask (SpecAugment: Park et al. 2019, arXiv 1904.08779)."""
    mask_mels: int = 20
    """Widest mask of mel bands."""

    @property
    def length_seconds(self) -> float:
        """Of what is read of a clip; 0: all."""
        return self.seconds or (0.0 if sound_shape(self.processor, 1.0)[2] else 5.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, M) or (M, T)."""
        return sound_shape(self.processor, self.length_seconds or 1.0)[0]

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        bands = self._extracted(members)
        padded = np.zeros(self.shape, np.float32)
        padded[: bands.shape[0], : bands.shape[1]] = bands[: padded.shape[0], : padded.shape[1]]
        return torch.from_numpy(padded)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """See ``SoundModality``; in units of the clip's own standard deviation."""
        time_first = inputs.shape[0] > inputs.shape[1]
        bands = inputs.T if time_first else inputs
        scale, middle = float(inputs.std()), float(inputs.mean())
        augmented = self.augment_bands(bands, rng, scale=scale, middle=middle)
        return (augmented.T if time_first else augmented).contiguous()


@dataclass(frozen=True, kw_only=True)
class ProcessedText(_Processed):
    """Texts as the tokenizer's numbers: [max_tokens] int64, ``PAD_TOKEN`` behind the end."""

    max_tokens: int = 64
    """Longer texts are cut."""
    drop: float = 0.03
    """Augmenting probability of each token to be left out."""
    substitute: float = 0.03
    """Augmenting probability of each token to become another one of the same text."""

    extensions: ClassVar[tuple[str, ...]] = ("txt",)
    positive: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    def __post_init__(self) -> None:
        """Refuse impossible options with ``UsageError``."""
        super().__post_init__()
        special = self.processor.load().num_special_tokens_to_add()
        if self.max_tokens <= special:
            raise UsageError(
                f"data.transform.max_tokens is {self.max_tokens}, and the tokenizer adds {special} "
                "of its own to each text: nothing of the text would be left."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(max_tokens,)."""
        return (self.max_tokens,)

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        text = read_text(self.content(members))
        found = self.processor.load()(text, truncation=True, max_length=self.max_tokens)
        tokens = torch.full((self.max_tokens,), PAD_TOKEN, dtype=torch.int64)
        numbers = torch.tensor(found["input_ids"], dtype=torch.int64)
        tokens[: len(numbers)] = numbers
        return tokens

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Replace and leave out tokens; special ones stay, and one other at least."""
        text = inputs.numpy()[: int((inputs != PAD_TOKEN).sum())]
        special = np.isin(text, self.processor.load().all_special_ids)
        words = np.flatnonzero(~special)
        if not len(words):
            return inputs.clone()
        chance = rng.random((2, len(text)))
        others = text[words[rng.integers(len(words), size=len(text))]]
        changed = np.where((chance[0] < self.substitute) & ~special, others, text)
        kept = special | (chance[1] >= self.drop)
        kept[words[0]] |= not kept[words].any()
        tokens = torch.full_like(inputs, PAD_TOKEN)
        tokens[: int(kept.sum())] = torch.from_numpy(changed[kept])
        return tokens
