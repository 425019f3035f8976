"""``cmkd shards build / verify / info / stream``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.data.order import Position, epoch_order, rank_positions
from cmkd_scale.data.shards import Manifest, find_manifests, load_index, load_manifest, resolve
from cmkd_scale.data.shards import verify as verify_shards
from cmkd_scale.data.stream import labelled_subset
from cmkd_scale.errors import IntegrityError, UsageError, did_you_mean
from cmkd_scale.files import to_json, write_atomically
from cmkd_scale.monitoring.console import counting


def build_shards(
    name: str,
    out: Path,
    *,
    source: Path | None,
    modality: str | None,
    split: str | None,
    samples_per_shard: int,
    options: Sequence[str],
) -> list[dict[str, Any]]:
    """Write shards of a data set below ``out/{modality}/{split}``; returns a row for each split.

    Args:
        name: key of ``DATASETS``.
        out: directory.
        source: raw data, for data sets that read some.
        modality: one modality, or None for all.
        split: one split, or None for all.
        samples_per_shard: samples in a tar.
        options: ``key=value`` of the data set.

    Raises:
        UsageError: unknown data set, modality, split or option.
    """
    if name not in DATASETS:
        raise UsageError(f"There is no data set '{name}'; {did_you_mean(name, DATASETS)}")
    if samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard is {samples_per_shard}; it must be 1 or more.")
    dataset = DATASETS[name](source, _pairs(options))
    modalities = _one_of("--modality", modality, dataset.modalities)
    splits = _one_of("--split", split, dataset.splits)
    rows = []
    for chosen_modality in modalities:
        for chosen_split in splits:
            with counting(f"{name}/{chosen_modality}/{chosen_split}") as advance:
                manifest = build(
                    dataset,
                    out,
                    modality=chosen_modality,
                    split=chosen_split,
                    samples_per_shard=samples_per_shard,
                    progress=advance,
                )
            rows.append(_row(manifest))
    return rows


def verify(root: Path) -> int:
    """Check every digest below ``root``; returns the number of splits that were checked.

    Raises:
        UsageError: there are no shards.
        IntegrityError: naming everything that is wrong.
    """
    manifests = _manifests(root)
    problems = verify_shards(root)
    if problems:
        listing = "\n".join(f"  - {problem.path}: {problem.reason}" for problem in problems)
        raise IntegrityError(
            f"{root} has {len(problems)} damaged files; build or copy them again:\n{listing}"
        )
    return len(manifests)


def info(root: Path) -> list[dict[str, Any]]:
    """Counts, sizes and class histogram of each split below ``root``."""
    return [
        {
            **_row(manifest),
            "class_counts": dict(zip(manifest.label_names, manifest.class_counts, strict=True)),
            "options": manifest.options,
        }
        for manifest in map(load_manifest, _manifests(root))
    ]


def stream_keys(
    root: Path,
    *,
    split: str,
    modality: str | None,
    rank: int,
    world_size: int,
    seed: int,
    stop_after: int | None,
    state: Path | None,
    save_state: Path | None,
) -> Iterator[str]:
    """Keys in the order in which this rank would read them, to the end of the epoch.

    Rank r of W reads positions r, r + W, ... from where the state stands; with the world
    size of another run, too. The state saved is free of ranks: any rank that stops at the
    same count saves the same file.

    Raises:
        UsageError: impossible rank, or a state that cannot be read.
        IntegrityError: a state of other data or of another seed.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank} is not one of 0 .. {world_size - 1} (--world-size).")
    if stop_after is not None and stop_after < 0:
        raise UsageError(f"--stop-after is {stop_after}; it must be 0 or more.")
    manifest = load_manifest(resolve(root, split=split, modality=modality))
    index = load_index(manifest)
    # Training reads labelled samples only.
    places = labelled_subset(index, classes=len(manifest.label_names), n_per_class=None, seed=0)
    start = Position(0, 0) if state is None else _read_state(state, manifest, seed)
    if not (0 <= start.position < len(places) and start.epoch >= 0):
        raise IntegrityError(f"{state} stands outside the epoch of {manifest.name}.")
    order = places[epoch_order(len(places), seed, start.epoch)]
    for count, position in enumerate(rank_positions(start.position, len(places), rank, world_size)):
        if count == stop_after:
            break
        yield index.key(int(order[position]))
    if save_state is not None:
        reached = len(places)
        if stop_after is not None:
            reached = min(reached, start.position + stop_after * world_size)
        _write_state(save_state, manifest, seed, start.epoch, reached, len(places))


def _read_state(path: Path, manifest: Manifest, seed: int) -> Position:
    try:
        value = json.loads(path.read_text())
        position = Position(int(value["epoch"]), int(value["position"]))
        stated_seed, digest = int(value["seed"]), value["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a stream state ({error}); make one with --save-state."
        ) from None
    if digest != manifest.digest or stated_seed != seed:
        other = "other data" if digest != manifest.digest else f"seed {stated_seed}"
        raise IntegrityError(
            f"{path} belongs to {other}, not to {manifest.name} with seed {seed}; continue with "
            "what it was saved from."
        )
    return position


def _write_state(
    path: Path, manifest: Manifest, seed: int, epoch: int, reached: int, samples: int
) -> None:
    place = Position.at(epoch * samples + reached, samples)
    value = {
        "seed": seed,
        "epoch": place.epoch,
        "position": place.position,
        "manifest": manifest.digest,
    }
    try:
        # Ranks of an audit may save to the same file at once.
        write_atomically(path, to_json(value))
    except OSError as error:
        raise UsageError(f"--save-state {path} cannot be written: {error}.") from None


def _row(manifest: Manifest) -> dict[str, Any]:
    filled = [count for count in manifest.class_counts if count > 0]
    return {
        "name": manifest.name,
        "directory": str(manifest.directory),
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.filesize for shard in manifest.shards),
        "classes": len(filled),
        "smallest_class": min(filled, default=0),
        "largest_class": max(filled, default=0),
        "digest": manifest.digest,
    }


def _manifests(root: Path) -> list[Path]:
    found = find_manifests(root)
    if not found:
        raise UsageError(
            f"There are no shards at {root}: no manifest.json in it or below. A directory whose "
            "name ends in .partial is a build that was interrupted; run the build again."
        )
    return found


def _one_of(flag: str, wanted: str | None, valid: Sequence[str]) -> Sequence[str]:
    if wanted is None:
        return valid
    if wanted not in valid:
        raise UsageError(f"{flag} '{wanted}' is unknown; {did_you_mean(wanted, valid)}")
    return [wanted]


def _pairs(options: Sequence[str]) -> Mapping[str, str]:
    pairs = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"'{option}' is not an option of the form key=value.")
        pairs[key] = value
    return pairs
