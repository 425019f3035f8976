"""The open table ``MODALITIES`` of what turns the bytes of a sample into a tensor, and sound.

A modality is a small frozen dataclass of numbers, so that a configuration can set each of
them by name. ``decode`` is deterministic; ``augment`` is for training and takes all its
randomness from the generator it is given.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.audio import read_sound, resample
from cmkd_scale.data.modality_base import DecodeError, Modality
from cmkd_scale.data.modality_features import FeaturesModality
from cmkd_scale.data.modality_image import ImageModality
from cmkd_scale.data.modality_text import TextModality
from cmkd_scale.data.spectrogram import SoundModality, interpolate
from cmkd_scale.errors import UsageError

__all__ = [
    "MODALITIES",
    "AudioModality",
    "DecodeError",
    "FeaturesModality",
    "ImageModality",
    "Modality",
    "TextModality",
]


@dataclass(frozen=True)
class AudioModality(SoundModality):
    """Sounds as log-mel spectrograms: [1, n_mels, frames] float32.

    Silence at both ends is trimmed, the rest stretched to ``frames``; then each mel band has
    mean 0 over the clip (which cancels the channel) and the clip has standard deviation 1.
    """

    sample_rate: int = 8000
    """Hz; other sounds are resampled."""
    n_mels: int = 40
    frames: int = 64
    """Frames of the result."""
    window: int = 256
    """Samples that a frame is computed from."""
    hop: int = 80
    """Samples between frames, before they are stretched."""
    min_hz: float = 40.0
    """Lower end of the lowest mel band; the highest ends at half the sample rate."""
    range_db: float = 80.0
    """What is more below the loudest place of the clip is raised to that."""
    trim_db: float = 35.0
    """Ends this far below the loudest frame are trimmed; 0 keeps them."""
    fit_seconds: float = 0.0
    """0 stretches each clip to ``frames``; otherwise ``frames`` are always that many seconds,
    with the clip padded or cropped on both sides."""
    max_seconds: float = 60.0
    """Longer sounds are refused."""

    extensions: ClassVar[tuple[str, ...]] = ("wav", "flac")
    positive: ClassVar[frozenset[str]] = frozenset(
        {"sample_rate", "n_mels", "frames", "window", "hop", "range_db", "max_seconds"}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, n_mels, frames)."""
        return (1, self.n_mels, self.frames)

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        content = self.content(members)
        try:
            samples, rate = read_sound(content, self.max_seconds)
            samples = resample(samples, rate, self.sample_rate)
        except ValueError as error:
            raise DecodeError(f"{error}.") from None
        bands_MT = self._log_mel(samples)
        bands_MT = np.maximum(bands_MT, bands_MT.max() - self.range_db * _NEPERS_PER_DB)
        if self.trim_db:
            loudness_T = bands_MT.max(axis=0)
            loud = np.flatnonzero(loudness_T > loudness_T.max() - self.trim_db * _NEPERS_PER_DB)
            # Three more frames: consonants at the ends are far softer than vowels.
            bands_MT = bands_MT[:, max(0, loud[0] - 3) : loud[-1] + 4]
        if self.fit_seconds:
            bands_MT = _centred(bands_MT, round(self.fit_seconds * self.sample_rate / self.hop))
        old = bands_MT.shape[1]
        bands_MT = interpolate(bands_MT, (np.arange(self.frames) + 0.5) * old / self.frames - 0.5)
        bands_MT = bands_MT - bands_MT.mean(axis=1, keepdims=True)
        return torch.from_numpy((bands_MT / (bands_MT.std() + 1e-5)).astype(np.float32)[None])

    def _log_mel(self, samples: NDArray[np.float32]) -> NDArray[np.float64]:
        """Natural logarithm of the power in mel bands, [n_mels, T] for T hops of sound.

        What ``transformers.audio_utils.spectrogram`` returns, several times as fast: all frames
        at once instead of a loop.
        """
        filters_MF, window = _mel_filters(self.sample_rate, self.n_mels, self.window, self.min_hz)
        # A frame needs half a window of sound on both sides to mirror.
        missing = max(0, self.window - len(samples))
        sound = np.pad(np.pad(samples, (0, missing)), self.window // 2, mode="reflect")
        frames_TW = np.lib.stride_tricks.sliding_window_view(sound, self.window)[:: self.hop]
        power_TF = np.abs(np.fft.rfft(frames_TW * window, axis=1)) ** 2
        # Not through BLAS: its threads cost more than the work when several processes decode.
        bands_MT: NDArray[np.float64] = np.einsum("mf,tf->mt", filters_MF, power_TF)
        return np.log(np.maximum(1e-10, bands_MT))

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Shift and stretch both axes, filter, add noise, mask."""
        # 0 is the mean of every band.
        return self.augment_bands(inputs[0], rng)[None]


MODALITIES: dict[str, type[Modality]] = {
    "image": ImageModality,
    "audio": AudioModality,
    "text": TextModality,
    "features": FeaturesModality,
}

_NEPERS_PER_DB = np.log(10) / 10  # of power


@functools.lru_cache(maxsize=8)
def _mel_filters(
    sample_rate: int, n_mels: int, window: int, min_hz: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Filters [n_mels, window // 2 + 1] and window [window]."""
    from transformers.audio_utils import mel_filter_bank, window_function

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns of bands that are too narrow
            filters = mel_filter_bank(
                window // 2 + 1, n_mels, min_hz, sample_rate / 2, sample_rate, mel_scale="htk"
            )
    except (ValueError, UserWarning) as error:
        raise UsageError(
            f"AudioModality: {n_mels} mel bands from {min_hz:g} Hz do not fit a window of "
            f"{window} samples at {sample_rate} Hz ({error}); lower n_mels or widen the window."
        ) from None
    return np.ascontiguousarray(filters.T), window_function(window, "hann")


def _centred(bands_MT: NDArray[np.float64], wanted: int) -> NDArray[np.float64]:
    """Crop or pad, with the softest value, to ``wanted`` frames around the middle."""
    wanted = max(1, wanted)
    missing = wanted - bands_MT.shape[1]
    if missing <= 0:
        return bands_MT[:, -missing // 2 : -missing // 2 + wanted]
    ends = (missing // 2, missing - missing // 2)
    return np.pad(bands_MT, ((0, 0), ends), constant_values=bands_MT.min())
