"""Small real splits for the fuzz, and what must be read from them after any damage."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from pydantic import JsonValue
from torch import Tensor

from cmkd_scale.data.build import build
from cmkd_scale.data.manifest import MANIFEST, Manifest
from cmkd_scale.data.modalities import (
    AudioModality,
    FeaturesModality,
    ImageModality,
    Modality,
    TextModality,
)
from cmkd_scale.data.sample_index import SampleIndex
from cmkd_scale.data.shards import map_index
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.records import UNLABELLED, Sample
from tests.data.tar_mutations import Files

PER_SHARD = 4
SAMPLES = 3 * PER_SHARD

READERS: dict[str, Modality] = {
    "text": TextModality(max_bytes=16),
    "image": ImageModality(height=6, width=8, channels=3),
    "audio": AudioModality(n_mels=8, frames=8),
    "features": FeaturesModality(dim=8),
}


def content(modality: str, i: int) -> tuple[str, bytes]:
    """Extension and bytes of sample ``i``."""
    rng = np.random.default_rng(i)
    buffer = io.BytesIO()
    match modality:
        case "text":
            return "txt", f"sample {i} says {rng.bytes(4).hex()}".encode()
        case "image":
            picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            kind = ("png", "jpeg", "webp")[i % 3]
            picture.save(buffer, kind)
            return ("jpg" if kind == "jpeg" else kind), buffer.getvalue()
        case "audio":
            kind = ("wav", "flac")[i % 2]
            soundfile.write(buffer, 0.3 * rng.standard_normal(400), 8000, format=kind.upper())
            return kind, buffer.getvalue()
    np.save(buffer, rng.standard_normal(8).astype(np.float32))
    return "npy", buffer.getvalue()


@dataclass
class FuzzData:
    """A data set and its split at once: three shards, three classes, some without a label."""

    modality: str
    name = "fuzz"
    splits = ("train",)
    label_names = ("red", "green", "blue")
    options: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    def open(self, modality: str, split: str) -> FuzzData:
        return self

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Sample:
        extension, payload = content(self.modality, i)
        label = UNLABELLED if i % 5 == 4 else i % 3
        members = {extension: payload, "json": b'{"i": %d}' % i}
        if label != UNLABELLED:
            members["cls"] = b"%d" % label
        return Sample(key=f"key-{i:03d}", label=label, members=members)


@dataclass
class FuzzSplit:
    """A split on disk whose files can be changed and put back."""

    root: Path
    manifest: Manifest
    pristine: Files = field(repr=False)
    samples: list[Sample] = field(repr=False)
    """What a reader must give for each place."""
    tensors: list[Tensor] = field(repr=False)
    indexes: list[SampleIndex] = field(repr=False)
    on_disk: Files = field(repr=False)

    @property
    def directory(self) -> Path:
        return self.manifest.directory

    @property
    def reads(self) -> Modality:
        return READERS[self.manifest.modality]

    def put(self, files: Files) -> None:
        """Make the directory hold ``files``; a mapped file is replaced, never written into."""
        for name in self.on_disk.keys() | files.keys():
            if self.on_disk.get(name) != files.get(name):
                (self.directory / name).unlink(missing_ok=True)
                if name in files:
                    (self.directory / name).write_bytes(files[name])
        self.on_disk = dict(files)

    def with_member(self, place: int, extension: str, payload: bytes) -> Files:
        """The files with another content in the place of a sample's, digests as they were."""
        data, first = FuzzData(self.manifest.modality), place // PER_SHARD * PER_SHARD
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for sample in (data[i] for i in range(first, first + PER_SHARD)):
                members = dict(sample.members)
                if sample.key == data[place].key:
                    members = {name: members[name] for name in ("cls", "json") if name in members}
                    members[extension] = payload
                for name, content in sorted(members.items()):
                    info = tarfile.TarInfo(f"{sample.key}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return {**self.pristine, self.shard_of(place): buffer.getvalue()}

    def shard_of(self, place: int) -> str:
        return self.manifest.shards[place // PER_SHARD].url

    def readable(self, files: Files) -> set[int]:
        """Places that must still be read from ``files``, whose manifest is as it was.

        Those of a shard that is whole (its index can be made again), and those whose bytes
        are where an index that is whole says, in a shard of the right size.
        """
        found = set()
        for place in range(SAMPLES):
            number, row = divmod(place, PER_SHARD)
            record, index = self.manifest.shards[number], self.indexes[number]
            before, now = self.pristine[record.url], files.get(record.url)
            whole_index = files.get(str(record.index)) == self.pristine[str(record.index)]
            if now is None or len(now) != len(before):
                continue
            spans = [
                slice(int(index.offset[row, m]), int(index.offset[row, m] + index.size[row, m]))
                for m, extension in enumerate(index.extensions)
                if index.size[row, m] >= 0 and self.reads.wants(extension)
            ]
            if now == before or (whole_index and all(now[s] == before[s] for s in spans)):
                found.add(place)
        return found


def make_split(root: Path, modality: str) -> FuzzSplit:
    """Build one."""
    data = FuzzData(modality)
    manifest = build(data, root, modality=modality, split="train", samples_per_shard=PER_SHARD)
    files = {path.name: path.read_bytes() for path in manifest.directory.iterdir()}
    assert MANIFEST in files
    reads = READERS[modality]
    samples = list(SampleReader(manifest, reads.wants).read(np.arange(SAMPLES)))
    given = [sample for sample in samples if isinstance(sample, Sample)]
    for i, sample in enumerate(given):
        extension, payload = content(modality, i)
        expected = Sample(data[i].key, data[i].label, {extension: payload})
        assert sample == expected
    return FuzzSplit(
        root=root,
        manifest=manifest,
        pristine=files,
        samples=given,
        tensors=[reads.decode(sample.members) for sample in given],
        indexes=[map_index(manifest, number) for number in range(len(manifest.shards))],
        on_disk=files,
    )


def make_splits(root: Path) -> list[FuzzSplit]:
    """One of each modality, in the order of ``READERS``."""
    return [make_split(root / modality, modality) for modality in READERS]


def random_of(*seed: object) -> random.Random:
    """A generator that these words decide, the same in every process."""
    return random.Random(" ".join(map(str, seed)))
