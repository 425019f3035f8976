"""Stored samples to tensors: what a worker does with the samples that it is asked for."""

from __future__ import annotations

from typing import NamedTuple

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


class Request(NamedTuple):
    """Samples of a batch."""

    places: NDArray[np.int64]
    """[n] in the split."""
    epoch: NDArray[np.int64]
    """[n], keys the augmentation together with ``position``."""
    position: NDArray[np.int64]
    """[n] in the epoch."""


class Delivery(NamedTuple):
    """The samples of a request that could be read, in its order."""

    batch: Batch
    damaged: tuple[tuple[int, Incident], ...]
    """Which of the request's samples are missing in the batch, and why."""
    retries: int
    """Transfers tried again since the last delivery of this process."""


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
        self._cache: dict[int, tuple[Tensor, int, str]] = {}
        self._retries = 0

    def __getitem__(self, request: Request) -> Delivery | CmkdError:
        """The samples of a request, or the error that ends the run."""
        # Raised in a worker, an error would arrive wrapped into the worker's traceback.
        try:
            return self._deliver(request)
        except CmkdError as error:
            return error

    def _deliver(self, request: Request) -> Delivery:
        inputs, labels, keys, damaged = [], [], [], []
        samples = [self._cache.get(place) for place in request.places.tolist()]
        unread = [row for row, sample in enumerate(samples) if sample is None]
        # All before any is decoded: by turns, each finds the caches full of the other's data.
        read = iter(list(self.reader.read(request.places[unread])))
        for row, (place, sample) in enumerate(zip(request.places.tolist(), samples, strict=True)):
            if sample is None:
                try:
                    sample = self._decode(place, next(read))
                except DamagedError as error:
                    damaged.append((row, self.reader.incident(place, error)))
                    continue
            tensor, label, key = sample
            if self._augment:
                # Keyed by the place in the order, so not by rank, worker or batch.
                epoch, position = int(request.epoch[row]), int(request.position[row])
                words = np.array([stable_hash(self._seed, epoch), position], dtype=np.uint64)
                tensor = self.modality.augment(
                    tensor, np.random.Generator(np.random.Philox(key=words))
                )
            inputs.append(tensor)
            labels.append(label)
            keys.append(key)
        retries = self.reader.manifest.storage.retries
        self._retries, new = retries, retries - self._retries
        return Delivery(
            Batch(
                inputs=torch.stack(inputs) if inputs else torch.zeros(0, *self.modality.shape),
                labels=torch.tensor(labels, dtype=torch.int64),
                keys=tuple(keys),
            ),
            tuple(damaged),
            new,
        )

    def _decode(self, place: int, stored: Sample | DamagedError) -> tuple[Tensor, int, str]:
        if isinstance(stored, DamagedError):
            raise stored
        inputs = self.modality.decode(stored.members)
        sample = inputs, stored.label, stored.key
        size = inputs.numel() * inputs.element_size()
        if size <= self._room:
            self._room -= size
            self._cache[place] = sample
        return sample
