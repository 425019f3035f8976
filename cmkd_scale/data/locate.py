"""From what a user writes to the manifest of one split: a directory, a builtin set or a URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cmkd_scale.data.builtin import cache_directory, locate_shards
from cmkd_scale.data.cache import ShardCache
from cmkd_scale.data.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from cmkd_scale.data.remote import RemoteDirectory, is_remote
from cmkd_scale.data.shards import resolve
from cmkd_scale.errors import UsageError, did_you_mean

CACHE_LIMIT_BYTES = 50 * 2**30
_LARGEST_MANIFEST = 2**30  # bytes


def open_manifest(
    address: str,
    *,
    split: str,
    modality: str | None = None,
    source: Path | None = None,
    options: Mapping[str, str | int | float] | None = None,
    cache_limit_bytes: int = CACHE_LIMIT_BYTES,
) -> Manifest:
    """The manifest of a split; a collective call where ``builtin:`` may have to build it.

    Args:
        address: a directory, a URL of one (``s3://``, ``gs://``, ``https://``, ``hf://``), or
            ``builtin:DATASET/MODALITY``. It may be that of the split, or up to two levels above.
        split: its name.
        modality: its name, or None where there is one only.
        source: raw data for a builtin data set.
        options: of the builtin data set's builder.
        cache_limit_bytes: of the remote shards kept on local disk.

    Raises:
        UsageError: there is no such split; says what there is.
        IntegrityError: its manifest is damaged.
    """
    if not is_remote(address):
        root = locate_shards(address, source=source, options=options or {})
        return load_manifest(resolve(root, split=split, modality=modality))
    cache = ShardCache(cache_directory() / "shards", cache_limit_bytes)
    root_directory = RemoteDirectory(address, cache)
    found: dict[tuple[str, str], Manifest] = {}
    for directory in _candidates(root_directory, split, modality):
        content = directory.read(MANIFEST, max_bytes=_LARGEST_MANIFEST)
        if content is not None:
            manifest = parse_manifest(content, directory.patient())
            found[manifest.modality, manifest.split] = manifest
    return _choose(found, root_directory.address, split, modality)


def _candidates(root: RemoteDirectory, split: str, modality: str | None) -> list[RemoteDirectory]:
    """Where the split may lie; plain HTTP cannot list, so names are tried."""
    modalities = [modality] if modality else root.directories()
    return [
        root,
        root.child(split),
        *(root.child(name).child(split) for name in modalities if name != split),
    ]


def _choose(
    found: Mapping[tuple[str, str], Manifest], address: str, split: str, modality: str | None
) -> Manifest:
    if not found:
        raise UsageError(
            f"There are no shards at {address}: no {MANIFEST} there, in {split}/ or in "
            f"{modality or 'MODALITY'}/{split}/. Give the address of a directory that "
            "`cmkd shards build` wrote, and name data.modality where the server cannot list."
        )
    fitting = [
        manifest
        for (kind, name), manifest in found.items()
        if name == split and modality in (None, kind)
    ]
    if not fitting:
        held = [f"{kind}/{name}" for kind, name in found]
        wanted = f"{modality or '*'}/{split}"
        raise UsageError(f"{address} holds no split {wanted}: {did_you_mean(wanted, held)}")
    if len(fitting) > 1:
        kinds = ", ".join(sorted(manifest.modality for manifest in fitting))
        raise UsageError(
            f"{address} holds several modalities ({kinds}): name one (data.modality, "
            "--modality), or give its address."
        )
    return fitting[0]
