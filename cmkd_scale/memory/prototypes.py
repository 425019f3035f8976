"""k-means prototypes of one class: the only importer of faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.errors import UsageError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Prototypes of one class, in order of falling mass."""

    centres: FloatArray
    """[K, D]"""
    assignment: NDArray[np.int64]
    """[n] prototype of each sample."""
    distance: FloatArray
    """[n] Euclidean distance of each sample to its prototype."""


def prototype_count(samples: int, wanted: int | None) -> int:
    """Prototypes of a class with ``samples`` samples.

    The rule (no ``wanted``) is the square root of the count, at most 64; never more than
    one prototype for every two samples, so that a mass is more than a single sample.
    """
    if samples == 0:
        return 0
    rule = min(64, math.isqrt(samples)) if wanted is None else wanted
    return max(1, min(rule, samples // 2))


def cluster(
    features: FloatArray, prototypes: int, seed: int, iterations: int = 25, restarts: int = 5
) -> Clusters:
    """Lloyd's k-means on [n, D] with FAISS; the same bits on every machine layout.

    Runs on one thread: sums of several threads are added in an order that varies.
    """
    faiss = _faiss()
    features = np.ascontiguousarray(features, dtype=np.float32)
    with _one_thread(faiss):
        kmeans = faiss.Kmeans(
            features.shape[1],
            prototypes,
            niter=iterations,
            seed=seed,
            # Random centres leave k-means in far worse optima (17 % more distortion on
            # five well-separated blobs).
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            nredo=restarts,
            min_points_per_centroid=1,
            max_points_per_centroid=max(256, len(features)),
        )
        kmeans.train(features)
        squared, nearest = kmeans.index.search(features, 1)
    assignment = nearest[:, 0].astype(np.int64)
    # k-means may leave a centre without samples; such a prototype has no mass and goes.
    counts = np.bincount(assignment, minlength=prototypes)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    rank_of = np.full(prototypes, -1, dtype=np.int64)
    rank_of[order] = np.arange(len(order))
    return Clusters(
        centres=kmeans.centroids[order].copy(),
        assignment=rank_of[assignment],
        distance=np.sqrt(np.maximum(squared[:, 0], 0.0)),
    )


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise UsageError(
            "The prototype memory needs FAISS, which is not installed: `pip install "
            "'cmkd_scale[cpu]'`, or `'cmkd_scale[gpu]'` on a machine with CUDA (one of the "
            "two, since both provide the module faiss)."
        ) from None
    module: ModuleType = faiss
    return module


@contextmanager
def _one_thread(faiss: ModuleType) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
