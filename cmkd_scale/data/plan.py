"""What a build of shards was asked for, and the manifest that comes out of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmkd_scale.data.datasets.protocols import Split
from cmkd_scale.data.manifest import FORMAT_VERSION, Manifest, ShardRecord, manifest_digest
from cmkd_scale.errors import UsageError
from cmkd_scale.files import to_json


def make_plan(
    source: Split, *, dataset: str, modality: str, split: str, samples_per_shard: int
) -> dict[str, Any]:
    """All that decides the bytes of a split's shards."""
    return {
        "dataset": dataset,
        "modality": modality,
        "split": split,
        "samples": len(source),
        "samples_per_shard": samples_per_shard,
        "label_names": list(source.label_names),
        "options": dict(source.options),
        "format_version": FORMAT_VERSION,
    }


def make_manifest(plan: Mapping[str, Any], records: Sequence[ShardRecord]) -> dict[str, Any]:
    """The content of ``manifest.json``."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.class_counts)
    content: dict[str, Any] = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": f"{plan['dataset']}-{plan['modality']}-{plan['split']}",
        "shardlist": [asdict(record) for record in records],
        "cmkd": {**plan, "class_counts": [total[name] for name in plan["label_names"]]},
    }
    content["cmkd"]["digest"] = manifest_digest(content)
    return content


def plan_of(manifest: Manifest) -> dict[str, Any]:
    """The plan that a finished split was built by."""
    return {
        "dataset": manifest.dataset,
        "modality": manifest.modality,
        "split": manifest.split,
        "samples": manifest.samples,
        "samples_per_shard": manifest.samples_per_shard,
        "label_names": list(manifest.label_names),
        "options": dict(manifest.options),
        "format_version": FORMAT_VERSION,
    }


def refuse_other_plan(plan: Mapping[str, Any], built: Mapping[str, Any], where: Path) -> None:
    """Refuse to mix what is asked for with what was asked for before.

    Raises:
        UsageError: naming what differs.
    """
    if json.loads(to_json(plan)) == built:
        return
    asked = {**plan, **plan["options"]}
    before = {**built, **(built.get("options") or {})}
    differing = [
        f"{name}={before.get(name)!r} there, {asked.get(name)!r} now"
        for name in sorted({*asked, *before} - {"options", "label_names"})
        if asked.get(name) != before.get(name)
    ]
    raise UsageError(
        f"{where} was built with other options ({'; '.join(differing) or 'other labels'}). "
        "Choose another --out, or delete that directory to build it anew."
    )
