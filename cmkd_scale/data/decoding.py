"""Stored samples to tensors: what a worker does with the samples that it is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cmkd_scale.data.damage import DamagedError, Incident
from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.order import stable_hash
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import CmkdError
from cmkd_scale.records import Batch, Sample

_SMALL_BYTES = 256 * 1024

_Decoded = tuple[Tensor, int, str]
"""Tensor, label and key."""


class Request(NamedTuple):
    """Samples of a batch."""

    places: NDArray[np.int64]
    """[n] in the split."""
    epoch: NDArray[np.int64]
    """[n], keys the augmentation together with ``position``."""
    position: NDArray[np.int64]
    """[n] in the epoch."""


class Delivery(NamedTuple):
    """The n samples of a request that could be read, in its order.

    Between processes a tensor travels as a shared file, which costs a tenth of a millisecond
    of setting up; an array is copied through a pipe, which is cheaper for a small one.
    """

    inputs: Tensor | NDArray[Any]
    """[n, ...]"""
    labels: NDArray[np.int64]
    """[n]"""
    keys: tuple[str, ...]
    """[n]"""
    damaged: tuple[tuple[int, Incident], ...]
    """Which of the request's samples are missing in the batch, and why."""
    retries: int
    """Transfers tried again since the last delivery of this process."""

    def batch(self) -> Batch:
        """The samples as tensors."""
        return Batch(
            inputs=torch.as_tensor(self.inputs),
            labels=torch.from_numpy(self.labels),
            keys=self.keys,
        )


class Decoder(Dataset[Delivery | CmkdError]):
    """Reads, decodes and augments; decoded samples are kept in memory up to a limit."""

    def __init__(
        self,
        reader: SampleReader,
        modality: Modality,
        *,
        seed: int = 0,
        augment: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        """See ``loader.TrainLoader``."""
        self.reader = reader
        self.modality = modality
        self._seed = seed
        self._augment = augment
        self._room = cache_bytes
        self._cache: dict[int, _Decoded] = {}
        self._retries = 0

    def __getitem__(self, request: Request) -> Delivery | CmkdError:
        """The samples of a request, or the error that ends the run."""
        # Raised in a worker, an error would arrive wrapped into the worker's traceback.
        try:
            return self._deliver(request)
        except CmkdError as error:
            return error

    def _deliver(self, request: Request) -> Delivery:
        inputs, labels, keys = [], [], []
        damaged = []
        # All are read before any is decoded: by turns, each finds the caches full of the
        # other's data.
        for row, stored in enumerate(self._samples(request.places)):
            try:
                sample = stored if isinstance(stored, tuple) else self._decode(stored)
            except DamagedError as error:
                damaged.append((row, self.reader.incident(int(request.places[row]), error)))
                continue
            if self._room:
                self._keep(int(request.places[row]), sample)
            tensor, label, key = sample
            if self._augment:
                tensor = self._augmented(
                    tensor, int(request.epoch[row]), int(request.position[row])
                )
            inputs.append(tensor)
            labels.append(label)
            keys.append(key)
        retries = self.reader.manifest.storage.retries
        self._retries, new = retries, retries - self._retries
        stacked = torch.stack(inputs) if inputs else torch.zeros(0, *self.modality.shape)
        return Delivery(
            inputs=stacked.numpy() if stacked.nbytes <= _SMALL_BYTES else stacked,
            labels=np.array(labels, dtype=np.int64),
            keys=tuple(keys),
            damaged=tuple(damaged),
            retries=new,
        )

    def _samples(self, places: NDArray[np.int64]) -> list[Sample | DamagedError | _Decoded]:
        """The samples at ``places``: decoded ones from memory, the others as stored."""
        if not self._cache:
            return [*self.reader.read(places)]
        known = [self._cache.get(place) for place in places.tolist()]
        unread = [row for row, sample in enumerate(known) if sample is None]
        read = iter(self.reader.read(places[unread]))
        return [next(read) if sample is None else sample for sample in known]

    def _decode(self, stored: Sample | DamagedError) -> _Decoded:
        if isinstance(stored, DamagedError):
            raise stored
        return self.modality.decode(stored.members), stored.label, stored.key

    def _keep(self, place: int, sample: _Decoded) -> None:
        if place not in self._cache and sample[0].nbytes <= self._room:
            self._room -= sample[0].nbytes
            self._cache[place] = sample

    def _augmented(self, tensor: Tensor, epoch: int, position: int) -> Tensor:
        # Keyed by the place in the order, so not by rank, worker or batch.
        words = np.array([stable_hash(self._seed, epoch), position], dtype=np.uint64)
        return self.modality.augment(tensor, np.random.Generator(np.random.Philox(key=words)))
