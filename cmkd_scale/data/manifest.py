"""``manifest.json`` of a split: the index format of ``wids`` with our keys added."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from cmkd_scale.data.storage import LocalDirectory, Storage
from cmkd_scale.errors import IntegrityError, UsageError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FORMAT_VERSION = 1
REMEDY = (
    "Delete the directory and build it again with `cmkd shards build`, or copy the whole "
    "directory again."
)
"""What to do about damaged shards."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A bare name: a manifest must not reach out of its own directory.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}")
_FileName = Annotated[str, Field(pattern=f"^{FILE_NAME.pattern}$")]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One tar of a split and what is known of it."""

    url: str
    """File name in the directory of the manifest."""
    nsamples: int
    filesize: int
    """Bytes."""
    sha256: str
    index: str | None
    """File name of the sample index, or None for a tar without one."""
    index_sha256: str | None
    class_counts: Mapping[str, int]
    """Label name to labelled samples, classes without samples left out."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A split of one modality."""

    storage: Storage
    name: str
    dataset: str
    modality: str
    split: str
    label_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Labelled samples of each of ``label_names``."""
    shards: tuple[ShardRecord, ...]
    options: Mapping[str, JsonValue]
    """What the data set's builder was asked for."""
    samples_per_shard: int
    digest: str
    """SHA-256 of all that the manifest says, hence of the data."""

    @property
    def samples(self) -> int:
        """Number of samples N, labelled or not."""
        return sum(shard.nsamples for shard in self.shards)

    @property
    def address(self) -> str:
        """Where it lies, for messages."""
        return self.storage.address

    @property
    def directory(self) -> Path:
        """Where it lies on this machine; a remote split has no such place."""
        if not isinstance(self.storage, LocalDirectory):
            raise TypeError(f"{self.address} is remote")
        return self.storage.path


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)
    url: _FileName
    nsamples: _Count
    filesize: _Count
    sha256: _Digest
    index: _FileName | None = None
    index_sha256: _Digest | None = None
    class_counts: dict[str, _Count] = {}

    @model_validator(mode="after")
    def _index_has_digest(self) -> Self:
        if (self.index is None) != (self.index_sha256 is None):
            raise ValueError("index and index_sha256 go together")
        return self


class _Ours(BaseModel):
    model_config = ConfigDict(strict=True)
    format_version: Literal[1]
    dataset: str
    modality: str
    split: str
    label_names: list[str]
    class_counts: list[_Count]
    samples: _Count
    samples_per_shard: _Count
    options: dict[str, JsonValue]
    digest: _Digest


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    kind: Literal["wids-shard-index-v1"] = Field(alias="__kind__")
    wids_version: Literal[1]
    name: str
    shardlist: list[_Shard]
    cmkd: _Ours

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        ours = self.cmkd
        if len(set(ours.label_names)) != len(ours.label_names):
            raise ValueError("a label name occurs twice")
        if len({shard.url for shard in self.shardlist}) != len(self.shardlist):
            raise ValueError("a shard is listed twice")
        if sum(shard.nsamples for shard in self.shardlist) != ours.samples:
            raise ValueError("the samples of the shards do not add up to cmkd.samples")
        total: Counter[str] = Counter()
        for shard in self.shardlist:
            total.update(shard.class_counts)
        stated = dict(zip(ours.label_names, ours.class_counts, strict=False))
        if len(ours.class_counts) != len(ours.label_names) or +total != +Counter(stated):
            raise ValueError("the class counts of the shards do not add up to cmkd.class_counts")
        return self


def manifest_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own ``cmkd.digest`` left out, in canonical JSON."""
    ours = {key: value for key, value in content["cmkd"].items() if key != "digest"}
    canonical = json.dumps({**content, "cmkd": ours}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """Read a split's manifest; of the shards themselves nothing is read.

    Raises:
        UsageError: there is no manifest, or the directory is an unfinished build.
        IntegrityError: the manifest is malformed, or contradicts itself or its digest.
    """
    path = directory / MANIFEST
    if directory.name.endswith(PARTIAL) or not path.is_file():
        raise UsageError(f"There are no shards in {directory}: {describe(directory)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _malformed(str(directory), str(error)) from None
    return parse_manifest(content, LocalDirectory(directory))


def parse_manifest(content: bytes, storage: Storage) -> Manifest:
    """The manifest that ``content`` is, of the shards in ``storage``.

    Raises:
        IntegrityError: it is malformed, or contradicts itself or its digest.
    """
    try:
        file = _File.model_validate_json(content)
        digest = manifest_digest(json.loads(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise _malformed(storage.address, f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _malformed(storage.address, str(error)) from None
    if digest != file.cmkd.digest:
        raise _malformed(storage.address, "its content does not have the digest that it states")
    ours = file.cmkd
    return Manifest(
        storage=storage,
        name=file.name,
        dataset=ours.dataset,
        modality=ours.modality,
        split=ours.split,
        label_names=tuple(ours.label_names),
        class_counts=tuple(ours.class_counts),
        shards=tuple(ShardRecord(**dict(shard)) for shard in file.shardlist),
        options=ours.options,
        samples_per_shard=ours.samples_per_shard,
        digest=digest,
    )


def _malformed(address: str, reason: str) -> IntegrityError:
    return IntegrityError(f"The manifest {address}/{MANIFEST} is damaged: {reason}. {REMEDY}")


def describe(directory: Path) -> str:
    """The end of an error message about a directory without shards: what it holds."""
    if not directory.is_dir():
        return "the directory does not exist."
    partial = sorted([*directory.glob(f"*{PARTIAL}"), *directory.glob(f"*/*{PARTIAL}")])
    if directory.name.endswith(PARTIAL) or partial:
        unfinished = partial[0] if partial else directory
        return f"{unfinished} is an unfinished build; run `cmkd shards build` again to finish it."
    inside = sorted(path.name for path in directory.iterdir())
    listing = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
    return f"no {MANIFEST}; it holds {listing or 'nothing'}."
