"""The processors that come with pretrained backbones: their files, and what they make of a sample.

One of the doors of ``transformers``, of its processors alone: what a feature extractor, an image
processor or a tokenizer makes is the tensor that the backbone was trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmkd_scale.errors import UsageError
from cmkd_scale.files import file_digest

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

    def marks_padding(self) -> bool:
        """Whether its backbone wants to know what of a sound is padding."""
        return self.modality == "audio" and bool(
            getattr(self.load(), "return_attention_mask", False)
        )

    def load(self) -> Any:
        """The object of ``transformers``, made once in each process."""
        return _load(self)


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


def pixels(processor: Processor, picture: Image.Image) -> NDArray[np.float32]:
    """What an image processor makes of an RGB picture, [channels, H, W]."""
    found = processor.load()(picture, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(found, dtype=np.float32)


@functools.lru_cache(maxsize=16)
def picture_shape(processor: Processor) -> tuple[int, int, int]:
    """(channels, H, W) of what it makes of any picture.

    Raises:
        UsageError: that depends on the picture.
    """
    shapes = {pixels(processor, Image.new("RGB", size)).shape for size in ((320, 240), (240, 320))}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise UsageError(
            f"The image processor in {processor.directory} makes tensors whose shapes depend on "
            f"the picture ({' and '.join(map(str, sorted(shapes)))}); batches need one shape: give "
            "its preprocessor_config.json a crop or a size with height and width."
        )
    channels, height, width = next(iter(shapes))
    return channels, height, width


def extract(processor: Processor, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n] samples, or the spectrogram."""
    extractor = processor.load()
    found = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
    name = next(key for key in found if key in extractor.model_input_names)
    return np.asarray(found[name][0], dtype=np.float32)


@functools.lru_cache(maxsize=16)
def sound_shape(processor: Processor, seconds: float) -> tuple[tuple[int, ...], int, bool]:
    """Shape of what a clip becomes, its number of axes, and whether all clips become that."""
    extractor = processor.load()
    shapes = [
        extract(processor, np.full(round(part * extractor.sampling_rate), 0.1, np.float32)).shape
        for part in (seconds, 2 * seconds)
    ]
    return shapes[0], len(shapes[0]), shapes[0] == shapes[1]
