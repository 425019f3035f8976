"""Search over prototypes with FAISS, and k-means of a class; the only importer of faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.kmeans import Clusters, FloatArray, cluster, lloyd_step, prototype_count

__all__ = ["Clusters", "PrototypeIndex", "cluster", "lloyd_step", "prototype_count"]

_EXACT_UP_TO = 20_000
"""Prototypes beyond which an index has lists."""
_GPU_MOST = 2048
"""Results a query that FAISS can give on a GPU."""


class PrototypeIndex:
    """The k prototypes [J, D] with the best score ``v_j - ||x - t_j||^2 / s^2`` of a sample x.

    The score is, up to a term of x alone, the inner product of ``[2 t_j, -||t_j||^2, v_j]``
    with ``[x / s^2, 1 / s^2, 1]``, so FAISS finds it by inner product search, and new
    potentials v only change one column. ``[x, 1, 0]`` leaves them out: Euclidean distance.

    Few prototypes are searched exactly. Many are held in lists, one for each centre of a k-means
    over the prototypes (IVF: Johnson, Douze and Jégou, "Billion-scale similarity search with
    GPUs", 2019). A search reads the ``nprobe`` lists whose centres would score best with the
    best potential in the list, and misses prototypes of other lists.
    """

    def __init__(
        self,
        prototypes: Tensor,
        *,
        scale: float = 1.0,
        nlist: int | None = None,
        nprobe: int = 32,
        seed: int = 0,
    ) -> None:
        """Build the index; potentials are zero until ``refresh``.

        Args:
            prototypes: [J, D] on any device.
            scale: s, the unit of distance.
            nlist: lists; 0 searches exactly, None takes 2 sqrt(J) beyond 20,000 prototypes and
                0 below.
            nprobe: lists that a search reads.
            seed: of the lists' centres.

        Raises:
            UsageError: FAISS is not installed.
        """
        self._faiss = _faiss()
        self._scale = scale
        self._nprobe = nprobe
        self._gpus: dict[torch.device, tuple[Any, Any]] = {}
        rows = prototypes.detach().float().cpu()
        # Inner products lose their bits far from the origin; distances know no origin.
        self._origin = rows.sum(0) / max(1, len(rows))
        rows = rows - self._origin
        if nlist is None:
            nlist = 2 * math.isqrt(len(rows)) if len(rows) > _EXACT_UP_TO else 0
        self._centres, self._list_of = self._make_lists(rows.numpy(), nlist, seed)
        self._rows = _augment(rows)
        self.refresh(torch.zeros(len(rows)))

    def refresh(self, potentials: Tensor) -> None:
        """Take up ``potentials`` [J], finite, in units of the score; lists stay as they are."""
        values = potentials.detach().float().cpu().numpy()
        self._rows[:, -1] = values
        self._index = self._inverted(values) if len(self._centres) else self._flat(self._rows)
        self._gpus.clear()

    def search(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores [B, k] in falling order and prototypes [B, k] of ``features`` [B, D].

        Where fewer than k are found, the prototype is -1 and the score -inf. Results are on the
        features' device; on a GPU the search runs there if FAISS was built for it.
        """
        unit = self._scale**-2
        found, ids, square_norms = self._query(features, k, unit, 1.0)
        return found - unit * square_norms, ids

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Euclidean distances [B, k], rising, and the nearest prototypes [B, k].

        Potentials and scale play no part. Where fewer are found: -1, at distance inf.
        """
        found, ids, square_norms = self._query(features, k, 1.0, 0.0)
        return (square_norms - found).clamp_(min=0.0).sqrt_(), ids

    def _query(
        self, features: Tensor, k: int, unit: float, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products [B, k], -inf for none, prototypes [B, k], and ``||x||^2`` [B, 1]."""
        x = features.detach().float() - self._origin.to(features.device)
        ends = x.new_tensor([unit, weight]).expand(len(x), 2)
        query = torch.cat([unit * x, ends], dim=1)
        index = self._index_on(x.device, k)
        found, ids = index.search(query if index is not self._index else query.cpu(), k)
        found, ids = found.to(x.device), ids.to(x.device)
        found = found.masked_fill_(ids < 0, -torch.inf)
        return found, ids, x.square().sum(1, keepdim=True)

    def _index_on(self, device: torch.device, k: int) -> Any:
        """The index, or a copy of it on ``device`` if FAISS can search there."""
        gpus = self._faiss.get_num_gpus() if hasattr(self._faiss, "StandardGpuResources") else 0
        if device.type != "cuda" or gpus == 0 or k > _GPU_MOST:
            return self._index
        if device not in self._gpus:
            resources = self._faiss.StandardGpuResources()
            place = device.index or 0
            moved = self._faiss.index_cpu_to_gpu(resources, place, self._index)
            # FAISS does not keep the resources alive.
            self._gpus[device] = moved, resources
        return self._gpus[device][0]

    def _make_lists(
        self, rows: FloatArray, nlist: int, seed: int
    ) -> tuple[FloatArray, NDArray[np.int64]]:
        """Centres [L, D] of the lists, and the list [J] of each prototype."""
        if nlist == 0:
            return rows[:0], np.zeros(0, dtype=np.int64)
        kmeans = self._faiss.Kmeans(
            rows.shape[1],
            nlist,
            niter=10,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=32,
        )
        with _one_thread(self._faiss):
            kmeans.train(rows)
            _, lists = kmeans.index.search(rows, 1)
        return kmeans.centroids, np.ascontiguousarray(lists[:, 0])

    def _flat(self, rows: FloatArray) -> Any:
        index = self._faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return index

    def _inverted(self, values: FloatArray) -> Any:
        """Lists whose centres score like a prototype with the list's best potential."""
        centres = _augment(torch.from_numpy(self._centres))
        centres[:, -1] = values.min()
        np.maximum.at(centres[:, -1], self._list_of, values)
        width = self._rows.shape[1]
        index = self._faiss.IndexIVFFlat(
            self._flat(centres), width, len(centres), self._faiss.METRIC_INNER_PRODUCT
        )
        index.nprobe = self._nprobe
        index.is_trained = True
        # ``add`` would choose lists by inner product; prototypes belong to the nearest centre.
        ids = np.arange(len(self._rows))
        pointers = [self._faiss.swig_ptr(array) for array in (self._rows, ids, self._list_of)]
        index.add_core(len(ids), *pointers)
        return index


def _augment(rows: Tensor) -> FloatArray:
    """``[2 t, -||t||^2, 0]``: [J, D + 2]."""
    norms = rows.square().sum(1, keepdim=True)
    return torch.cat([2.0 * rows, -norms, torch.zeros_like(norms)], dim=1).numpy()


def _faiss() -> ModuleType:
    try:
        import faiss
        import faiss.contrib.torch_utils  # lets indices take tensors, on the GPU too
    except ImportError:
        raise UsageError(
            "Search over prototypes needs FAISS, which is not installed: `pip install "
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
