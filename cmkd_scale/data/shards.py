"""What is on disk: splits, the sample index of their shards, and whether all is as it was built.

A split is a directory of plain WebDataset tars, a sample index beside each of them, and a
manifest. ``build.py`` writes it; nothing in here writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmkd_scale.data.manifest import (
    MANIFEST,
    PARTIAL,
    REMEDY,
    Manifest,
    ShardRecord,
    describe,
    load_manifest,
)
from cmkd_scale.data.sample_index import SampleIndex, concatenate, index_tar, read_index
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError, did_you_mean
from cmkd_scale.files import file_digest

__all__ = [
    "Manifest",
    "Problem",
    "SampleIndex",
    "ShardRecord",
    "find_manifests",
    "load_index",
    "load_manifest",
    "resolve",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with stored data."""

    path: Path
    reason: str


def find_manifests(root: Path) -> list[Path]:
    """Directories of finished splits: ``root`` itself or below it, at most two levels, sorted."""
    found = {
        path.parent
        for pattern in (MANIFEST, f"*/{MANIFEST}", f"*/*/{MANIFEST}")
        for path in root.glob(pattern)
    }
    return sorted(
        path
        for path in found
        if not any(part.endswith(PARTIAL) for part in (path.name, path.parent.name))
    )


def resolve(root: Path, *, split: str, modality: str | None = None) -> Path:
    """The directory of one split.

    Args:
        root: what was given to ``--out`` (holding one modality, or ``modality`` named), the
            directory of a modality, or that of a split.
        split: its name.
        modality: its name, or None where there is one only.

    Raises:
        UsageError: naming what is there.
    """
    choices = {path: load_manifest(path) for path in find_manifests(root)}
    if not choices:
        raise UsageError(f"There are no shards in {root}: {describe(root)}")
    modalities = sorted({manifest.modality for manifest in choices.values()})
    if modality is None and len(modalities) > 1:
        raise UsageError(
            f"{root} holds several modalities ({', '.join(modalities)}): name one "
            "(data.modality, --modality), or give its directory."
        )
    wanted = modality or modalities[0]
    if wanted not in modalities:
        raise UsageError(f"{root} holds no modality '{wanted}': {did_you_mean(wanted, modalities)}")
    named = {
        manifest.split: path for path, manifest in choices.items() if manifest.modality == wanted
    }
    if split not in named:
        interrupted = [path for path in root.glob(f"**/{split}{PARTIAL}") if path.is_dir()]
        if interrupted:
            raise UsageError(f"The build of {interrupted[0]} was interrupted: run it again.")
        raise UsageError(
            f"{root} holds no split '{split}' of {wanted}: {did_you_mean(split, named)} Build it "
            f"with `cmkd shards build ... --modality {wanted} --split {split}`."
        )
    return named[split]


def load_index(manifest: Manifest) -> SampleIndex:
    """Where every sample of a split lies, in stored order.

    Sizes of the shards and digests of their indexes are checked, digests of the shards are
    not (``verify`` does). A shard without an index is walked through, header by header.

    Raises:
        IntegrityError: a file is missing, or is not what the manifest says.
    """
    return concatenate([_shard_index(manifest, shard) for shard in manifest.shards])


def _shard_index(manifest: Manifest, shard: ShardRecord) -> SampleIndex:
    tar = manifest.directory / shard.url
    size = tar.stat().st_size if tar.is_file() else -1
    if size != shard.filesize:
        found = "is missing" if size < 0 else f"has {size} bytes instead of {shard.filesize}"
        raise IntegrityError(f"The shard {tar} {found}. {REMEDY}")
    if shard.index is None:
        index = index_tar(tar)
    else:
        path = manifest.directory / shard.index
        if not path.is_file() or file_digest(path) != shard.index_sha256:
            raise IntegrityError(f"The sample index {path} is missing or damaged. {REMEDY}")
        index = read_index(path)
    reason = _contradiction(index, shard, manifest)
    if reason:
        raise IntegrityError(
            f"The sample index of {tar} contradicts its manifest: {reason}. {REMEDY}"
        )
    return index


def _contradiction(index: SampleIndex, shard: ShardRecord, manifest: Manifest) -> str:
    """What index and manifest disagree on, or nothing."""
    if len(index) != shard.nsamples:
        return f"{len(index)} samples instead of {shard.nsamples}"
    if (index.offset > shard.filesize - index.size).any():
        return "a sample ends behind the end of the file"
    if int(index.labels.max(initial=-1)) >= len(manifest.label_names):
        return "a label without a name"
    counts = Counter(manifest.label_names[label] for label in index.labels if label >= 0)
    if counts != +Counter(shard.class_counts):
        return "other class counts"
    return ""


def verify(root: Path) -> list[Problem]:
    """Everything that is wrong with the finished splits at or below ``root``.

    Reads every byte: digests of shards and indexes, samples and classes against the index,
    the index against the headers of the shard, files that no manifest lists, and unfinished
    builds beside finished splits.

    Raises:
        UsageError: there is no finished split.
    """
    directories = find_manifests(root)
    if not directories:
        raise UsageError(f"There are no shards in {root}: {describe(root)}")
    problems = [
        Problem(path, "an unfinished build; run the same `cmkd shards build` again")
        for pattern in (f"*{PARTIAL}", f"*/*{PARTIAL}")
        for path in sorted(root.glob(pattern))
    ]
    for directory in directories:
        problems += _problems_of_split(directory)
    return problems


def _problems_of_split(directory: Path) -> Iterator[Problem]:
    try:
        manifest = load_manifest(directory)
    except IntegrityError as error:
        yield Problem(directory / MANIFEST, str(error))
        return
    listed = {MANIFEST}
    keys: set[str] = set()
    for shard in manifest.shards:
        listed |= {shard.url, shard.index or shard.url}
        tar = directory / shard.url
        try:
            index = _shard_index(manifest, shard)
            if file_digest(tar) != shard.sha256:
                yield Problem(tar, "its SHA-256 is not that of the manifest")
            elif index != index_tar(tar):
                yield Problem(tar, "its sample index does not describe it")
            repeated = keys.intersection(index.keys())
            if repeated:
                yield Problem(tar, f"holds {min(repeated)}, which an earlier shard holds too")
            keys.update(index.keys())
        except (CmkdError, OSError) as error:
            yield Problem(tar, str(error))
    for path in sorted(directory.iterdir()):
        if path.name not in listed:
            yield Problem(path, "the manifest does not list it")
