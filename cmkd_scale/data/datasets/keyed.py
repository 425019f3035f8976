"""Randomness that depends on names only, so that sample i can be made alone, in any process."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def keyed_rng(*names: str | int) -> np.random.Generator:
    """A generator whose stream is decided by ``names``: a counter-based one, keyed by SHA-256."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def keyed_order(count: int, *names: str | int) -> NDArray[np.int64]:
    """The permutation [count] that ``names`` decide."""
    return keyed_rng(*names).permutation(count).astype(np.int64)
