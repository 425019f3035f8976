"""Building prototypes by k-means, and searching among them.

    python tools/bench/memory.py [--quick] [--json FILE]

One process, one thread, float32. A ratio is the median over rounds of a variant's time divided
by the first row's in the same round; a row ``... again`` is A against A, the noise.

Build: 100 classes of 1000 samples, 256 wide, 16 prototypes each (``--quick``: 20 classes), for
four kinds of classes. The first row is a loop of ``faiss.Kmeans`` over the classes, from random
starts, with the assignment at the end. ``distortion`` is the sum of squared distances, recomputed
in float64, in units of scikit-learn's from one k-means++ start.

Search: the 64 best of J prototypes, 128 wide, in groups of 16, for 64 samples near the groups.
The first row is torch's product and top-k. ``recall`` is the share of those 64 that are found,
``mass`` the share of their softmax mass, at a temperature of 0.1 of the mean squared distance
to the best.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.memory.prototypes import PrototypeIndex, cluster
from tools.bench._bench import Goal, Rows, finish, measure, parse, print_rows

Floats = NDArray[np.float32]
Centres = Callable[[Floats], Floats]

SAMPLES, WIDTH, PROTOTYPES = 1000, 256, 16
DIM, BATCH, BEST, GROUP = 128, 64, 64, 16
SIZES = [1000, 10_000, 100_000, 1_000_000]


# ------------------------------------------------------------------------- build


def gaussian(rng: np.random.Generator) -> NDArray[np.float64]:
    """No structure at all."""
    return rng.standard_normal((SAMPLES, WIDTH))


def blobs(rng: np.random.Generator) -> NDArray[np.float64]:
    """5 to 16 separate round clusters."""
    places = rng.standard_normal((rng.integers(5, 17), WIDTH))
    return places[rng.integers(len(places), size=SAMPLES)] + 0.5 * gaussian(rng)


def anisotropic(rng: np.random.Generator) -> NDArray[np.float64]:
    """8 clusters, wider in some directions than in others."""
    places, widths = 2.0 * gaussian(rng)[:8], 0.5 * np.exp(gaussian(rng)[:8])
    own, other = rng.integers(8, size=(2, SAMPLES))
    points: NDArray[np.float64] = places[own] + widths[other] * gaussian(rng)
    return points


def manifold(rng: np.random.Generator) -> NDArray[np.float64]:
    """A folded sheet of three dimensions, with a little noise."""
    sheet = rng.random((SAMPLES, 3)) @ (2.0 * gaussian(rng)[:3])
    points: NDArray[np.float64] = np.sin(sheet + 6.0 * rng.random(WIDTH)) + 0.05 * gaussian(rng)
    return points


KINDS = {"gaussian": gaussian, "blobs": blobs, "anisotropic": anisotropic, "manifold": manifold}


def faiss_centres(points: Floats) -> Floats:
    """What a plain use of FAISS does."""
    kmeans = faiss.Kmeans(WIDTH, PROTOTYPES, niter=25, min_points_per_centroid=1, seed=0)
    kmeans.train(points)
    kmeans.index.search(points, 1)
    return np.asarray(kmeans.centroids)


def our_centres(points: Floats) -> Floats:
    """Ours."""
    return cluster(points, PROTOTYPES, seed=0).centres


def sklearn_centres(points: Floats) -> Floats:
    """One start by k-means++; its labels are the assignment."""
    found = KMeans(PROTOTYPES, init="k-means++", n_init=1, random_state=0).fit(points)
    centres: Floats = found.cluster_centers_
    return centres


BUILDERS: dict[str, Centres] = {
    "faiss loop": faiss_centres,
    "faiss loop again": faiss_centres,
    "ours": our_centres,
    "scikit-learn": sklearn_centres,
}


def distortion(points: Floats, centres: Floats) -> float:
    """Sum of squared distances to the nearest centre."""
    distances = torch.cdist(
        torch.from_numpy(points).double(), torch.from_numpy(np.asarray(centres)).double()
    )
    return float(distances.min(1).values.square().sum())


def measure_build(kind: str, quick: bool) -> Rows:
    """Times and distortions on classes of one kind."""
    make = KINDS[kind]
    classes = [
        make(np.random.default_rng(seed)).astype(np.float32) for seed in range(20 if quick else 100)
    ]

    def build(centres_of: Centres) -> None:
        for points in classes:
            centres_of(points)

    variants = {name: partial(build, centres_of) for name, centres_of in BUILDERS.items()}
    rows = measure(variants, rounds=5 if quick else 7)
    totals = {
        name: sum(distortion(points, centres_of(points)) for points in classes)
        for name, centres_of in BUILDERS.items()
    }
    for name, row in rows.items():
        row["distortion"] = totals[name] / totals["scikit-learn"]
    return rows


def report_build(quick: bool) -> tuple[dict[str, Rows], list[Goal]]:
    """Tables of all kinds, and the goals: means over kinds."""
    tables = {}
    for kind in KINDS:
        tables[f"build, {kind}"] = rows = measure_build(kind, quick)
        print_rows(rows, title=f"build, {kind}")
        print_column(rows, "distortion")
    ours = [rows["ours"] for rows in tables.values()]
    return tables, [
        Goal("build, of the faiss loop, mean", float(np.mean([row["ratio"] for row in ours])), 1.0),
        Goal(
            "distortion, of scikit-learn's, mean",
            float(np.mean([row["distortion"] for row in ours])),
            1.01,
        ),
    ]


# ------------------------------------------------------------------------ search


def measure_search(prototypes: int, quick: bool) -> Rows:
    """Times and recall among ``prototypes`` prototypes."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(-(-prototypes // GROUP), DIM, generator=generator)
    rows_JD = groups.repeat_interleave(GROUP, 0)[:prototypes]
    rows_JD = rows_JD + 0.5 * torch.randn(prototypes, DIM, generator=generator)
    potentials = 0.1 * torch.randn(prototypes, generator=generator)
    near = groups[torch.randint(len(groups), (BATCH,), generator=generator)]
    samples = near + 0.7 * torch.randn(BATCH, DIM, generator=generator)
    bias = potentials - rows_JD.square().sum(1)

    def dense() -> tuple[Tensor, Tensor]:
        found = torch.addmm(bias, samples, rows_JD.T, alpha=2.0).topk(BEST)
        return found.values, found.indices

    variants: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "torch product and top-k": dense,
        "torch product and top-k again": dense,
    }
    probes = [0, 8, 32, 128]
    for nprobe in probes:
        nlist = 2 * int(prototypes**0.5) if nprobe else 0
        if nprobe <= nlist:
            index = PrototypeIndex(rows_JD, nlist=nlist, nprobe=nprobe)
            index.refresh(potentials)
            name = f"{nlist} lists, {nprobe} read" if nprobe else "flat"
            variants[name] = partial(index.search, samples, BEST)
    rows = measure(variants, rounds=5 if quick else 9)
    scores, best = dense()
    unit = 0.1 * float((samples.square().sum(1) - scores[:, 0]).mean())
    mass = torch.softmax(scores / unit, dim=1)
    for name, search in variants.items():
        hit = (best.unsqueeze(2) == search()[1].unsqueeze(1)).any(2)
        rows[name]["recall"] = float(hit.float().mean())
        rows[name]["mass"] = float((mass * hit).sum(1).mean())
    return rows


def report_search(quick: bool) -> dict[str, Rows]:
    """Tables of all sizes."""
    tables = {}
    for prototypes in SIZES[:3] if quick else SIZES:
        title = f"search, J = {prototypes:,}"
        tables[title] = rows = measure_search(prototypes, quick)
        print_rows(rows, title=title)
        print_column(rows, "recall", "mass")
    return tables


# --------------------------------------------------------------------------- all


def print_column(rows: Rows, *columns: str) -> None:
    """Figures that are no times, in a line a column."""
    for column in columns:
        values = (f"{name} {row[column]:.3f}" for name, row in rows.items())
        print(f"  {column}: {'; '.join(values)}")
    print()


def main() -> None:
    """Measure, print, and write it if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    tables, goals = report_build(options.quick)
    tables |= report_search(options.quick)
    finish(tables, goals, options.json, faiss=faiss.__version__, scikit_learn=sklearn.__version__)


if __name__ == "__main__":
    main()
