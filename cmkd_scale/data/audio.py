"""Sound files in memory: read, resample, write."""

from __future__ import annotations

import io
import wave

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.errors import UsageError

_BLOCK = 1 << 20  # numbers to decode at a time
_INSTALL = "pip install 'cmkd_scale[audio]'"


def read_sound(content: bytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Decode WAV, FLAC or what else libsndfile reads.

    Returns:
        Samples [n] in -1 .. 1, channels averaged, and the number of them in a second.

    Raises:
        ValueError: no sound, or one of no or too many samples; says what is wrong.
        UsageError: soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise UsageError(f"Reading sound needs soundfile: {_INSTALL}.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            # Before the samples are decoded: a few bytes of FLAC may claim hours.
            if not 0 < file.frames <= max_seconds * file.samplerate:
                seconds = file.frames / file.samplerate
                raise ValueError(f"it lasts {seconds:g} s; at most {max_seconds:g} s are read")
            # In blocks: room for all that the header claims could be gigabytes.
            size, blocks = max(1, _BLOCK // file.channels), []
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
                if len(block) < size:
                    break
            rate = int(file.samplerate)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"it is not a sound file ({error.error_string})") from None
    except soundfile.SoundFileError as error:
        raise ValueError(f"it is not a sound file ({error})") from None
    mono: NDArray[np.float32] = np.concatenate([np.zeros(0, np.float32), *blocks])
    if not len(mono) or not np.isfinite(mono).all():
        raise ValueError("it holds no samples, or some that are not numbers")
    return mono, rate


def resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Change the sample rate; [n] -> [about n * wanted / rate].

    Raises:
        ValueError: what comes out is beyond float32.
        UsageError: soxr is not installed.
    """
    if rate == wanted:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise UsageError(f"Changing the sample rate needs soxr: {_INSTALL}.") from error
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, wanted)
    if not np.isfinite(resampled).all():
        raise ValueError("it is too loud to be resampled")
    return resampled


def wav_bytes(samples: NDArray[np.float32], rate: int) -> bytes:
    """16-bit mono WAV of samples [n] in -1 .. 1; what lies outside is clipped."""
    pcm = np.clip(np.rint(samples * 32767.0), -32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()
