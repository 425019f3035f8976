"""Inputs of pretrained backbones, made by the processors that come with them.

One of the doors of ``transformers``, of its processors alone: what a feature extractor, an image
processor or a tokenizer makes of a sample is the tensor that the backbone was trained on. Sound
is mono at the processor's sample rate, pictures are RGB, texts are UTF-8.
"""

from __future__ import annotations

import functools
import hashlib
import json
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
from cmkd_scale.data.spectrogram import SoundModality, interpolate
from cmkd_scale.errors import UsageError
from cmkd_scale.files import file_digest

PAD_TOKEN = -1
"""Stands behind the end of a text, so that it is no token of any vocabulary."""

_FILES = {
    "image": ("preprocessor_config.json", "processor_config.json"),
    "audio": ("preprocessor_config.json", "processor_config.json"),
    "text": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "spm.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    ),
}


@dataclass(frozen=True)
class Processor:
    """The processor of one modality, in files of the hub's layout."""

    directory: str
    modality: str

    def files(self) -> tuple[str, ...]:
        """Names of those that are there."""
        names = _FILES.get(self.modality, ())
        return tuple(name for name in names if (Path(self.directory) / name).is_file())

    def digest(self) -> str:
        """SHA-256 of the files and their names."""
        found = {name: file_digest(Path(self.directory) / name) for name in self.files()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def make(self, transform: Mapping[str, float | int]) -> Modality:
        """The modality with some of its options set.

        Raises:
            UsageError: the processor cannot be loaded or does not serve here.
        """
        kind: Any = self.kind()
        return cast(Modality, kind(**transform, processor=self))

    def kind(self) -> type[Modality]:
        """Which modality it makes inputs of.

        Raises:
            UsageError: see ``make``.
        """
        if self.modality == "image":
            return ProcessedImage
        if self.modality == "text":
            return ProcessedText
        return WaveformModality if _sound_shape(self, 1.0)[1] == 1 else SpectrogramModality

    def marks_padding(self) -> bool:
        """Whether its backbone wants to know what of a sound is padding."""
        return self.modality == "audio" and bool(
            getattr(self.load(), "return_attention_mask", False)
        )

    def load(self) -> Any:
        """The object of ``transformers``, made once in each process."""
        return _load(self)


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
        return _picture_shape(self.processor)

    def to_tensor(self, picture: Image.Image) -> Tensor:
        """See ``PictureModality``."""
        return torch.from_numpy(_pixels(self.processor, picture.convert("RGB")))


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
                found = _extract(self.processor, samples)
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
        clip: NDArray[np.float32] = inputs[: int(inputs.count_nonzero())].numpy()
        if not len(clip):
            return inputs.clone()
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
        return self.seconds or (0.0 if _sound_shape(self.processor, 1.0)[2] else 5.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, M) or (M, T)."""
        return _sound_shape(self.processor, self.length_seconds or 1.0)[0]

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


@functools.lru_cache(maxsize=16)
def _load(processor: Processor) -> Any:
    import transformers

    kinds = {
        "image": "AutoImageProcessor",
        "audio": "AutoFeatureExtractor",
        "text": "AutoTokenizer",
    }
    if not processor.files():
        raise UsageError(
            f"{processor.directory} holds no processor of {processor.modality} "
            f"({' or '.join(_FILES.get(processor.modality, ('no such modality',))[:2])}), so "
            "inputs cannot be made as its backbone wants them."
        )
    log: Any = transformers.logging
    before = log.get_verbosity()
    log.set_verbosity_error()  # it says that Pillow serves in the place of torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mel bands that are narrow, as they were trained on
            return getattr(transformers, kinds[processor.modality]).from_pretrained(
                processor.directory, local_files_only=True, trust_remote_code=False
            )
    except ImportError as error:
        if processor.modality == "image" and "orchvision" in str(error):
            return _without_torchvision(processor)
        raise UsageError(
            f"The processor in {processor.directory} needs a package that is not installed: "
            f"{_short(error)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"The processor of {processor.modality} in {processor.directory} cannot be loaded "
            f"({_short(error)}). Copy or download its files again."
        ) from None
    finally:
        log.set_verbosity(before)


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder="...")


def _without_torchvision(processor: Processor) -> Any:
    """The same steps by Pillow, for image processors of which transformers has no such version.

    Resizing rounds to 8 bits before it normalises, which the original does not.
    """
    from transformers import ViTImageProcessorPil

    config = json.loads((Path(processor.directory) / processor.files()[0]).read_text())
    names = "do_resize size resample do_rescale rescale_factor do_normalize image_mean image_std"
    options = {name: config[name] for name in names.split() if config.get(name) is not None}
    if config.get("do_center_crop"):
        raise UsageError(
            f"{config.get('image_processor_type')} of {processor.directory} crops pictures and "
            "needs torchvision: install the one that belongs to your torch."
        )
    return ViTImageProcessorPil(**options)


def _pixels(processor: Processor, picture: Image.Image) -> NDArray[np.float32]:
    found = processor.load()(picture, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(found, dtype=np.float32)


@functools.lru_cache(maxsize=16)
def _picture_shape(processor: Processor) -> tuple[int, int, int]:
    shapes = {_pixels(processor, Image.new("RGB", size)).shape for size in ((320, 240), (240, 320))}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise UsageError(
            f"The image processor in {processor.directory} makes tensors whose shapes depend on "
            f"the picture ({' and '.join(map(str, sorted(shapes)))}); batches need one shape: give "
            "its preprocessor_config.json a crop or a size with height and width."
        )
    channels, height, width = next(iter(shapes))
    return channels, height, width


def _extract(processor: Processor, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n] samples, or the spectrogram."""
    extractor = processor.load()
    found = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
    name = next(key for key in found if key in extractor.model_input_names)
    return np.asarray(found[name][0], dtype=np.float32)


@functools.lru_cache(maxsize=16)
def _sound_shape(processor: Processor, seconds: float) -> tuple[tuple[int, ...], int, bool]:
    """Shape of what a clip becomes, its number of axes, and whether all clips become that."""
    extractor = processor.load()
    shapes = [
        _extract(processor, np.full(round(part * extractor.sampling_rate), 0.1, np.float32)).shape
        for part in (seconds, 2 * seconds)
    ]
    return shapes[0], len(shapes[0]), shapes[0] == shapes[1]
