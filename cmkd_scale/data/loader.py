"""Workers, decoding, batches; its state is that of the last batch DELIVERED.

Training batches are endless and counted in samples, so every rank always gets the same
number of them; evaluation batches give every sample exactly once over all ranks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.order import Position, epoch_order, rank_positions, stable_hash
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import CmkdError, IntegrityError
from cmkd_scale.records import Batch

_Place = tuple[int, int]
"""(epoch, position), or (-1, place) for a sample that is not augmented."""


class _Decoded(Dataset[tuple[Tensor, int, str] | CmkdError]):
    """Decoded and augmented samples; decoded ones are kept in memory up to a limit."""

    def __init__(
        self,
        reader: SampleReader,
        modality: Modality,
        subset: NDArray[np.int64],
        *,
        seed: int,
        augment: bool,
        cache_bytes: int,
    ) -> None:
        self.reader = reader
        self.modality = modality
        self.subset = subset
        self.seed = seed
        self.augment = augment
        self.room = cache_bytes
        self.cache: dict[int, Tensor] = {}
        self.order: tuple[int, NDArray[np.int64]] = (-1, subset)

    def __getitem__(self, where: _Place) -> tuple[Tensor, int, str] | CmkdError:
        # Raised in a worker, an error would arrive wrapped into the worker's traceback.
        try:
            return self.sample(*where)
        except CmkdError as error:
            return error

    def sample(self, epoch: int, position: int) -> tuple[Tensor, int, str]:
        place = int(self._epoch(epoch)[position])
        inputs = self._decode(place)
        if self.augment:
            # Keyed by the place in the order, so not by rank, worker or batch.
            key = [stable_hash(self.seed, epoch), position]
            rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
            inputs = self.modality.augment(inputs, rng)
        return inputs, int(self.reader.index.labels[place]), self.reader.index.key(place)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self.order[0] != epoch:
            order = epoch_order(len(self.subset), self.seed, epoch)
            self.order = (epoch, self.subset[order])
        return self.order[1]

    def _decode(self, place: int) -> Tensor:
        if place in self.cache:
            return self.cache[place]
        sample = self.reader[place]
        try:
            inputs = self.modality.decode(sample.members)
        except IntegrityError as error:
            shard = self.reader.manifest.shards[int(self.reader.index.shard[place])].url
            raise IntegrityError(
                f"Sample {sample.key} of {self.reader.manifest.directory / shard} cannot be "
                f"decoded: {error} Build or copy the shard again."
            ) from None
        size = inputs.numel() * inputs.element_size()
        if size <= self.room:
            self.room -= size
            self.cache[place] = inputs
        return inputs


def _collate(samples: list[tuple[Tensor, int, str] | CmkdError]) -> Batch | CmkdError:
    """A batch, or the first error among its samples."""
    decoded = []
    for sample in samples:
        if isinstance(sample, CmkdError):
            return sample
        decoded.append(sample)
    return _batch(decoded)


def _batch(samples: list[tuple[Tensor, int, str]]) -> Batch:
    return Batch(
        inputs=torch.stack([inputs for inputs, _, _ in samples]),
        labels=torch.tensor([label for _, label, _ in samples], dtype=torch.int64),
        keys=tuple(key for _, _, key in samples),
    )


def _ignore_signals(worker: int) -> None:
    """Leave the end to the parent: signals to the whole group must not cost it its data."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TrainLoader:
    """This rank's endless batches of a labelled subset, resumable on any world size."""

    def __init__(
        self,
        reader: SampleReader,
        modality: Modality,
        subset: NDArray[np.int64],
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        augment: bool = True,
        workers: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        """Stand at the beginning of epoch 0.

        Args:
            reader: of the split.
            modality: decodes and augments.
            subset: places to train on.
            global_batch_size: samples a batch over all ranks, a multiple of ``world_size``.
            rank: this process.
            world_size: number of processes.
            seed: of order and augmentation.
            augment: whether to augment.
            workers: decoding processes; 0 decodes here.
            cache_bytes: decoded samples kept in memory by each decoding process.
        """
        self.dataset = _Decoded(
            reader, modality, subset, seed=seed, augment=augment, cache_bytes=cache_bytes
        )
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.workers = workers
        self.delivered = 0

    def batches(self) -> Iterator[Batch]:
        """Endless batches after the last one delivered."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._places(),
            num_workers=self.workers,
            collate_fn=_collate,
            # A fork of a process with running threads may deadlock.
            multiprocessing_context="spawn" if self.workers else None,
            worker_init_fn=_ignore_signals,
        )
        for batch in loader:
            if isinstance(batch, CmkdError):
                raise batch
            self.delivered += self.global_batch_size
            yield batch

    def state(self) -> dict[str, Any]:
        """Seed, place after the last delivered batch and digest of the data; rank-free."""
        place = Position.at(self.delivered, len(self.dataset.subset))
        return {
            "seed": self.seed,
            "epoch": place.epoch,
            "position": place.position,
            "manifest": self.dataset.reader.manifest.digest,
        }

    def epoch_progress(self) -> float:
        """Position in the current epoch, 0 to 1."""
        samples = len(self.dataset.subset)
        return Position.at(self.delivered, samples).position / samples

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` says.

        Raises:
            IntegrityError: the state belongs to other data or another seed.
        """
        if state["manifest"] != self.dataset.reader.manifest.digest:
            raise IntegrityError(
                "The checkpoint was trained on other data than "
                f"{self.dataset.reader.manifest.name} as it is now (the manifests' digests "
                "differ). Restore the shards, or start in a new run directory."
            )
        if state["seed"] != self.seed:
            raise IntegrityError(
                f"The checkpoint's order has seed {state['seed']}, this run {self.seed}."
            )
        self.delivered = state["epoch"] * len(self.dataset.subset) + state["position"]

    def _places(self) -> Iterator[list[_Place]]:
        start = self.delivered
        samples = len(self.dataset.subset)
        while True:
            stop = start + self.global_batch_size
            counts = rank_positions(start, stop, self.rank, self.world_size)
            yield [divmod(count, samples) for count in counts]
            start = stop


def ordered_batches(
    reader: SampleReader,
    modality: Modality,
    places: NDArray[np.int64],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """This rank's share of ``places`` once over, with the places of each batch; no augmentation.

    Batch b of the whole (always the same samples) goes to rank b modulo the world size, so
    what is computed on a batch has the same bits for every world size.
    """
    dataset = _Decoded(reader, modality, places, seed=0, augment=False, cache_bytes=0)
    for start in range(rank * batch_size, len(places), batch_size * world_size):
        stop = min(start + batch_size, len(places))
        samples = [dataset.sample(-1, position) for position in range(start, stop)]
        yield places[start:stop], _batch(samples)
