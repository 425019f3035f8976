"""The reference's challenge presets on ``numbers``, made to have an effect.

The released code of Tran et al. 2026 (arXiv 2606.10504) has seven presets of three hardships,
applied to training alone. Each is kept with its strength; how it acts is changed where theirs
does nothing:

- ``marginal``: pools without a common clip. There, a part r of the clips is the student's and the
  rest the teacher's. Here no two modalities share a clip in any case, so the student keeps r of
  its labelled clips and the teacher 1 - r of its pictures.
- ``domain``: noise. There, it has a standard deviation of about 0.2 on log-mels with one of 86,
  and is added on both sides. Here the student's training clips, and nothing else, get room noise
  of 15 - 20 l dB below the speech (9, 5 and -1 dB for levels l of 0.3, 0.5 and 0.8), so that it
  learns in a louder place than it is tested in.
- ``imbalance``: there, only how many distinct clips a class has; labels are drawn uniformly all
  the same. Here a class keeps a part (1 / factor)^(rank / (C - 1)) of its labelled clips, at least
  one, and clips are drawn uniformly, so that the student's label marginal shifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from cmkd_scale.data.audio import read_sound, wav_bytes
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets.keyed import keyed_order, keyed_rng
from cmkd_scale.data.datasets.numbers import Numbers
from cmkd_scale.data.datasets.protocols import Split
from cmkd_scale.data.datasets.speech import add_room_noise
from cmkd_scale.records import Sample
from tools.bench._ablation_shift import cut_down

CLIPS = 10
"""Labelled clips of a class before any of them is taken away; of three, imbalance would leave
one in almost every class."""
_LONGEST = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Preset:
    """Strengths of the three hardships; the defaults are none."""

    marginal: float = 1.0
    """Part r of the clips that the student keeps; below 1, the teacher keeps 1 - r."""
    domain: float = 0.0
    """Level l of the noise."""
    imbalance: float = 1.0
    """Clips of the most frequent class over those of the rarest, before rounding."""


PRESETS = {
    "clean": Preset(),
    "mild": Preset(0.7, 0.3, 5.0),
    "moderate": Preset(0.5, 0.5, 10.0),
    "hard": Preset(0.3, 0.8, 50.0),
    "marginal_only": Preset(marginal=0.5),
    "domain_only": Preset(domain=0.5),
    "imbalance_only": Preset(imbalance=10.0),
}


def clips_kept(preset: Preset, classes: int, seed: int) -> list[int]:
    """Labelled clips of each class; which classes are rare is an order of the seed's."""
    pool = max(1.0, float(np.rint(CLIPS * preset.marginal)))
    rank = keyed_order(classes, "challenge imbalance", seed)
    share = (1.0 / preset.imbalance) ** (rank / max(1, classes - 1))
    kept: list[int] = np.maximum(1, np.rint(pool * share)).astype(int).tolist()
    return kept


def pictures_kept(preset: Preset, count: int) -> int:
    """Pictures a class that the teacher learns from, out of ``count``."""
    return count if preset.marginal == 1.0 else max(1, round(count * (1.0 - preset.marginal)))


def snr_db(preset: Preset) -> float | None:
    """Power of the speech over that of the added noise, in dB; None: nothing is added."""
    return 15.0 - 20.0 * preset.domain if preset.domain > 0 else None


@dataclass(frozen=True, slots=True)
class NoisySplit:
    """A split of speech with room noise; the noise of a clip depends on its key alone."""

    whole: Split
    snr_db: float
    options: Mapping[str, JsonValue]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.label_names

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.whole)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``, louder around it."""
        sample = self.whole[i]
        speech, rate = read_sound(sample.members["wav"], _LONGEST)
        noisy = add_room_noise(speech, rate, self.snr_db, keyed_rng("challenge", sample.key))
        return replace(sample, members={**sample.members, "wav": wav_bytes(noisy, rate)})


@dataclass(frozen=True, slots=True)
class ChallengeNumbers:
    """Speech of ``numbers``, its training split made harder; validation and test as they were."""

    source: Path | None
    options: Mapping[str, int]
    """Of ``Numbers``; at least ``CLIPS`` training samples a class."""
    preset: Preset
    seed: int

    name = "numbers-challenge"
    modalities = ("audio",)
    splits = Numbers.splits

    def open(self, modality: str, split: str) -> Split:
        """See ``Numbers``."""
        options = {key: str(value) for key, value in self.options.items()}
        whole = Numbers(self.source, options).open(modality, split)
        if split != "train":
            return whole
        kept = clips_kept(self.preset, len(whole.label_names), self.seed)
        recorded: dict[str, JsonValue] = {
            "challenge": [self.preset.marginal, self.preset.domain, self.preset.imbalance],
            "challenge_seed": self.seed,
        }
        part = cut_down(whole, kept, recorded)
        level = snr_db(self.preset)
        return part if level is None else NoisySplit(part, level, part.options)


def build_challenge(
    root: Path, source: Path | None, counts: Mapping[str, int], preset: Preset, seed: int
) -> Path:
    """Shards of a preset for one seed and fold, built on first use; returns their directory."""
    options = {**counts, "train_per_class": CLIPS}
    if source is not None:
        options["fold"] = seed
    dataset = ChallengeNumbers(source, options, preset, seed)
    for split in dataset.splits:
        build(dataset, root, modality="audio", split=split, samples_per_shard=1000)
    return root / "audio"
