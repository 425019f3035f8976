"""Batches for training and evaluation; the state is that of the last batch DELIVERED.

Training batches are endless and counted in samples, so every rank always gets the same
number of them; evaluation batches give every sample exactly once over all ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.data.damage import REASONS, Incident, Quarantine
from cmkd_scale.data.decoding import Decoder, Delivery, Request
from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.order import Order, Position, rank_positions, stable_hash
from cmkd_scale.data.prefetch import AHEAD, Prefetch
from cmkd_scale.data.state import check_state, stream_state
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.workers import answers
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError
from cmkd_scale.records import Batch

_MOST_SUBSTITUTES = 1000


class TrainLoader:
    """This rank's endless batches of one stream, resumable on any world size."""

    def __init__(
        self,
        reader: SampleReader,
        modality: Modality,
        order: Order,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        augment: bool = True,
        workers: int = 0,
        cache_bytes: int = 0,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Stand at the beginning of epoch 0.

        Args:
            reader: of the split.
            modality: decodes and augments.
            order: of the samples to train on; its seed is that of the augmentation, too.
            global_batch_size: samples a batch over all ranks, ``world_size`` or more.
            rank: this process.
            world_size: number of processes.
            augment: whether to augment.
            workers: decoding processes; 0 decodes here.
            cache_bytes: decoded samples kept in memory by each decoding process.
            quarantine: counts damaged samples; None allows none.

        Raises:
            UsageError: a rank would have no part in a batch.
        """
        if global_batch_size < world_size:
            raise UsageError(
                f"train.global_batch_size={global_batch_size} leaves some of {world_size} "
                "processes without a sample; it must be at least their number."
            )
        self.decoder = Decoder(
            reader, modality, seed=order.seed, augment=augment, cache_bytes=cache_bytes
        )
        self.order = order
        if quarantine is None:
            quarantine = Quarantine(len(order), max_bad_fraction=0.0)
        self.quarantine = quarantine
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.delivered = 0
        self._retries = 0
        self._reported = np.zeros(len(REASONS) + 1, dtype=np.int64)

    def batches(self) -> Generator[Batch, None, None]:
        """Endless batches after the last one delivered.

        Raises:
            IntegrityError: hardly a sample can be read, or there is one rank and more samples
                are damaged than the quarantine allows; with several, ``exchange`` raises that.
        """
        pending: list[Request] = []  # asked for and not delivered, oldest first

        def requests() -> Iterator[Request]:
            for request in self._requests():
                pending.append(request)
                yield request

        for delivery in answers(self.decoder, requests(), self.workers):
            if isinstance(delivery, CmkdError):
                raise delivery
            batch = self._mend(pending.pop(0), delivery)
            self.delivered += self.global_batch_size
            yield batch

    def state(self) -> dict[str, Any]:
        """Seed, place after the last delivered batch and what was read; rank-free."""
        place = Position.at(self.delivered, len(self.order))
        return stream_state(self.order, self.decoder.reader.manifest.digest, place)

    def epoch_progress(self) -> float:
        """Position in the current epoch, 0 to 1."""
        return Position.at(self.delivered, len(self.order)).position / len(self.order)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` says.

        Raises:
            IntegrityError: it belongs to other data, another order or another seed.
        """
        manifest = self.decoder.reader.manifest
        place = check_state(state, self.order, manifest.digest, manifest.name)
        self.delivered = place.epoch * len(self.order) + place.position

    def bad_samples_ratio(self) -> float:
        """Share of the samples of an epoch that were found damaged so far, on any rank."""
        return self.quarantine.ratio

    def exchange(self) -> dict[str, float]:
        """Tell all ranks what each has met since the last call; a collective call.

        Returns:
            Since the last call on all ranks: ``samples_skipped/REASON`` for each reason that
            occurred, and ``read_retries``.

        Raises:
            IntegrityError: on all ranks: they have met more damaged samples than allowed.
        """
        self.quarantine.share(self.decoder.reader)
        met = [self.quarantine.met.get(reason, 0) for reason in REASONS]
        retries = self._retries + self.decoder.reader.manifest.storage.retries
        totals = np.array([*met, retries], dtype=np.int64)
        news, self._reported = totals - self._reported, totals
        *skipped, retries = distributed.all_reduce_sum(torch.from_numpy(news)).tolist()
        values = {f"samples_skipped/{r}": n for r, n in zip(REASONS, skipped, strict=True) if n}
        return {**values, "read_retries": retries}

    def _requests(self) -> Iterator[Request]:
        start = wanted = self.delivered
        with Prefetch(self.decoder.reader) as prefetch:
            while True:
                stop = start + self.global_batch_size
                if prefetch.useful:
                    prefetch.want(self.order.places(self._counts(wanted, stop + AHEAD)))
                    wanted = stop + AHEAD
                counts = self._counts(start, stop)
                yield Request(self.order.places(counts), *np.divmod(counts, len(self.order)))
                start = stop

    def _counts(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.array(rank_positions(start, stop, self.rank, self.world_size), dtype=np.int64)

    def _mend(self, request: Request, delivery: Delivery) -> Batch:
        """The whole batch, with another sample in the place of each damaged one."""
        if self.workers:
            self._retries += delivery.retries  # here, those of the storage are its own
        if not delivery.damaged:
            return delivery.batch()
        missing = {}
        for row, incident in delivery.damaged:
            self._set_aside(incident)
            missing[row] = self._substitute(int(request.epoch[row]), int(request.position[row]))
        whole = iter(_rows(delivery.batch()))
        rows = [missing.get(row) or next(whole) for row in range(len(request.places))]
        return Batch(
            inputs=torch.stack([row.inputs[0] for row in rows]),
            labels=torch.cat([row.labels for row in rows]),
            keys=tuple(row.keys[0] for row in rows),
        )

    def _substitute(self, epoch: int, position: int) -> Batch:
        """Another sample of the epoch: decided by the place in the order, so the same on any
        rank and for any number of them."""
        size = len(self.order)
        for attempt in range(_MOST_SUBSTITUTES):
            drawn = stable_hash(self.order.seed, epoch, position, attempt) % size
            places = self.order.places(np.array([epoch * size + drawn]))
            request = Request(places, np.array([epoch]), np.array([position]))
            delivery = self.decoder[request]
            if isinstance(delivery, CmkdError):
                raise delivery
            if not delivery.damaged:
                return delivery.batch()
            self._set_aside(delivery.damaged[0][1])
        raise IntegrityError(
            f"Hardly a sample of {self.decoder.reader.manifest.address} can be read; run "
            "`cmkd shards verify` on it."
        )

    def _set_aside(self, incident: Incident) -> None:
        self.quarantine.add(incident)
        if self.world_size == 1:
            self.quarantine.check()  # several stop together, at the next exchange


def _rows(batch: Batch) -> Iterator[Batch]:
    for row, key in enumerate(batch.keys):
        part = slice(row, row + 1)
        yield replace(batch, inputs=batch.inputs[part], labels=batch.labels[part], keys=(key,))


def ordered_batches(
    reader: SampleReader,
    modality: Modality,
    places: NDArray[np.int64],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    quarantine: Quarantine,
    workers: int = 0,
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """This rank's share of ``places`` once over, with the places of each batch; no augmentation.

    Batch b of the whole (always the same samples) goes to rank b modulo the world size, so
    what is computed on a batch has the same bits for every world size. Damaged samples are
    left out and given to ``quarantine``, which the caller asks afterwards what to think of it.
    """
    parts = [
        places[start : start + batch_size]
        for start in range(rank * batch_size, len(places), batch_size * world_size)
    ]
    for left, batch in explicit_batches(
        reader, modality, parts, quarantine=quarantine, workers=workers
    ):
        if batch is not None:
            yield left, batch


def explicit_batches(
    reader: SampleReader,
    modality: Modality,
    parts: Sequence[NDArray[np.int64]],
    *,
    quarantine: Quarantine,
    workers: int = 0,
) -> Iterator[tuple[NDArray[np.int64], Batch | None]]:
    """The samples at each of ``parts`` as a batch, or None if all are damaged; no augmentation.

    Yields the places that are left with each: damaged samples are left out and given to
    ``quarantine``, which the caller asks afterwards what to think of it.
    """

    def requests() -> Iterator[Request]:
        ahead = -(-AHEAD // max(1, max(map(len, parts), default=1)))
        with Prefetch(reader) as prefetch:
            for number, part in enumerate(parts):
                soon = parts[: ahead + 1] if number == 0 else parts[number + ahead :][:1]
                prefetch.want(np.concatenate([part, *soon]))
                yield Request(part, np.zeros_like(part), np.zeros_like(part))

    deliveries = answers(Decoder(reader, modality), requests(), workers)
    for part, delivery in zip(parts, deliveries, strict=True):
        if isinstance(delivery, CmkdError):
            raise delivery
        for _, incident in delivery.damaged:
            quarantine.add(incident)
        left = np.delete(part, [row for row, _ in delivery.damaged])
        yield left, delivery.batch() if delivery.keys else None
