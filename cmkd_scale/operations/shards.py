"""``cmkd shards build / verify / info / stream``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale.data.adopt import adopt
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.data.labels import LabelReport, compare_labels
from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import Manifest, load_manifest
from cmkd_scale.data.modalities import MODALITIES
from cmkd_scale.data.quality import shared_shards
from cmkd_scale.data.shards import find_manifests
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.verify import verify as verify_shards
from cmkd_scale.errors import IntegrityError, UsageError, did_you_mean
from cmkd_scale.monitoring.console import counting


def build_shards(
    name: str,
    out: Path,
    *,
    source: Path | None,
    modality: str | None,
    split: str | None,
    samples_per_shard: int,
    workers: int | None,
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
        workers: processes that write shards; None uses all cores.
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
                    workers=_cores() if workers is None else workers,
                    progress=advance,
                )
            rows.append(_row(manifest))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def index_shards(
    directory: Path,
    *,
    name: str | None,
    modality: str,
    split: str,
    labels: Path | None,
    workers: int | None,
) -> dict[str, Any]:
    """Index the tars of a directory and write its manifest; returns a row as ``info`` does.

    Raises:
        UsageError: no tars, an unknown modality, or a file of label names that cannot be read.
        IntegrityError: a tar is damaged.
    """
    if modality not in MODALITIES:
        raise UsageError(
            f"--modality '{modality}' is unknown; {did_you_mean(modality, MODALITIES)}"
        )
    try:
        names = labels and labels.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {labels} cannot be read: {error}.") from None
    with counting(f"shards of {directory}") as advance:
        manifest = adopt(
            directory,
            name=name or directory.resolve().name,
            modality=modality,
            split=split,
            label_names=[line.strip() for line in names if line.strip()] if names else None,
            workers=_cores() if workers is None else workers,
            progress=advance,
        )
    return _row(manifest)


def label_report(learns: str, teaches: str, *, split: str) -> LabelReport:
    """Compare the labels of two streams, by their manifests."""
    here, there = (open_manifest(address, split=split) for address in (learns, teaches))
    return compare_labels(
        here.name,
        dict(zip(here.label_names, here.class_counts, strict=True)),
        there.name,
        dict(zip(there.label_names, there.class_counts, strict=True)),
    )


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
    """Counts, sizes, class histogram and quality of the order of each split below ``root``."""
    return [
        {
            **_row(manifest),
            "shared_shards": shared_shards(SampleReader(manifest).starts),
            "class_counts": dict(zip(manifest.label_names, manifest.class_counts, strict=True)),
            "options": manifest.options,
        }
        for manifest in map(load_manifest, _manifests(root))
    ]


def _row(manifest: Manifest) -> dict[str, Any]:
    filled = [count for count in manifest.class_counts if count > 0]
    return {
        "name": manifest.name,
        "directory": manifest.address,
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
