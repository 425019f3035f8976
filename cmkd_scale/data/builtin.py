"""``builtin:DATASET/MODALITY``: bundled data, built into the cache on first use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from cmkd_scale import __version__, distributed
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.errors import UsageError, did_you_mean

_log = logging.getLogger(__name__)

PREFIX = "builtin:"
_SAMPLES_PER_SHARD = 1000


def cache_directory() -> Path:
    """Where built data sets live: ``CMKD_CACHE``, or the user's cache directory."""
    if "CMKD_CACHE" in os.environ:
        return Path(os.environ["CMKD_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(base) / "cmkd_scale"


def locate_shards(
    address: str, *, source: Path | None = None, options: Mapping[str, str | int | float]
) -> Path:
    """The directory of shards that ``data.shards`` means; a collective call.

    Args:
        address: a directory, or ``builtin:DATASET/MODALITY``.
        source: raw data for a builtin data set.
        options: of the builtin data set's builder.

    Raises:
        UsageError: unknown data set or modality, or no such directory.
    """
    if not address.startswith(PREFIX):
        if not Path(address).is_dir():
            raise UsageError(
                f"data.shards: there is no directory {address}. Build shards with `cmkd shards "
                "build DATASET --out DIR`, or use data.shards=builtin:numbers/audio."
            )
        return Path(address)
    name, _, modality = address.removeprefix(PREFIX).partition("/")
    if name not in DATASETS:
        raise UsageError(f"data.shards: no data set '{name}'; {did_you_mean(name, DATASETS)}")
    dataset = DATASETS[name](source, {key: str(value) for key, value in options.items()})
    if modality not in dataset.modalities:
        raise UsageError(
            f"data.shards: '{name}' has no modality '{modality}'; "
            f"{did_you_mean(modality, dataset.modalities)}"
        )
    plan = {
        "cmkd_scale": __version__,
        "source": None if source is None else str(source.resolve()),
        "options": {key: str(value) for key, value in sorted(options.items())},
    }
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
    root = cache_directory() / f"{name}-{fingerprint}"

    def build_splits() -> None:
        for split in dataset.splits:
            if not (root / modality / split).is_dir():
                _log.info("building %s, %s samples", address, split)
            build(
                dataset, root, modality=modality, split=split, samples_per_shard=_SAMPLES_PER_SHARD
            )

    # One process of a job builds; the others wait and read.
    distributed.run_on_main(build_splits)
    return root / modality
