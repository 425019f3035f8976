"""How ``data.py`` stores samples for each library, and reads an epoch of them with it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from cmkd_scale.data.build import build
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.data.order import Order
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.records import Sample
from tools.bench._data_samples import Kind, Plain

BATCH, CLASSES, SHARDS, BUFFER = 64, 10, 10, 1000

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Stored:
    """The same samples in the format of each library, written when it is first asked for."""

    kind: Kind
    contents: list[bytes]
    root: Path

    name = "bench-data"
    modalities = ("content",)
    splits = ("train",)
    label_names = tuple(map(str, range(CLASSES)))
    options: Mapping[str, JsonValue] = field(default_factory=dict)

    def open(self, modality: str, split: str) -> Stored:
        """The one split of the data set that this is for our builder."""
        return self

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.contents)

    def __getitem__(self, index: int) -> Sample:
        """One sample for our builder."""
        label = index % CLASSES
        members = {self.kind.extension: self.contents[index], "cls": str(label).encode()}
        return Sample(key=f"sample-{index:06d}", label=label, members=members)

    @property
    def per_shard(self) -> int:
        """Samples in a shard of any format."""
        return -(-len(self) // SHARDS)

    @functools.cached_property
    def tars(self) -> Path:
        """Our shards, which are WebDataset tars and have a manifest that wids reads."""
        build(self, self.root, modality="content", split="train", samples_per_shard=self.per_shard)
        return self.root / "content" / "train"

    @functools.cached_property
    def litdata(self) -> Path:
        """Chunks as ``litdata.optimize`` writes them."""
        writer = importlib.import_module("litdata.streaming.writer")
        chunks = writer.BinaryWriter(str(self.root / "litdata"), chunk_size=self.per_shard)
        for index, content in enumerate(self.contents):
            chunks[index] = {"content": content, "label": index % CLASSES}
        chunks.done()
        chunks.merge()
        return self.root / "litdata"

    @functools.cached_property
    def mds(self) -> Path:
        """MDS shards of about the same number of samples."""
        streaming = importlib.import_module("streaming")
        out = self.root / "mds"
        limit = sum(map(len, self.contents)) // SHARDS + 8 * self.per_shard
        columns = {"content": "bytes", "label": "int"}
        with streaming.MDSWriter(out=str(out), columns=columns, size_limit=limit) as writer:
            for index, content in enumerate(self.contents):
                writer.write({"content": content, "label": index % CLASSES})
        return out


def read_ours(data: Stored, workers: int) -> Batches:
    """One epoch through ``TrainLoader``, without augmentation and without cache."""
    modality = Plain(data.kind)
    reader = SampleReader(load_manifest(data.tars), modality.wants)
    order = Order(Natural(len(reader)), reader.starts, seed=0)
    loader = TrainLoader(
        reader,
        modality,
        order,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        augment=False,
        workers=workers,
    )
    with contextlib.closing(reader):
        for batch in itertools.islice(loader.batches(), len(reader) // BATCH):
            yield batch.inputs, batch.labels


def read_webdataset(data: Stored, workers: int) -> Batches:
    """Shards shuffled, then a buffer of 1,000 samples."""
    wds = importlib.import_module("webdataset")
    urls = sorted(map(str, data.tars.glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(BUFFER, initial=BUFFER)
        .to_tuple(data.kind.extension, "cls")
        .batched(BATCH, collation_fn=data.kind.collate)
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=workers)


def read_litdata(data: Stored, workers: int) -> Batches:
    """Its own shuffle and loader."""
    litdata = importlib.import_module("litdata")
    yield from litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(data.litdata), shuffle=True),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=functools.partial(_collate_fields, data.kind),
    )


def read_streaming(data: Stored, workers: int) -> Batches:
    """Its own shuffle and loader."""
    streaming = importlib.import_module("streaming")
    # A data set that was read in this process hangs in a worker: its threads are not forked.
    streaming.base.util.clean_stale_shared_memory()
    yield from streaming.StreamingDataLoader(
        streaming.StreamingDataset(local=str(data.mds), shuffle=True, batch_size=BATCH),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=functools.partial(_collate_fields, data.kind),
    )


def read_wids(data: Stored, workers: int) -> Batches:
    """Its sampler, which shuffles within chunks of 2,000 samples."""
    wids = importlib.import_module("wids")
    with contextlib.redirect_stderr(io.StringIO()):
        dataset = wids.ShardListDataset(
            str(data.tars / "manifest.json"), keep=True, transformations=[]
        )
    yield from torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=workers,
        sampler=wids.ChunkedSampler(dataset, shuffle=True),
        collate_fn=functools.partial(_collate_streams, data.kind),
    )


def _collate_fields(kind: Kind, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return kind.collate([(row["content"], row["label"]) for row in rows])


def _collate_streams(kind: Kind, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return kind.collate([(row[f".{kind.extension}"].read(), row[".cls"].read()) for row in rows])


READERS: dict[str, Callable[[Stored, int], Batches]] = {
    "ours": read_ours,
    "ours again": read_ours,
    "webdataset": read_webdataset,
    "litdata": read_litdata,
    "mosaicml-streaming": read_streaming,
    "wids": read_wids,
}
