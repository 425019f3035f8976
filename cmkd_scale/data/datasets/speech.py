"""Numbers in synthesised speech: espeak-ng, offline, each clip a pure function of its request.

espeak-ng keeps state from one utterance to the next (pitch flutter, echo, noise) that no
call of its interface resets, so the library is loaded afresh for each utterance, about
6 ms in all: a clip has the same samples whichever clips were made before it, which is what
lets a killed build continue where it stopped.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import threading
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cmkd_scale.data.audio import resample, wav_bytes
from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.data.datasets.writing import number_words
from cmkd_scale.errors import UsageError, did_you_mean

SAMPLE_RATE = 22050
"""Samples a second of everything that espeak-ng returns."""

CLIP_RATE = 8000
"""Samples a second of rendered clips, as in the recordings."""

ACCENTS = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")

VARIANTS = {
    "train": (
        *("m1", "m3", "m5", "m7", "f1", "f3", "f5", "klatt", "klatt3", "adam", "benjamin"),
        *("david", "edward", "Reed", "Denis", "Diogo", "Hugo", "michel", "victor", "anika"),
        *("Gene", "Gene2", "grandma", "grandpa", "Mario", "Michael", "gustave", "quincy"),
        *("robert", "Andy", "AnxiousAndy", "Alex", "Annie", "ed", "pedro", "sandro"),
        *("norbert", "pablo", "john"),
    ),
    "validation": ("Alicia", "Jacky", "linda", "belinda", "aunty", "iven4"),
    "test": (
        *("m2", "m4", "m6", "m8", "f2", "f4", "Andrea", "antonio", "Mike", "max", "paul"),
        *("steph", "steph2", "shelby", "travis"),
    ),
}
"""Speakers of each split. Variants that differ in little but pitch (Gene and Gene2; Diogo,
Hugo and anika; steph and steph2) are in one split; effects (robots, echoes, whispers) in none.
"""

_SPEEDS, _PITCHES, _GAPS = (120, 221), (20, 81), (0, 4)
SNR_DB = (1.0, 16.0)
"""Range of the speech's power over the noise's: synthesised voices are cleaner than any
recording; this is a loud to a quiet room."""

_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: the callback runs inside espeak_Synth
_DONT_EXIT = 0x8000  # report missing voices as a return value instead of exit(1)
_UTF8 = 1
_BY_CHARACTER = 1
_RATE, _PITCH, _WORD_GAP = 1, 3, 7  # espeak_PARAMETER
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_lock = threading.Lock()


class Speech:
    """Renders numbers with the voices of one split.

    42 is said "forty two", 07 "zero seven": words are shared as digits are in pictures.
    """

    def __init__(self, split: str, seed: int) -> None:
        """Choose the voices."""
        self._variants = VARIANTS[split]
        self._names = (seed, split)
        self._words = number_words("en")

    def render(
        self, number: int, rank: int, rng: np.random.Generator
    ) -> tuple[str, bytes, dict[str, JsonValue]]:
        """A WAV at 8 kHz, and how it was spoken."""
        order = keyed_order(len(self._variants), "voices", *self._names, number)
        variant = self._variants[order[rank % len(order)]]
        utterance = Utterance(
            text=self._words[number].replace("-", " "),
            voice=f"{ACCENTS[rng.integers(len(ACCENTS))]}+{variant}",
            speed=int(rng.integers(*_SPEEDS)),
            pitch=int(rng.integers(*_PITCHES)),
            gap=int(rng.integers(*_GAPS)),
            seed=int(rng.integers(2**31)),
        )
        samples = synthesise(utterance).astype(np.float32) / np.float32(32768)
        # Resampling may swing past the loudest sample.
        quieter = resample(np.float32(0.8) * samples, SAMPLE_RATE, CLIP_RATE)
        snr_db = float(rng.uniform(*SNR_DB))
        noisy = add_room_noise(quieter, CLIP_RATE, snr_db, rng)
        spoken = {field.name: getattr(utterance, field.name) for field in fields(utterance)}
        origin = {"speaker": variant, "snr_db": round(snr_db, 2), **spoken}
        return "wav", wav_bytes(noisy, CLIP_RATE), origin


def add_room_noise(
    speech: NDArray[np.float32], rate: int, snr_db: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Add noise whose spectrum falls by 6 dB an octave from 500 Hz on, as that of speech does.

    Args:
        speech: [n] samples.
        rate: samples a second.
        snr_db: power of the speech over that of the noise, in dB.
        rng: source of the noise.

    Returns:
        [n] samples, scaled down where the sum would leave -1 .. 1.
    """
    white = rng.standard_normal(len(speech))
    fall = np.maximum(1.0, np.fft.rfftfreq(len(speech), 1 / rate) / 500.0)
    noise = np.fft.irfft(np.fft.rfft(white) / fall, len(speech))
    power = np.mean(speech.astype(np.float64) ** 2) / np.mean(noise**2)
    mixed = speech + noise * np.sqrt(power * 10 ** (-snr_db / 10))
    scaled: NDArray[np.float32] = mixed / max(1.0, float(np.abs(mixed).max()))
    return scaled.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Utterance:
    """All that decides how a text sounds."""

    text: str
    """What is said, in English unless the voice says otherwise."""
    voice: str
    """Language and variant in espeak-ng's spelling, for example ``en-us+f3``."""
    speed: int = 170
    """Words a minute, 80 to 450."""
    pitch: int = 50
    """0 to 99, relative to the voice."""
    gap: int = 0
    """Extra pause between words, in units of 10 ms at the default speed."""
    seed: int = 0
    """Of the noise in breath and fricatives."""


def synthesise(utterance: Utterance) -> NDArray[np.int16]:
    """Speak one utterance.

    Returns:
        Mono samples at ``SAMPLE_RATE``, [n] int16; equal requests give equal samples.

    Raises:
        UsageError: espeakng-loader is not installed, the voice does not exist, or another
            part of this process keeps espeak-ng loaded.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise UsageError(
            "speech synthesis needs espeak-ng: pip install 'cmkd_scale[numbers]', or give "
            "recordings with --source DIR (for quickstart --fsdd DIR)."
        ) from error
    path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    _check_variant(data, utterance.voice)
    with _lock:
        if _is_loaded(path):
            raise UsageError(
                "espeak-ng is already loaded by another part of this process, so its clips "
                "would not be reproducible: build the shards in a process of their own."
            )
        library = ctypes.CDLL(path)
        try:
            samples = _speak(library, data, utterance)
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
    if not samples.any():
        raise UsageError(f"espeak-ng said nothing for {utterance}: give it a text with words.")
    return samples


def _check_variant(data: str, voice: str) -> None:
    """Refuse an unknown variant: espeak-ng would speak with the plain voice instead."""
    _, _, variant = voice.partition("+")
    variants = os.listdir(os.path.join(data, "voices", "!v"))
    if variant and variant not in variants:
        raise UsageError(
            f"espeak-ng has no variant '{variant}' for the voice '{voice}': "
            f"{did_you_mean(variant, variants)}"
        )


def _is_loaded(path: str) -> bool:
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


def _speak(library: ctypes.CDLL, data: str, utterance: Utterance) -> NDArray[np.int16]:
    """Speak with a library that has not spoken yet."""
    chunks: list[bytes] = []

    def collect(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int | None) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # anything else stops the synthesis

    callback = _CALLBACK(collect)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
    if rate != SAMPLE_RATE:
        raise UsageError(
            f"espeak-ng did not start from {data} (it answered {rate}): reinstall espeakng-loader."
        )
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(utterance.seed))
    ctypes.CDLL(None).srand(ctypes.c_uint(utterance.seed & 0xFFFFFFFF))  # Klatt voices use it
    if library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
        raise UsageError(
            f"espeak-ng has no voice '{utterance.voice}': give LANGUAGE+VARIANT, for example "
            "en-us+f3."
        )
    for parameter, value in (
        (_RATE, utterance.speed),
        (_PITCH, utterance.pitch),
        (_WORD_GAP, utterance.gap),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    text = utterance.text.encode() + b"\0"
    library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, _BY_CHARACTER, 0, _UTF8, None, None)
    return np.frombuffer(b"".join(chunks), dtype=np.int16)
