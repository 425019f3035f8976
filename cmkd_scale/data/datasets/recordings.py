"""Two-digit numbers from recordings of single digits: one speaker says one, then the other.

Reads the tree of the Free Spoken Digit Dataset (Jackson et al., CC BY-SA 4.0):
``{digit}_{speaker}_{index}.wav``. Two speakers are unseen in training; of the others, the
first tenth of the recordings of each digit is for validation.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cmkd_scale.data.audio import read_sound, resample, wav_bytes
from cmkd_scale.data.datasets.keyed import keyed_order
from cmkd_scale.errors import IntegrityError, UsageError

SAMPLE_RATE = 8000
_NAME = re.compile(r"([0-9])_([A-Za-z]+)_([0-9]+)\.wav")
_LONGEST_PAUSE = 0.12  # seconds between the digits
_LONGEST_RECORDING = 30.0  # seconds


def unseen_speakers(speakers: list[str], fold: int) -> tuple[str, str]:
    """The two test speakers of a fold.

    All pairs in the order of a round-robin tournament (the circle method): of six speakers,
    folds 0 to 14 are the 15 pairs, and folds 0-2, 3-5, ... test on each speaker once.
    """
    ring: list[str | None] = [*sorted(speakers)]
    if len(ring) % 2:
        ring.append(None)
    pairs = []
    for _ in range(len(ring) - 1):
        for first, second in zip(ring[: len(ring) // 2], ring[::-1], strict=False):
            if first is not None and second is not None:
                pairs.append((first, second))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return pairs[fold % len(pairs)]


class Recordings:
    """Renders numbers from the recordings of one split."""

    def __init__(self, source: Path, split: str, fold: int, seed: int) -> None:
        """Look which recordings there are.

        Raises:
            UsageError: there are none, or not every digit of three or more speakers.
        """
        directory = source / "recordings" if (source / "recordings").is_dir() else source
        found = _scan(directory)
        speakers = sorted({speaker for speaker, _ in found})
        if len(speakers) < 3:
            raise UsageError(
                f"{source} has recordings of {len(speakers)} speakers; two are kept unseen, so "
                "at least three are needed. Give the directory of the Free Spoken Digit Dataset "
                "(recordings named DIGIT_SPEAKER_INDEX.wav)."
            )
        unseen = unseen_speakers(speakers, fold)
        self.speakers = [name for name in speakers if (name in unseen) == (split == "test")]
        self.fingerprint = _fingerprint(directory, found)
        """Digest of names and sizes of all recordings."""
        self._directory = directory
        self._names = (seed, split)
        self._files: dict[tuple[str, int], list[str]] = {}
        for speaker in self.speakers:
            for digit in range(10):
                files = found.get((speaker, digit), [])
                held_out = -(-len(files) // 10)
                chosen = {
                    "train": files[held_out:],
                    "validation": files[:held_out],
                    "test": files,
                }[split]
                if not chosen:
                    raise UsageError(
                        f"{directory} has too few recordings of '{digit}' by {speaker} "
                        f"({len(files)}): at least two are needed."
                    )
                self._files[speaker, digit] = chosen

    def render(
        self, number: int, rank: int, rng: np.random.Generator
    ) -> tuple[str, bytes, dict[str, JsonValue]]:
        """A WAV at 8 kHz, and the names of its speaker and recordings."""
        order = keyed_order(len(self.speakers), "speakers", *self._names, number)
        speaker = self.speakers[order[rank % len(order)]]
        files = [str(rng.choice(self._files[speaker, digit])) for digit in divmod(number, 10)]
        pause = np.zeros(int(rng.uniform(0, _LONGEST_PAUSE) * SAMPLE_RATE), dtype=np.float32)
        first, second = (_read(self._directory / name) for name in files)
        content = wav_bytes(np.concatenate([first, pause, second]), SAMPLE_RATE)
        names: list[JsonValue] = [*files]
        return "wav", content, {"speaker": speaker, "recordings": names}


def _scan(directory: Path) -> dict[tuple[str, int], list[str]]:
    """(speaker, digit) -> file names in the order of their index."""
    if not directory.is_dir():
        raise UsageError(f"There is no directory {directory}: --source names the recordings.")
    matches = [match for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    found: dict[tuple[str, int], list[str]] = {}
    for match in sorted(matches, key=lambda match: (int(match[3]), match[0])):
        found.setdefault((match[2], int(match[1])), []).append(match[0])
    return found


def _fingerprint(directory: Path, found: dict[tuple[str, int], list[str]]) -> str:
    names = sorted(name for files in found.values() for name in files)
    listing = "\n".join(f"{name} {(directory / name).stat().st_size}" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def _read(path: Path) -> NDArray[np.float32]:
    try:
        samples, rate = read_sound(path.read_bytes(), _LONGEST_RECORDING)
        return resample(samples, rate, SAMPLE_RATE)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"The recording {path} cannot be read: {error}. Download it again, or remove it."
        ) from None
