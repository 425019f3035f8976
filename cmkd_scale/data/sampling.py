"""Which samples an epoch holds: all or a few a class, as they come or balanced over classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.order import Ints, mix64, permutation, stable_hash
from cmkd_scale.errors import UsageError

Sampling = Literal["natural", "square_root", "balanced"]
Labels = Literal["labelled", "unlabelled", "all"]

_EXPONENT = {"square_root": 0.5, "balanced": 0.0}


class Natural:
    """Every chosen sample once an epoch."""

    def __init__(self, samples: int, subset: Ints | None = None, *, name: str = "all") -> None:
        """Choose places ``subset`` (ascending), or all ``samples`` of a split."""
        self.name = f"natural {name}"
        self.samples = samples if subset is None else len(subset)
        self._subset = None if self.samples == samples else subset

    def places(self, epoch: int) -> Ints | None:
        """See ``order.Draw``."""
        return self._subset


class Weighted:
    """As many samples of a class as its count to a power gives, of all classes as many as before.

    Exponent 0 draws all classes equally often, 0.5 is square-root sampling (Mahajan et al.
    2018, arXiv 1805.00932). A class that is drawn more often than it has samples repeats all
    of them equally often, up to one; one that is drawn less often goes on in the next epoch
    where it stopped. So after E epochs, the samples of a class have been read equally often,
    up to one.
    """

    def __init__(
        self, subset: Ints, labels: NDArray[np.int32], *, sampling: Sampling, seed: int, name: str
    ) -> None:
        """Choose among labelled places.

        Args:
            subset: [N] places, ascending.
            labels: [N] their classes.
            sampling: "square_root" or "balanced".
            seed: decides which samples of a class are read first.
            name: how ``subset`` was chosen.
        """
        self.name = f"{sampling} {name}"
        self.samples = len(subset)
        counts = np.bincount(labels)
        self._counts = counts[labels]
        self._quota = quotas(counts, _EXPONENT[sampling])[labels]
        self._subset = subset
        # Where each sample stands in its class, in an order of the seed's.
        shuffled = np.argsort(permutation(len(subset), seed, _CLASS_ORDER))
        order = np.lexsort((shuffled, labels))
        starts = (np.cumsum(counts) - counts)[labels[order]]
        self._rank = np.empty(len(subset), dtype=np.int64)
        self._rank[order] = np.arange(len(subset)) - starts

    def places(self, epoch: int) -> Ints:
        """See ``order.Draw``; a place may occur several times in a row."""
        every, extra = np.divmod(self._quota, self._counts)
        turn = (self._rank - epoch * extra) % self._counts
        return np.repeat(self._subset, every + (turn < extra))


_CLASS_ORDER = 0x636C617373  # sets this permutation apart from those of epochs


def quotas(counts: Ints, exponent: float) -> Ints:
    """How often each class is drawn: in proportion to count^exponent, in sum as often as before.

    Largest remainders; ties go to the earlier class. A class without samples is never drawn.
    """
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
    shares = weights * (counts.sum() / weights.sum())
    whole: Ints = np.floor(shares).astype(np.int64)
    missing = int(counts.sum() - whole.sum())
    order = np.argsort(whole - shares, kind="stable")
    whole[order[:missing]] += 1
    return whole


def at_most(
    labels: NDArray[np.int32], places: NDArray[np.int64], most: int, seed: int
) -> NDArray[np.int64]:
    """``most`` of the ``places`` of each class, or all that it has; ascending.

    Args:
        labels: [N] of a split.
        places: [n] labelled samples of it, ascending.
        most: of a class.
        seed: of the choice.
    """
    shuffled = places[permutation(len(places), seed)]
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(order)) - first < most])


def choose(
    labels: NDArray[np.int32],
    *,
    classes: int,
    which: Labels = "labelled",
    n_per_class: int | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Places to read, ascending.

    The choice of ``n_per_class`` samples is by a hash of each sample's place, keyed by
    ``seed``; with a growing ``n_per_class`` the subsets are nested.

    Args:
        labels: [N] of a split.
        classes: number of classes C.
        which: samples with a label, those without one, or all.
        n_per_class: so many labelled samples of each class; None takes all.
        seed: of the choice.

    Raises:
        UsageError: a class has fewer than ``n_per_class`` samples, or nothing is chosen.
    """
    if which != "labelled" and n_per_class is not None:
        raise UsageError("data.n_per_class counts labelled samples: leave it unset, or read those.")
    places = np.flatnonzero(
        {"labelled": labels >= 0, "unlabelled": labels < 0, "all": labels >= -1}[which]
    )
    if len(places) == 0:
        lack = {"labelled": "No sample has a label, and training needs labels."}
        raise UsageError(f"This split is empty. {lack.get(which, f'Nothing in it is {which}.')}")
    if n_per_class is None:
        return places
    counts = np.bincount(labels[places], minlength=classes)
    short = np.flatnonzero(counts < n_per_class)
    if len(short):
        remedy = f"Choose at most {counts.min()} or build more." if counts.min() else "Build more."
        raise UsageError(
            f"data.n_per_class={n_per_class}, but {len(short)} of {classes} classes have fewer "
            f"labelled samples (class index {short[0]} has {counts[short[0]]}). {remedy}"
        )
    rank = mix64(places.astype(np.uint64) ^ np.uint64(stable_hash(seed)))
    order = np.lexsort((rank, labels[places]))
    by_class = places[order]
    starts = np.cumsum(counts) - counts
    place_in_class = np.arange(len(by_class)) - starts[labels[by_class]]
    chosen: NDArray[np.int64] = np.sort(by_class[place_in_class < n_per_class])
    return chosen


def draw_from(
    labels: NDArray[np.int32],
    *,
    classes: int,
    sampling: Sampling,
    which: Labels = "labelled",
    n_per_class: int | None = None,
    seed: int = 0,
) -> Natural | Weighted:
    """What an epoch holds; see ``choose`` and ``Weighted``.

    Raises:
        UsageError: classes are to be balanced among samples without labels; see ``choose``.
    """
    subset = choose(labels, classes=classes, which=which, n_per_class=n_per_class, seed=seed)
    name = which if n_per_class is None else f"{n_per_class} a class"
    if sampling == "natural":
        return Natural(len(labels), subset, name=name)
    if which != "labelled":
        raise UsageError(
            f"Sampling '{sampling}' goes by labels, and {which} samples are asked for."
        )
    return Weighted(subset, labels[subset], sampling=sampling, seed=seed, name=name)
