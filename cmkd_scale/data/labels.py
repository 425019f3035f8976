"""How the label names and counts of unpaired streams fit together, before anything is trained.

Nothing joins two modalities but their label names, so a name that is spelt in another way is
a class that the teacher cannot teach, and a class that is rare in one stream and common in
the other shifts what is aligned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cmkd_scale.errors import UsageError, did_you_mean

_NAMES_SHOWN = 8
_SMALL_SHIFT = 0.1  # total variation


@dataclass(frozen=True, slots=True)
class LabelReport:
    """Two streams compared: ``here`` learns, ``there`` teaches."""

    here: str
    there: str
    shared: tuple[str, ...]
    """Classes with samples in both."""
    only_here: tuple[str, ...]
    """Classes with samples that the other stream has none of: nothing is taught about them."""
    only_there: tuple[str, ...]
    total_variation: float
    """Half the sum over the shared classes of the differences of their shares, 0 .. 1."""
    kullback_leibler: float
    """sum p log(p / q) over the shared classes, p of here and q of there, in nats."""
    largest_ratio: float
    """Of a class's share here to its share there, or the inverse: 1 where there is no shift."""

    @property
    def fits(self) -> bool:
        """Whether all classes are in both, and their shares nearly equal."""
        return not self.only_here and not self.only_there and self.total_variation <= _SMALL_SHIFT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        known = len(self.shared) + len(self.only_here)
        text = [
            f"labels of {self.here} and {self.there}: {len(self.shared)} of {known} classes are "
            f"in both; label shift {self.total_variation:.3f} (total variation), "
            f"{self.kullback_leibler:.3f} nats, at most {self.largest_ratio:.1f} times"
        ]
        for names, stream in ((self.only_here, self.here), (self.only_there, self.there)):
            if names:
                more = ", ..." if len(names) > _NAMES_SHOWN else ""
                text.append(f"only in {stream}: {', '.join(names[:_NAMES_SHOWN])}{more}")
        return text


def compare_labels(
    here: str, counts_here: Mapping[str, int], there: str, counts_there: Mapping[str, int]
) -> LabelReport:
    """Compare the class counts of two streams by the names of their classes.

    Args:
        here: name of the stream that learns.
        counts_here: its samples by class name.
        there: name of the stream that teaches.
        counts_there: its samples by class name.
    """
    filled_here = {name for name, count in counts_here.items() if count}
    filled_there = {name for name, count in counts_there.items() if count}
    shared = sorted(filled_here & filled_there)
    p = np.array([counts_here[name] for name in shared], dtype=np.float64)
    q = np.array([counts_there[name] for name in shared], dtype=np.float64)
    p, q = p / max(p.sum(), 1), q / max(q.sum(), 1)
    ratio = p / q
    return LabelReport(
        here=here,
        there=there,
        shared=tuple(shared),
        only_here=tuple(sorted(filled_here - filled_there)),
        only_there=tuple(sorted(filled_there - filled_here)),
        total_variation=float(np.abs(p - q).sum() / 2),
        # Rounding takes what is nearly 0 below it.
        kullback_leibler=max(0.0, float((p * np.log(ratio)).sum())),
        largest_ratio=float(np.maximum(ratio, 1 / ratio).max(initial=1.0)),
    )


@dataclass(frozen=True, slots=True)
class LabelMap:
    """From the label names of shards to those of the job."""

    names: tuple[str, ...]
    """Of the job, in the order of their first occurrence in the shards."""
    index: tuple[int, ...]
    """[C of the shards] place of each of their classes in ``names``."""

    @staticmethod
    def make(stored: Sequence[str], renamed: Mapping[str, str]) -> LabelMap:
        """Rename some classes; several may become one.

        Raises:
            UsageError: a name to be changed is not there.
        """
        for name in renamed:
            if name not in stored:
                raise UsageError(
                    f"data.label_map: the shards have no class '{name}'; "
                    f"{did_you_mean(name, stored)}"
                )
        wanted = [renamed.get(name, name) for name in stored]
        names = tuple(dict.fromkeys(wanted))
        return LabelMap(names, tuple(names.index(name) for name in wanted))

    def counts(self, stored: Sequence[int]) -> dict[str, int]:
        """Samples by name of the job."""
        total = dict.fromkeys(self.names, 0)
        for place, count in zip(self.index, stored, strict=True):
            total[self.names[place]] += count
        return total
