"""Augmentation of spectrograms, whoever has made them, and reading them at fractional places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.modality_base import Modality, noise_like


@dataclass(frozen=True, kw_only=True)
class SoundModality(Modality):
    """What spectrograms have in common: their augmentation."""

    shift_time: float = 0.08
    """Largest augmenting shift, as a part of the frames."""
    stretch_time: float = 0.15
    """Largest logarithm of the augmenting stretch in time."""
    shift_mel: float = 0.06
    """Largest augmenting shift along the mel bands, as a part of them: voices differ by one."""
    stretch_mel: float = 0.12
    """Largest logarithm of the augmenting stretch along the mel bands."""
    gain: float = 0.0
    """Standard deviation of an offset to the whole clip, whose own is 1."""
    equalise: float = 0.5
    """Standard deviation of a smooth offset to the mel bands: another channel."""
    noise: float = 0.3
    """Largest standard deviation of augmenting noise."""
    mask_frames: int = 8
    """Longest time mask (SpecAugment: Park et al. 2019, arXiv 1904.08779)."""
    mask_mels: int = 6
    """Widest mask of mel bands."""

    def augment_bands(
        self,
        bands: Tensor,
        rng: np.random.Generator,
        *,
        scale: float = 1.0,
        middle: float = 0.0,
    ) -> Tensor:
        """Shift and stretch both axes, filter, add noise, mask.

        Args:
            bands: [n_mels, frames] float32.
            rng: of all randomness.
            scale: standard deviation of ``bands``.
            middle: what masks are filled with.
        """
        bands_MT: NDArray[np.float32] = bands.numpy()
        u = rng.uniform(-1, 1, 5)
        n_mels, frames = bands_MT.shape
        times = warped(frames, u[0] * self.shift_time, u[1] * self.stretch_time)
        mels = warped(n_mels, u[2] * self.shift_mel, u[3] * self.stretch_mel)
        bands_MT = interpolate(interpolate(bands_MT, times).T, mels).T
        knots = rng.normal(0, 1, 6)
        curve = np.interp(np.linspace(0, 4, n_mels), np.arange(5), knots[:5])
        bands_MT = bands_MT + scale * (self.equalise * curve + self.gain * knots[5])[:, None]
        augmented = torch.from_numpy(bands_MT.astype(np.float32))
        augmented += noise_like(scale * abs(u[4]) * self.noise, bands, rng)
        for axis, widest in ((1, self.mask_frames), (0, self.mask_mels)):
            size = augmented.shape[axis]
            width = int(rng.integers(min(widest, size) + 1))
            start = int(rng.integers(size - width + 1))
            augmented.narrow(axis, start, width).fill_(middle)
        return augmented


def warped(size: int, shift: float, log_stretch: float) -> NDArray[np.float64]:
    """Places to read [size] that shift by a part of ``size`` and stretch about the middle."""
    middle = (size - 1) / 2
    places: NDArray[np.float64] = (np.arange(size) - middle) * np.exp(log_stretch)
    return places + middle + shift * size


def interpolate(bands: NDArray[Any], places: NDArray[np.float64]) -> NDArray[Any]:
    """Read [..., n] at fractional places [m] of the last axis; beyond its ends, the ends."""
    places = places.clip(0, bands.shape[-1] - 1)
    left = places.astype(np.int64)
    right = np.minimum(left + 1, bands.shape[-1] - 1)
    part = (places - left).astype(bands.dtype)
    read: NDArray[Any] = bands[..., left] * (1 - part) + bands[..., right] * part
    return read
