"""``cmkd shards stream``: the exact order in which training would read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.order import Order, Position
from cmkd_scale.data.sampling import Labels, Sampling, draw_from
from cmkd_scale.data.state import check_state, stream_state
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import to_json, write_atomically


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Whose part of which order to read."""

    split: str
    modality: str | None
    rank: int
    world_size: int
    seed: int
    sampling: Sampling = "natural"
    samples: Labels = "labelled"
    n_per_class: int | None = None

    def __post_init__(self) -> None:
        """Refuse an impossible rank with ``UsageError``."""
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"--rank {self.rank} is not one of 0 .. {self.world_size - 1} (--world-size)."
            )


def stream_keys(
    address: str,
    options: StreamOptions,
    *,
    stop_after: int | None,
    state: Path | None,
    save_state: Path | None,
) -> Iterator[str]:
    """Keys in the order in which this rank would read them, to the end of the epoch.

    Rank r of W reads positions r, r + W, ... from where the state stands; with the world
    size of another run, too. The state saved is free of ranks: any rank that stops at the
    same count saves the same file.

    Raises:
        UsageError: a state that cannot be read, or samples that there are none of.
        IntegrityError: a state of other data or of another seed.
    """
    if stop_after is not None and stop_after < 0:
        raise UsageError(f"--stop-after is {stop_after}; it must be 0 or more.")
    manifest = open_manifest(address, split=options.split, modality=options.modality)
    reader = SampleReader(manifest)
    draw = draw_from(
        reader.labels(),
        classes=len(manifest.label_names),
        sampling=options.sampling,
        which=options.samples,
        n_per_class=options.n_per_class,
        seed=options.seed,
    )
    order = Order(draw, reader.starts, options.seed)
    start = Position(0, 0) if state is None else _read_state(state, order, manifest)
    reached = len(order)
    if stop_after is not None:
        reached = min(reached, start.position + stop_after * options.world_size)
    for begin in range(start.position, reached, _POSITIONS_AT_ONCE):
        # A part begins at a multiple of the world size behind the start.
        stop = min(reached, begin + _POSITIONS_AT_ONCE)
        mine = np.arange(start.position + options.rank, stop, options.world_size)
        counts = start.epoch * len(order) + mine[mine >= begin]
        for place in order.places(counts).tolist():
            yield reader.key(place)
    if save_state is not None:
        place = Position.at(start.epoch * len(order) + reached, len(order))
        try:
            # Ranks of an audit may save to the same file at once.
            write_atomically(save_state, to_json(stream_state(order, manifest.digest, place)))
        except OSError as error:
            raise UsageError(f"--save-state {save_state} cannot be written: {error}.") from None


_POSITIONS_AT_ONCE = 65_536


def _read_state(path: Path, order: Order, manifest: Manifest) -> Position:
    try:
        value = json.loads(path.read_bytes())
        return check_state(value, order, manifest.digest, manifest.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is not a stream state ({error}); make one with --save-state."
        ) from None
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from None
